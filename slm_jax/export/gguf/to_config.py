"""The model that a GGUF file describes, as the config.json of a `transformers` class.

Whoever made the file, nothing in it is believed: numbers are held against the shapes of the
tensors, and a setting that our blocks do not follow is refused, not ignored.
"""

import math
from typing import Any, NoReturn

import numpy as np

from slm_jax.errors import UserError
from slm_jax.export.gguf.architectures import (
    ARCH_KEY,
    ARCHITECTURES,
    EXPERT_SIZES,
    ROPE_FACTORS,
    Described,
)
from slm_jax.export.gguf.read import GGUF


def described_by(file: GGUF) -> Described:
    """What a file says of its model.

    Sizes are held against the tensors first, so that no number makes us build more than is there.

    Raises:
        UserError: for an architecture or a setting that our blocks do not follow.
    """
    f = _Numbers(file)
    arch = f.arch
    width, vocab = f.whole("embedding_length"), f.whole("vocab_size", f.dim("token_embd.weight", 0))
    layers = f.whole("block_count")
    if layers > len(file.tensors):
        f.refuse("block_count", layers, f"the file has {len(file.tensors)} tensors")
    for value, key, axis in ((vocab, "vocab_size", 0), (width, "embedding_length", 1)):
        if value != f.dim("token_embd.weight", axis):
            f.refuse(key, value, f"token_embd.weight has {f.dim('token_embd.weight', axis)}")
    sizes = ARCHITECTURES[arch].sizes
    sparse = "expert_count" in f and f.whole("expert_count", 0, least=0) > 0
    for key, tensor, axis in EXPERT_SIZES if sparse else sizes:
        if f.whole(key) != f.dim(tensor, axis):
            f.refuse(key, f.whole(key), f"{tensor} has {f.dim(tensor, axis)}")
    hf: dict[str, Any] = {
        "model_type": "mixtral" if sparse else arch,
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "max_position_embeddings": f.whole("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    eps = f.real("attention.layer_norm_rms_epsilon")
    if arch == "mamba":
        if f.flag("ssm.dt_b_c_rms"):
            f.refuse("ssm.dt_b_c_rms", True, "only Mamba-1 without norms on dt, B and C is read")
        inner = f.whole("ssm.inner_size")
        if inner % width:
            f.refuse("ssm.inner_size", inner, f"it must be a multiple of {width}")
        hf |= {
            "layer_norm_epsilon": eps,
            "residual_in_fp32": True,
            "expand": inner // width,
            "state_size": f.whole("ssm.state_size"),
            "conv_kernel": f.whole("ssm.conv_kernel"),
            "time_step_rank": f.whole("ssm.time_step_rank"),
            "use_conv_bias": True,
            "use_bias": False,
        }
        return Described(hf, arch, {}, {}, None)
    heads = f.whole("attention.head_count")
    kv_heads = f.whole("attention.head_count_kv", heads)
    head_dim = f.whole("attention.key_length", max(1, width // heads))
    rows = f.dim("blk.0.attn_q.weight", 0)
    if heads * head_dim != rows or kv_heads > heads:
        f.refuse("attention.head_count", heads, f"blk.0.attn_q.weight has {rows} rows")
    for key in ("attention.value_length", "rope.dimension_count"):
        if f.whole(key, head_dim) != head_dim:
            f.refuse(key, f.whole(key), f"only the width of a head, {head_dim}, is read")
    hf |= {
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": f.whole("feed_forward_length"),
        "rope_parameters": _rope_parameters(f, head_dim),
    }
    if arch == "llama" and not sparse:
        hf["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        hf["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    if sparse:
        hf["num_local_experts"] = f.whole("expert_count")
        hf["num_experts_per_tok"] = f.whole("expert_used_count")
    adjacent = ARCHITECTURES[arch].adjacent
    return Described(hf, arch, {}, {"attn_q": heads, "attn_k": kv_heads} if adjacent else {}, None)


def _rope_parameters(f: "_Numbers", head_dim: int) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_theta": f.real("rope.freq_base", 10_000.0), "rope_type": "default"}
    kind = f.text("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        f.refuse("rope.scaling.type", kind, "only none, linear and rope_freqs.weight are read")
    if kind == "linear":
        out |= {"rope_type": "linear", "factor": f.real("rope.scaling.factor")}
    stored = f.file.tensors.get(ROPE_FACTORS)
    if stored is not None:
        factors = stored.values()
        if kind != "none" or factors.shape != (head_dim // 2,) or not (factors > 0).all():
            f.refuse("rope.scaling.type", kind, f"{ROPE_FACTORS} does not go with it")
        # LongRoPE with one set of factors at every length: the same function.
        numbers = [_shortest(x) for x in factors]
        out |= {
            "rope_type": "longrope",
            "short_factor": numbers,
            "long_factor": numbers,
            "attention_factor": 1.0,
            "original_max_position_embeddings": f.whole("context_length"),
        }
    return out


def _shortest(value: Any) -> float:
    """A float32 as the shortest decimal that names it: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


class _Numbers:
    """The metadata of one architecture, checked as it is read."""

    def __init__(self, file: GGUF) -> None:
        self.file = file
        arch = file.metadata.get(ARCH_KEY)
        if arch not in ARCHITECTURES:
            raise UserError(
                f"{file.path}: {ARCH_KEY}={str(arch)[:60]!r} is not read: only "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.arch: str = arch
        known = {f"{arch}.{key}" for key in ARCHITECTURES[arch].keys}
        if unknown := [k for k in file.metadata if k.startswith(f"{arch}.") and k not in known]:
            raise UserError(
                f"{file.path}: {unknown[0][:80]} is a setting that our models do not have: "
                f"only plain {arch} models are read"
            )

    def __contains__(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self.file.metadata

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self._get(key, default)
        if not isinstance(value, int | np.integer) or value < least:
            self.refuse(key, value, f"it must be a whole number of at least {least}")
        return int(value)

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._get(key, default)
        if not isinstance(value, float | np.floating) or not math.isfinite(value) or value <= 0:
            self.refuse(key, value, "it must be a number above 0")
        return _shortest(value) if isinstance(value, np.float32) else float(value)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            self.refuse(key, value, "it must be text")
        return value

    def flag(self, key: str) -> bool:
        """A truth value, false if it is not there."""
        return bool(self._get(key, False))

    def dim(self, tensor: str, axis: int) -> int:
        """A dimension of a tensor that must be there."""
        shape = self.file.tensors[tensor].shape if tensor in self.file.tensors else ()
        if len(shape) <= axis:
            raise UserError(
                f"{self.file.path} has no {tensor} of a {self.arch} model: copy it again"
            )
        return shape[axis]

    def refuse(self, key: str, value: Any, why: str) -> NoReturn:
        """Raises the UserError for a value."""
        raise UserError(f"{self.file.path}: {self.arch}.{key}={str(value)[:60]}: {why}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            raise UserError(f"{self.file.path} has no {self.arch}.{key}: copy it again")
        return value
