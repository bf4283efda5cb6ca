"""A second opinion: a Llama's forward pass in NumPy, its weights read straight from a GGUF file.

Nothing of the project is used, neither its reader of GGUF nor its layers. Sources: the GGUF
specification of ggml (docs/gguf.md), the block layouts of ggml-common.h, arXiv 2302.13971.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

_SCALARS = "BbHhIif?"  # types 0 to 7
_WIDE = {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class File:
    """Metadata and dequantised tensors of a file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.at = 4
        assert self.data[:4] == b"GGUF"
        _, n_tensors, n_fields = self._number("I"), self._number("Q"), self._number("Q")
        self.fields = {self._string(): self._value(self._number("I")) for _ in range(n_fields)}
        self.infos = {}
        for _ in range(n_tensors):
            name = self._string()
            shape = [self._number("Q") for _ in range(self._number("I"))][::-1]
            self.infos[name] = (shape, self._number("I"), self._number("Q"))
        align = self.fields.get("general.alignment", 32)
        self.start = -(-self.at // align) * align

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        n = self._number("Q")
        self.at += n
        return self.data[self.at - n : self.at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, n = self._number("I"), self._number("Q")
            return [self._value(inner) for _ in range(n)]
        return self._number(_WIDE[kind] if kind in _WIDE else _SCALARS[kind])

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as float32, rows first."""
        shape, kind, offset = self.infos[name]
        n, at = int(np.prod(shape)), self.start + offset
        if kind == 0:  # F32
            return np.frombuffer(self.data, "<f4", n, at).reshape(shape)
        size = {3: 20, 8: 34}[kind]  # Q4_1, Q8_0: 32 weights in so many bytes
        blocks = np.frombuffer(self.data, np.uint8, n // 32 * size, at).reshape(-1, size)
        scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
        if kind == 8:
            return (scale * blocks[:, 2:].view(np.int8)).reshape(shape)
        least = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
        codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        return (scale * codes + least).reshape(shape)


class Llama:
    """The model of a file."""

    def __init__(self, path: Path) -> None:
        file = File(path)
        f = {k.removeprefix("llama."): v for k, v in file.fields.items()}
        self.layers, self.heads = f["block_count"], f["attention.head_count"]
        self.kv_heads, self.base = f["attention.head_count_kv"], f["rope.freq_base"]
        self.eps = f["attention.layer_norm_rms_epsilon"]
        self.w = {name: file.tensor(name) for name in file.infos}

    def nats(self, tokens: np.ndarray) -> np.ndarray:
        """-log p of every token but the first, `[n]` to `[n - 1]`."""
        x = self.w["token_embd.weight"][tokens[:-1]]
        for i in range(self.layers):
            x = x + self._attention(i, self._norm(x, f"blk.{i}.attn_norm"))
            h = self._norm(x, f"blk.{i}.ffn_norm")
            gate = h @ self.w[f"blk.{i}.ffn_gate.weight"].T
            h = gate / (1 + np.exp(-gate)) * (h @ self.w[f"blk.{i}.ffn_up.weight"].T)
            x = x + h @ self.w[f"blk.{i}.ffn_down.weight"].T
        head = self.w.get("output.weight", self.w["token_embd.weight"])
        logits = self._norm(x, "output_norm") @ head.T
        logits -= logits.max(-1, keepdims=True)
        picked = logits[np.arange(len(logits)), tokens[1:]]
        return np.log(np.exp(logits).sum(-1, dtype=np.float64)) - picked

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * self.w[f"{name}.weight"]

    def _attention(self, i: int, x: np.ndarray) -> np.ndarray:
        q, k, v = (x @ self.w[f"blk.{i}.attn_{name}.weight"].T for name in "qkv")
        n, group = len(x), self.heads // self.kv_heads
        q = self._rotated(q.reshape(n, self.heads, -1))
        k = self._rotated(k.reshape(n, self.kv_heads, -1)).repeat(group, axis=1)
        v = v.reshape(n, self.kv_heads, -1).repeat(group, axis=1)
        scores = np.einsum("shd,thd->hst", q, k, optimize=True) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        y = np.einsum("hst,thd->shd", scores.astype(np.float32), v, optimize=True)
        return y.reshape(n, -1) @ self.w[f"blk.{i}.attn_output.weight"].T

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        """Rotary positions on neighbouring pairs, as llama.cpp stores this family."""
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None, None] * self.base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = x[..., ::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
