"""Where the tensors of a `transformers` class lie in a GGUF file.

The rules of `slm_jax.models.hf` lead from our arrays to the tensors of a class; these lead from
there to llama.cpp's names and layouts. They were read off its loader (`src/models/*.cpp`).
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from slm_jax.errors import UserError
from slm_jax.models.hf import FAMILIES
from slm_jax.models.hf.tensors import TensorMap


class Form(NamedTuple):
    """How a tensor of the class and its part of a GGUF tensor hold the same numbers.

    Attributes:
        write: tensor of the class to that of GGUF.
        read: (tensor of GGUF, shape in the class) to that of the class.
        shape: in the class to that in GGUF.
    """

    write: Callable[[np.ndarray], np.ndarray]
    read: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape


SAME = Form(lambda a: a, lambda a, shape: a)

SQUEEZED = Form(
    lambda a: a.squeeze(1), lambda a, shape: a.reshape(shape), lambda shape: (shape[0], shape[2])
)
"""`[channels, 1, taps]` there, `[channels, taps]` in GGUF: a depthwise Conv1d."""


def _log(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if not (a < 0).all():
        raise UserError("ssm_a is not below 0 everywhere: copy the file again")
    return np.log(-a.astype(np.float64)).astype(np.float32)


DECAY = Form(lambda a: -np.exp(a.astype(np.float64)).astype(np.float32), _log)
"""A_log there, A = -exp(A_log) in GGUF. Both ways are rounded once: not the same bits again."""


def interleaved(heads: int) -> Form:
    """Rows of a query or key projection for rope on adjacent pairs.

    The class rotates the pairs (i, i + d/2) of a head, arch "llama" of llama.cpp (2i, 2i + 1).
    """

    def write(a: np.ndarray) -> np.ndarray:
        return a.reshape(heads, 2, -1, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)

    def read(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return a.reshape(heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)

    return Form(write, read)


class Part(NamedTuple):
    """Where a tensor of the class lies.

    Attributes:
        gguf: name of the tensor in the file.
        entry: which entry of its first dimension (an expert), or `None` for all of it.
        form: of the numbers.
        shape: of the tensor, or of the entry, in the file.
    """

    gguf: str
    entry: int | None
    form: Form
    shape: tuple[int, ...]


_TOP = {"lm_head": "output"}  # and the embedding and final norm, as the class calls them
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
    "norm": "attn_norm",
    "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.x_proj": "ssm_x",
    "mixer.dt_proj": "ssm_dt",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj": "ssm_out",
}
_BARE = ("mixer.A_log", "mixer.D")  # without ".weight"
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


def locate(
    mapping: TensorMap, model_type: str, *, interleave: Mapping[str, int]
) -> dict[str, Part]:
    """The place of every tensor of a class.

    Args:
        mapping: the model's tensors under the names of the class.
        model_type: the class; one of `architectures.ARCHITECTURES`.
        interleave: heads of the GGUF tensors that are stored for rope on adjacent pairs.

    Returns:
        By the name in the class, in the model's order.
    """
    family = FAMILIES[model_type]
    top = {**_TOP, family.embed: "token_embd", family.final_norm: "output_norm"}
    out = {}
    for name in mapping.shapes:
        prefix, entry, inner = "", None, name
        if name.startswith(f"{family.layers}."):
            layer, _, inner = name.removeprefix(f"{family.layers}.").partition(".")
            prefix = f"blk.{layer}."
        if match := _EXPERT.fullmatch(inner):
            entry, inner = int(match[2]), f"{match[1]}.{match[3]}"
        stem, _, kind = (inner, "", "") if inner in _BARE else inner.rpartition(".")
        short = (_LAYER if prefix else top)[stem]
        form = SAME
        if short in interleave:
            form = interleaved(interleave[short])
        elif short == "ssm_conv1d" and kind == "weight":
            form = SQUEEZED
        elif short == "ssm_a":
            form = DECAY
        gguf = f"{prefix}{short}.{kind}".removesuffix(".")
        out[name] = Part(gguf, entry, form, form.shape(mapping.shapes[name]))
    return out


def sources(parts: Mapping[str, Part]) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Shape of every GGUF tensor, and the tensors of the class that make it up in this order."""
    names: dict[str, list[str]] = {}
    for name, part in parts.items():
        names.setdefault(part.gguf, []).append(name)
    out = {}
    for gguf, of_class in names.items():
        first = parts[of_class[0]]
        shape = first.shape if first.entry is None else (len(of_class), *first.shape)
        out[gguf] = (shape, of_class)
    return out
