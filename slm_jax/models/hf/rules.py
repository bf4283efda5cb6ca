"""Which of our arrays are which tensors of a Hugging Face file, and the groups classes share."""

from typing import NamedTuple

from slm_jax.models.hf.layouts import CONV, MATRIX, SAME, VECTOR, Layout
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.ssm import MambaConfig


class Rule(NamedTuple):
    """Which of our arrays are which tensor of the file.

    Attributes:
        hf: name of the tensor; for a layer without the layer's prefix. `{expert}` stands for each
            expert in turn, whose matrices are stacked on our side.
        ours: paths of our arrays in the layer, or in the model. Several are laid below each other
            in the file (fused projections). A rule is left out where the model has no such arrays.
        layout: of every part.
        when: holds only in layers with this mixer or channel mixer; `None` in all.
    """

    hf: str
    ours: tuple[str, ...]
    layout: Layout = SAME
    when: type | None = None

    def holds(self, layer: LayerConfig) -> bool:
        """Whether the rule is one of this layer's."""
        return self.when is None or self.when in (type(layer.mixer), type(layer.channel))


Rules = tuple[Rule, ...]


def linear(hf: str, *ours: str) -> Rules:
    """Weight and bias of one torch Linear that holds these `Linear`s of ours."""
    return (
        Rule(f"{hf}.weight", tuple(f"{o}.w" for o in ours), MATRIX),
        Rule(f"{hf}.bias", tuple(f"{o}.b" for o in ours), VECTOR),
    )


def norm(hf: str, ours: str) -> Rules:
    """Weight and bias of one norm."""
    return (
        Rule(f"{hf}.weight", (f"{ours}.scale",), VECTOR),
        Rule(f"{hf}.bias", (f"{ours}.bias",), VECTOR),
    )


def only(kind: type, *rules: Rule) -> Rules:
    """The same rules for layers with this mixer or channel mixer."""
    return tuple(rule._replace(when=kind) for rule in rules)


def mlp(hf: str) -> Rules:
    """The three matrices of a gated MLP."""
    return only(
        MLPConfig,
        *linear(f"{hf}.gate_proj", "channel.gate"),
        *linear(f"{hf}.up_proj", "channel.up"),
        *linear(f"{hf}.down_proj", "channel.down"),
    )


def moe(router: str, experts: str, gate: str, up: str, down: str) -> Rules:
    """The router and the three matrices of every expert."""
    return only(
        MoEConfig,
        *linear(router, "channel.router"),
        *linear(f"{experts}.{{expert}}.{gate}", "channel.gate"),
        *linear(f"{experts}.{{expert}}.{up}", "channel.up"),
        *linear(f"{experts}.{{expert}}.{down}", "channel.down"),
    )


def mamba(hf: str) -> Rules:
    """The selective state-space mixer, with Jamba's norms where the model has them."""
    return only(
        MambaConfig,
        *linear(f"{hf}.in_proj", "mixer.in_x", "mixer.in_z"),
        Rule(f"{hf}.conv1d.weight", ("mixer.conv_w",), CONV),
        Rule(f"{hf}.conv1d.bias", ("mixer.conv_b",)),
        *linear(f"{hf}.x_proj", "mixer.select"),
        *linear(f"{hf}.dt_proj", "mixer.dt"),
        Rule(f"{hf}.dt_proj.bias", ("mixer.dt_bias",)),
        Rule(f"{hf}.A_log", ("mixer.a_log",)),
        Rule(f"{hf}.D", ("mixer.d",)),
        *linear(f"{hf}.out_proj", "mixer.out"),
        *norm(f"{hf}.dt_layernorm", "mixer.norms.0"),
        *norm(f"{hf}.b_layernorm", "mixer.norms.1"),
        *norm(f"{hf}.c_layernorm", "mixer.norms.2"),
    )


ATTENTION = only(
    AttentionConfig,
    *linear("self_attn.q_proj", "mixer.q"),
    *linear("self_attn.k_proj", "mixer.k"),
    *linear("self_attn.v_proj", "mixer.v"),
    *linear("self_attn.o_proj", "mixer.out"),
    *norm("self_attn.q_norm", "mixer.q_norm"),
    *norm("self_attn.k_norm", "mixer.k_norm"),
)
PRE_NORMS = (
    *norm("input_layernorm", "mixer_norm"),
    *norm("post_attention_layernorm", "channel_norm"),
)
LLAMA = (*ATTENTION, *mlp("mlp"), *PRE_NORMS)
MIXTRAL = (
    *ATTENTION,
    *moe("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
    *PRE_NORMS,
)
OLMOE = (
    *ATTENTION,
    *moe("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
    *PRE_NORMS,
)
OLMO2 = (
    *ATTENTION,
    *mlp("mlp"),
    *norm("post_attention_layernorm", "mixer_post_norm"),
    *norm("post_feedforward_layernorm", "channel_post_norm"),
)
GEMMA2 = (
    *OLMO2,
    *norm("input_layernorm", "mixer_norm"),
    *norm("pre_feedforward_layernorm", "channel_norm"),
)
PHI3 = (
    *linear("self_attn.qkv_proj", "mixer.q", "mixer.k", "mixer.v"),
    *linear("self_attn.o_proj", "mixer.out"),
    *linear("mlp.gate_up_proj", "channel.gate", "channel.up"),
    *linear("mlp.down_proj", "channel.down"),
    *PRE_NORMS,
)
MAMBA = (*mamba("mixer"), *norm("norm", "mixer_norm"))
JAMBA = (
    *ATTENTION,
    *mamba("mamba"),
    *mlp("feed_forward"),
    *moe("feed_forward.router", "feed_forward.experts", "gate_proj", "up_proj", "down_proj"),
    *norm("input_layernorm", "mixer_norm"),
    *norm("pre_ff_layernorm", "channel_norm"),
)
