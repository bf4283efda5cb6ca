"""The table of architectures: one entry each says all that sets a `transformers` class apart.

Names, defaults and fixed choices are those of transformers 5.23. A class made of blocks that exist
needs an entry in `FAMILIES`, a case in tests/golden/cases.py and `make golden`; no other code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slm_jax.models.hf import plans, rules
from slm_jax.models.hf.fields import Fields
from slm_jax.nn.norm import NormConfig


@dataclass(frozen=True)
class Family:
    """One class of `transformers`."""

    architecture: str
    """Name of its causal language model."""
    rules: rules.Rules
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
    activations: Mapping[str, Literal["gelu_tanh"]] = field(default_factory=dict)
    """Names of activations that this class reads in its own way."""
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    """Names of rope types that this class reads in its own way."""
    whole_heads: bool = False
    """The class refuses a width that is not a multiple of the heads, whatever `head_dim` is."""
    ssm_keys: Mapping[str, str] = field(default_factory=dict)
    """Names of the fields of `MambaConfig`, and of `expand` = d_inner / width."""
    inner_norms: bool = False
    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm"


_ATTENTION = ("num_attention_heads", "num_key_value_heads", "rope_parameters")
_BLOCK = (*_ATTENTION, "rms_norm_eps", "intermediate_size", "hidden_act")
_EXPERTS = ("num_experts", "num_experts_per_tok")
_LOCAL_EXPERTS = ("num_local_experts", "num_experts_per_tok")
_WINDOWS = ("sliding_window", "use_sliding_window", "layer_types")
_QWEN = (*_BLOCK, *_WINDOWS, "max_window_layers")
_QWEN_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}
_MAMBA = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "conv_bias": "use_conv_bias",
    "proj_bias": "use_bias",
}
_JAMBA = {name: f"mamba_{name}" for name in _MAMBA}
_GEMMA_ONLY = {"use_bidirectional_attention": (None, False)}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        rules.LLAMA,
        (*_BLOCK, "head_dim", "attention_bias", "mlp_bias"),
        whole_heads=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        rules.LLAMA,
        (*_BLOCK, "head_dim", "sliding_window"),
        defaults={"sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        rules.LLAMA,
        _QWEN,
        plans.qwen,
        defaults=_QWEN_DEFAULTS,
        qkv_bias=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        rules.LLAMA,
        (*_QWEN, "head_dim", "attention_bias"),
        plans.qwen,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        qk_norm="head",
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        rules.LLAMA,
        (*_BLOCK, "head_dim", "attention_bias"),
        defaults={"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
        only=_GEMMA_ONLY,
        norm=NormConfig(scale="unit_offset"),
        scaled_embedding=True,
        activations={"gelu": "gelu_tanh"},  # as the first published configurations say it
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        rules.GEMMA2,
        (
            *_ATTENTION,
            "rms_norm_eps",
            "intermediate_size",
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
            "use_sliding_window": True,  # the class has no such field
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        only=_GEMMA_ONLY,
        norm=NormConfig(scale="unit_offset"),
        norm_position="sandwich",
        scaled_embedding=True,
        activation_key="hidden_activation",
        whole_heads=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        rules.PHI3,
        (*_BLOCK, "sliding_window", "partial_rotary_factor", "original_max_position_embeddings"),
        defaults={"original_max_position_embeddings": 4096},
        rope_types=("default", "longrope"),
        rope_aliases={"su": "longrope", "yarn": "longrope"},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        rules.MIXTRAL,
        (*_BLOCK, *_LOCAL_EXPERTS, "head_dim", "sliding_window"),
        plans.sparse,
        defaults={"rope_theta": 1e6},
        routing="renormalised",
        experts_key="num_local_experts",
    ),
    "phimoe": Family(
        "PhimoeForCausalLM",
        rules.MIXTRAL,
        (
            *_BLOCK,
            *_LOCAL_EXPERTS,
            "sliding_window",
            "attention_bias",
            "lm_head_bias",
            "router_jitter_noise",
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
        rules.OLMOE,
        (*_BLOCK, *_EXPERTS, "attention_bias", "norm_topk_prob"),
        plans.sparse,
        only={"clip_qkv": (None,)},
        qk_norm="full",
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        rules.OLMO2,
        (*_BLOCK, "attention_bias"),
        norm_position="post",
        qk_norm="full",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        rules.LLAMA,
        (
            *_BLOCK,
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
        rules.MAMBA,
        (
            "layer_norm_epsilon",
            "hidden_act",
            "residual_in_fp32",
            *_MAMBA.values(),
        ),
        plans.mamba,
        defaults={"tie_word_embeddings": True},
        only={"hidden_act": ("silu",)},
        ssm_keys=_MAMBA,
        eps_key="layer_norm_epsilon",
        layers="backbone.layers",
        embed="backbone.embeddings",
        final_norm="backbone.norm_f",
    ),
    "jamba": Family(
        "JambaForCausalLM",
        rules.JAMBA,
        (
            *(key for key in _BLOCK if key != "rope_parameters"),
            *_EXPERTS,
            "attn_layer_period",
            "attn_layer_offset",
            "expert_layer_period",
            "expert_layer_offset",
            *_JAMBA.values(),
        ),
        plans.jamba,
        only={"hidden_act": ("silu",)},
        ssm_keys=_JAMBA,
        inner_norms=True,
        final_norm="model.final_layernorm",
    ),
}
