"""The table of architectures: one entry each says all that sets a `transformers` class apart.

Names, defaults and fixed choices are those of transformers 5.23. A class made of blocks that exist
needs an entry in `FAMILIES`, a case in tests/golden/cases.py and `make golden`; no other code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slm_jax.models.hf.fields import Fields
from slm_jax.models.hf import plans, rules
from slm_jax.models.hf.rules import Rule
from slm_jax.nn.norm import NormConfig


@dataclass(frozen=True)
class Family:
    """One class of `transformers`."""

    architecture: str
    """Name of its causal language model."""
    rules: tuple[Rule, ...]
    """Weights of a layer."""
    keys: tuple[str, ...]
    """Fields that the class has besides `configs.COMMON_KEYS`; it ignores others, and so do we."""
    plan: Callable[[Fields], list[plans.LayerPlan]] = plans.uniform
    """What differs from layer to layer."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of fields that config.json may leave out, where not those of `fields.DEFAULTS`."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields that our blocks follow only at these values."""
    norm: NormConfig = NormConfig()
    """Normalisation; eps is read from `eps_key`."""
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    eps_key: str = "rms_norm_eps"
    qk_norm: Literal["head", "full"] | None = None
    qkv_bias: bool = False
    """Biases on query, key and value whatever `attention_bias` says."""
    scaled_embedding: bool = False
    """Embeddings times sqrt(width)."""
    routing: Literal["renormalised", "softmax", "sparsemixer"] = "softmax"
    """How experts are weighted; renormalised too where `norm_topk_prob` is true."""
    experts_key: str = "num_experts"
    activation_key: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=dict)
    """Names of activations that this class reads in its own way."""
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
    rope_aliases: tuple[str, ...] = ()
    """Old names of longrope."""
    whole_heads: bool = False
    """The class refuses a width that is not a multiple of the heads, whatever `head_dim` is."""
    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm"


_DENSE = (
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "intermediate_size",
    "hidden_act",
    "rope_parameters",
)
_WINDOWS = ("sliding_window", "use_sliding_window", "layer_types")
_QWEN_WINDOWS = {"sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        rules.LLAMA,
        (*_DENSE, "head_dim", "attention_bias", "mlp_bias"),
        whole_heads=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        rules.LLAMA,
        (*_DENSE, "head_dim", "sliding_window"),
        defaults={"sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        rules.LLAMA,
        (*_DENSE, *_WINDOWS, "max_window_layers"),
        plans.qwen,
        defaults=_QWEN_WINDOWS,
        qkv_bias=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        (*rules.LLAMA, *rules.QK_NORM),
        (*_DENSE, *_WINDOWS, "max_window_layers", "head_dim", "attention_bias"),
        plans.qwen,
        defaults={**_QWEN_WINDOWS, "head_dim": 128},
        qk_norm="head",
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        rules.LLAMA,
        (*_DENSE, "head_dim", "attention_bias"),
        defaults={"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
        only={"use_bidirectional_attention": (None, False)},
        norm=NormConfig(scale="unit_offset"),
        scaled_embedding=True,
        activations={"gelu": "gelu_tanh"},  # the first published configurations
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        (
            *rules.ATTENTION,
            *rules.gated("mlp"),
            *rules.norm("input_layernorm", "mixer_norm"),
            *rules.norm("post_attention_layernorm", "mixer_post_norm"),
            *rules.norm("pre_feedforward_layernorm", "channel_norm"),
            *rules.norm("post_feedforward_layernorm", "channel_post_norm"),
        ),
        (
            *(key for key in _DENSE if key != "hidden_act"),
            "hidden_activation",
            "head_dim",
            "attention_bias",
            "sliding_window",
            "layer_types",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ),
        plans.gemma2,
        defaults={
            "head_dim": 256,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 4096,
            "use_sliding_window": True,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        only={"use_bidirectional_attention": (None, False)},
        norm=NormConfig(scale="unit_offset"),
        norm_position="sandwich",
        scaled_embedding=True,
        activation_key="hidden_activation",
        whole_heads=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        (
            *rules.linear("self_attn.qkv_proj", "mixer.q", "mixer.k", "mixer.v"),
            *rules.linear("self_attn.o_proj", "mixer.out"),
            *rules.linear("mlp.gate_up_proj", "channel.gate", "channel.up"),
            *rules.linear("mlp.down_proj", "channel.down"),
            *rules.PRE_NORMS,
        ),
        (*_DENSE, "sliding_window", "partial_rotary_factor", "original_max_position_embeddings"),
        defaults={"original_max_position_embeddings": 4096},
        rope_types=("default", "longrope"),
        rope_aliases=("su", "yarn"),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        rules.MIXTRAL,
        (*_DENSE, "head_dim", "sliding_window", "num_local_experts", "num_experts_per_tok"),
        plans.sparse,
        defaults={"rope_theta": 1e6},
        routing="renormalised",
        experts_key="num_local_experts",
    ),
    "phimoe": Family(
        "PhimoeForCausalLM",
        rules.MIXTRAL,
        (
            *_DENSE,
            "sliding_window",
            "num_local_experts",
            "num_experts_per_tok",
            "router_jitter_noise",
            "attention_bias",
            "lm_head_bias",
        ),
        plans.sparse,
        defaults={"rope_theta": 1e6},
        norm=NormConfig(kind="layer", bias=True),
        routing="sparsemixer",
        experts_key="num_local_experts",
        rope_types=("default",),  # its longrope scales by length but never takes the long factors
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        (
            *rules.ATTENTION,
            *rules.QK_NORM,
            *rules.linear("mlp.gate", "channel.router"),
            *rules.gated("mlp.experts.{expert}"),
            *rules.PRE_NORMS,
        ),
        (*_DENSE, "attention_bias", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
        plans.sparse,
        only={"clip_qkv": (None,)},
        qk_norm="full",
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        (
            *rules.ATTENTION,
            *rules.QK_NORM,
            *rules.gated("mlp"),
            *rules.norm("post_attention_layernorm", "mixer_post_norm"),
            *rules.norm("post_feedforward_layernorm", "channel_post_norm"),
        ),
        (*_DENSE, "attention_bias"),
        norm_position="post",
        qk_norm="full",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        rules.LLAMA,
        (
            *_DENSE,
            *_WINDOWS,
            "attention_bias",
            "mlp_bias",
            "no_rope_layers",
            "no_rope_layer_interval",
        ),
        plans.smollm3,
        defaults={
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
    ),
    "mamba": Family(
        "MambaForCausalLM",
        (*rules.ssm("mixer"), *rules.norm("norm", "mixer_norm")),
        (
            "layer_norm_epsilon",
            "state_size",
            "expand",
            "conv_kernel",
            "time_step_rank",
            "use_bias",
            "use_conv_bias",
            "residual_in_fp32",
            "hidden_act",
        ),
        plans.mamba,
        defaults={"tie_word_embeddings": True},
        only={"hidden_act": ("silu",)},
        eps_key="layer_norm_epsilon",
        layers="backbone.layers",
        embed="backbone.embeddings",
        final_norm="backbone.norm_f",
    ),
}
