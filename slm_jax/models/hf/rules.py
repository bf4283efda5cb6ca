"""Which of our arrays are which tensors of a Hugging Face file, and the groups classes share."""

from typing import NamedTuple

from slm_jax.models.hf.layouts import CONV, MATRIX, SAME, VECTOR, Layout


class Rule(NamedTuple):
    """Which of our arrays are which tensor of the file.

    Attributes:
        hf: name of the tensor; for a layer without the layer's prefix. `{expert}` stands for each
            expert in turn, whose matrices are stacked on our side.
        ours: paths of our arrays in the layer, or in the model. Several are laid below each other
            in the file (fused projections). A rule is left out where the model has no such arrays.
        layout: of every part.
    """

    hf: str
    ours: tuple[str, ...]
    layout: Layout = SAME


def linear(hf: str, *ours: str) -> tuple[Rule, Rule]:
    """Weight and bias of one torch Linear that holds these `Linear`s of ours."""
    return (
        Rule(f"{hf}.weight", tuple(f"{o}.w" for o in ours), MATRIX),
        Rule(f"{hf}.bias", tuple(f"{o}.b" for o in ours), VECTOR),
    )


def norm(hf: str, ours: str) -> tuple[Rule, Rule]:
    """Weight and bias of one norm."""
    return (
        Rule(f"{hf}.weight", (f"{ours}.scale",), VECTOR),
        Rule(f"{hf}.bias", (f"{ours}.bias",), VECTOR),
    )


def gated(hf: str) -> tuple[Rule, ...]:
    """Three matrices: of an MLP or, with `{expert}` in `hf`, of every expert."""
    return (
        *linear(f"{hf}.gate_proj", "channel.gate"),
        *linear(f"{hf}.up_proj", "channel.up"),
        *linear(f"{hf}.down_proj", "channel.down"),
    )


def ssm(hf: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{hf}.in_proj", "mixer.in_x", "mixer.in_z"),
        Rule(f"{hf}.conv1d.weight", ("mixer.conv_w",), CONV),
        Rule(f"{hf}.conv1d.bias", ("mixer.conv_b",)),
        *linear(f"{hf}.x_proj", "mixer.select"),
        *linear(f"{hf}.dt_proj", "mixer.dt"),
        Rule(f"{hf}.dt_proj.bias", ("mixer.dt_bias",)),
        Rule(f"{hf}.A_log", ("mixer.a_log",)),
        Rule(f"{hf}.D", ("mixer.d",)),
        *linear(f"{hf}.out_proj", "mixer.out"),
    )


ATTENTION = (
    *linear("self_attn.q_proj", "mixer.q"),
    *linear("self_attn.k_proj", "mixer.k"),
    *linear("self_attn.v_proj", "mixer.v"),
    *linear("self_attn.o_proj", "mixer.out"),
)
QK_NORM = (
    *norm("self_attn.q_norm", "mixer.q_norm"),
    *norm("self_attn.k_norm", "mixer.k_norm"),
)
PRE_NORMS = (
    *norm("input_layernorm", "mixer_norm"),
    *norm("post_attention_layernorm", "channel_norm"),
)
LLAMA = (*ATTENTION, *gated("mlp"), *PRE_NORMS)
MIXTRAL = (
    *ATTENTION,
    *linear("block_sparse_moe.gate", "channel.router"),
    *linear("block_sparse_moe.experts.{expert}.w1", "channel.gate"),
    *linear("block_sparse_moe.experts.{expert}.w3", "channel.up"),
    *linear("block_sparse_moe.experts.{expert}.w2", "channel.down"),
    *PRE_NORMS,
)
