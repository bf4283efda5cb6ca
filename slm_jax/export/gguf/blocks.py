"""How numbers lie in a GGUF file: plain floats, and blocks of 32 that share a scale.

The layouts are those of ggml (`ggml-common.h`, `ggml-quants.c`); the tests hold every byte against
the `gguf` package.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from slm_jax.errors import UserError

_LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class Encoding:
    """One type of tensor.

    Attributes:
        name: as llama.cpp shows it.
        code: in the file.
        block: values that are stored together.
        nbytes: of one block.
        decode: `[n, nbytes]` uint8 to `[n, block]` float32.
        encode: the reverse, from finite values; `None` for a type that is only read.
        largest: magnitude that it can hold.
    """

    name: str
    code: int
    block: int
    nbytes: int
    decode: Callable[[np.ndarray], np.ndarray]
    encode: Callable[[np.ndarray], np.ndarray] | None = None
    largest: float = math.inf

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor whose last dimension is a multiple of `block`; exact at any size."""
        n = 1
        for dim in shape:
            n *= dim
        return n // self.block * self.nbytes


def decode(encoding: Encoding, raw: np.ndarray) -> np.ndarray:
    """`[nbytes of a tensor]` uint8 to its values, flat, float32."""
    return encoding.decode(raw.reshape(-1, encoding.nbytes)).reshape(-1)


def encode(encoding: Encoding, values: np.ndarray, name: str) -> np.ndarray:
    """Values to the bytes of a file.

    Args:
        encoding: one that has `encode`.
        values: `[..., n]` float32, n a multiple of the block.
        name: of the tensor, for errors.

    Returns:
        Flat uint8.

    Raises:
        UserError: for NaN, infinity, and numbers that float16 cannot hold.
    """
    assert encoding.encode is not None
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds NaN or infinity: export an earlier checkpoint")
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest > encoding.largest:
        raise UserError(f"{name} holds {largest:.3g}, more than {encoding.name} can: take f32")
    return encoding.encode(np.ascontiguousarray(values).reshape(-1, encoding.block)).reshape(-1)


def _as_bytes(a: np.ndarray) -> np.ndarray:
    """`[n, k]` of any type to `[n, bytes]` uint8."""
    return np.ascontiguousarray(a).view(np.uint8)


def _halves(raw: np.ndarray) -> np.ndarray:
    """`[n, 2 k]` uint8 to `[n, k]` float32 that were float16."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _decode_bf16(raw: np.ndarray) -> np.ndarray:
    high = np.ascontiguousarray(raw).view("<u2").astype(np.uint32)
    return (high << 16).view(np.float32)


def _encode_bf16(a: np.ndarray) -> np.ndarray:
    bits = a.astype(np.float32).view(np.uint32)
    even = (bits >> 16) & 1  # to nearest, ties to even
    return _as_bytes(((bits + 0x7FFF + even) >> 16).astype("<u2"))


def _decode_q8_0(raw: np.ndarray) -> np.ndarray:
    return _halves(raw[:, :2]) * raw[:, 2:].view(np.int8).astype(np.float32)


def _encode_q8_0(a: np.ndarray) -> np.ndarray:
    """A float16 scale, largest magnitude / 127, and 32 signed bytes, rounded half away from 0."""
    scale = np.max(np.abs(a), axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    inverse[~np.isfinite(inverse)] = 0  # a scale so small that float16 holds it as 0
    scaled = a * inverse
    whole = np.floor(np.abs(scaled))
    whole += np.abs(scaled) - whole >= 0.5
    q = np.copysign(whole, scaled).astype(np.int8)
    return np.concatenate([_as_bytes(scale.astype("<f2")), q.view(np.uint8)], axis=1)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """`[n, 16]` uint8 to `[n, 32]` float32 in 0..15: all low halves, then all high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.float32)


def _decode_q4_0(raw: np.ndarray) -> np.ndarray:
    return _halves(raw[:, :2]) * (_nibbles(raw[:, 2:]) - 8)


def _decode_q4_1(raw: np.ndarray) -> np.ndarray:
    return _halves(raw[:, :2]) * _nibbles(raw[:, 4:]) + _halves(raw[:, 2:4])


F32 = Encoding(
    "F32", 0, 1, 4, lambda raw: np.ascontiguousarray(raw).view("<f4").astype(np.float32),
    lambda a: _as_bytes(a.astype("<f4")),
)  # fmt: skip
F16 = Encoding("F16", 1, 1, 2, _halves, lambda a: _as_bytes(a.astype("<f2")), _LARGEST_F16)
BF16 = Encoding("BF16", 30, 1, 2, _decode_bf16, _encode_bf16)
Q8_0 = Encoding("Q8_0", 8, 32, 34, _decode_q8_0, _encode_q8_0, 127 * _LARGEST_F16)
Q4_0 = Encoding("Q4_0", 2, 32, 18, _decode_q4_0)
Q4_1 = Encoding("Q4_1", 3, 32, 20, _decode_q4_1)

ENCODINGS = {e.code: e for e in (F32, F16, BF16, Q8_0, Q4_0, Q4_1)}
"""The types that are read, by their code. Those with an `encode` are written too."""
