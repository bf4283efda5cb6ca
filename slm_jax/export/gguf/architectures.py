"""Architectures of llama.cpp and the classes of `transformers` that compute the same function."""

from dataclasses import dataclass
from typing import Any

import numpy as np

ARCH_KEY = "general.architecture"
"""Metadata that names the architecture."""

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by which the frequencies of the rotation are divided, `[head_dim / 2]`."""


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
        classes: the `model_type`s whose function it computes.
        adjacent: rope on adjacent pairs.
        keys: of its numbers, without the architecture's name.
        sizes: numbers that a dimension of a tensor repeats: key, tensor, dimension.
    """

    classes: tuple[str, ...]
    adjacent: bool
    keys: tuple[str, ...]
    sizes: tuple[tuple[str, str, int], ...]


_COMMON = (
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_ATTENTION = (
    *_COMMON,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)
_EXPERTS = ("expert_count", "expert_used_count")
_DENSE_SIZES = (("feed_forward_length", "blk.0.ffn_up.weight", 0),)
EXPERT_SIZES = (
    ("feed_forward_length", "blk.0.ffn_up_exps.weight", 1),
    ("expert_count", "blk.0.ffn_up_exps.weight", 0),
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        ("llama", "mistral", "mixtral"), True, (*_ATTENTION, *_EXPERTS), _DENSE_SIZES
    ),
    "qwen2": Architecture(("qwen2",), False, _ATTENTION, _DENSE_SIZES),
    "qwen3": Architecture(("qwen3",), False, _ATTENTION, _DENSE_SIZES),
    "mamba": Architecture(
        ("mamba",),
        False,
        (
            *_COMMON,
            "ssm.conv_kernel",
            "ssm.inner_size",
            "ssm.state_size",
            "ssm.time_step_rank",
            "ssm.dt_b_c_rms",
        ),
        (
            ("ssm.conv_kernel", "blk.0.ssm_conv1d.weight", 1),
            ("ssm.inner_size", "blk.0.ssm_conv1d.weight", 0),
            ("ssm.state_size", "blk.0.ssm_a", 1),
            ("ssm.time_step_rank", "blk.0.ssm_dt.weight", 1),
        ),
    ),
}
"""By llama.cpp's name (`general.architecture`)."""


@dataclass(frozen=True)
class Described:
    """A model in the words of both sides.

    Attributes:
        hf: its config.json.
        arch: llama.cpp's name of its architecture.
        numbers: metadata under `arch.`, without that prefix.
        interleave: heads of each tensor whose rows are stored for rope on adjacent pairs while
            the class has them in halves.
        factors: `ROPE_FACTORS`, or `None`.
    """

    hf: dict[str, Any]
    arch: str
    numbers: dict[str, Any]
    interleave: dict[str, int]
    factors: np.ndarray | None
