"""What a GGUF file says of a model: `LMConfig` to llama.cpp's numbers.

What has no word in the file, or what llama.cpp would compute otherwise, is refused.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from slm_jax.errors import UserError
from slm_jax.export.gguf.architectures import ARCHITECTURES, Described
from slm_jax.models.hf import config_to_hf
from slm_jax.models.lm import LMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    llama3_frequencies,
)


def describe(config: LMConfig) -> Described:
    """What a file says of a model.

    Raises:
        UserError: if no architecture of llama.cpp that we write computes this model.
    """
    rope = _rope_of(config)
    adjacent = rope is not None and rope.layout == "adjacent"
    hf = config_to_hf(_with_rope(config, replace(rope, layout="half")) if rope else config)
    kind = hf["model_type"]
    arch = next((name for name, a in ARCHITECTURES.items() if kind in a.classes), None)
    if arch is None:
        known = ", ".join(c for a in ARCHITECTURES.values() for c in a.classes)
        raise UserError(f"model_type={kind} has no GGUF form here: only {known}; export it as hf")
    if adjacent and not ARCHITECTURES[arch].adjacent:
        raise UserError(f"rope layout='adjacent' of model_type={kind}: llama.cpp knows 'half' only")
    if window := _window(config):
        raise UserError(f"window={window}: architecture {arch} of llama.cpp has no sliding window")
    numbers: dict[str, Any] = {
        "vocab_size": np.uint32(config.vocab_size),
        "context_length": np.uint32(config.max_seq_len),
        "embedding_length": np.uint32(config.d_model),
        "block_count": np.uint32(config.n_layers),
        "attention.layer_norm_rms_epsilon": np.float32(config.norm.eps),
    }
    if arch == "mamba":
        return Described(hf, arch, {**numbers, **_mamba_numbers(config, hf)}, {}, None)
    if hf["hidden_act"] != "silu":
        raise UserError(f"activation={hf['hidden_act']}: {arch} of llama.cpp has silu only")
    if arch == "qwen3" and hf["attention_bias"]:
        raise UserError("qkv_bias=True with qk_norm: qwen3 of llama.cpp has no biases")
    heads, kv_heads = hf["num_attention_heads"], hf["num_key_value_heads"]
    head_dim = hf.get("head_dim") or config.d_model // heads
    assert rope is not None, "no class of these has layers without rope"
    numbers |= {
        "feed_forward_length": np.uint32(hf["intermediate_size"]),
        "attention.head_count": np.uint32(heads),
        "attention.head_count_kv": np.uint32(kv_heads),
        "attention.key_length": np.uint32(head_dim),
        "attention.value_length": np.uint32(head_dim),
        "rope.dimension_count": np.uint32(head_dim),
        "rope.freq_base": np.float32(rope.theta),
    }
    if kind == "mixtral":
        numbers["expert_count"] = np.uint32(hf["num_local_experts"])
        numbers["expert_used_count"] = np.uint32(hf["num_experts_per_tok"])
    if hf["rope_parameters"]["rope_type"] == "linear":
        numbers["rope.scaling.type"] = "linear"
        numbers["rope.scaling.factor"] = np.float32(hf["rope_parameters"]["factor"])
    interleave = {}
    if ARCHITECTURES[arch].adjacent and not adjacent:
        interleave = {"attn_q": heads, "attn_k": kv_heads}
    return Described(hf, arch, numbers, interleave, _factors(rope, head_dim))


def _rope_of(config: LMConfig) -> RopeConfig | None:
    return next((m.rope for m in _attention(config) if m.rope is not None), None)


def _window(config: LMConfig) -> int | None:
    return next((m.window for m in _attention(config) if m.window is not None), None)


def _attention(config: LMConfig) -> list[AttentionConfig]:
    return [x.mixer for x in config.pattern if isinstance(x.mixer, AttentionConfig)]


def _with_rope(config: LMConfig, rope: RopeConfig) -> LMConfig:
    """The same model with `rope` where it had the first one it has."""
    old = _rope_of(config)
    pattern = tuple(
        replace(layer, mixer=replace(layer.mixer, rope=rope))
        if isinstance(layer.mixer, AttentionConfig) and layer.mixer.rope == old
        else layer
        for layer in config.pattern
    )
    return replace(config, pattern=pattern)


def _factors(rope: RopeConfig, head_dim: int) -> np.ndarray | None:
    """What the frequencies are divided by, where llama.cpp takes them from a tensor."""
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    match rope.scaling:
        case Llama3Scaling() as scaling:
            return (frequencies / llama3_frequencies(scaling, frequencies)).astype(np.float32)
        case LongRopeScaling(short, long, _, factor) if short == long and factor == 1.0:
            return np.array(short, np.float32)
        case None | LinearScaling():
            return None
        case scaling:
            raise UserError(
                f"rope scaling {type(scaling).__name__} has no GGUF form here: only none, linear "
                "and llama3; export it as hf"
            )


def _mamba_numbers(config: LMConfig, hf: Mapping[str, Any]) -> dict[str, Any]:
    inner = hf["expand"] * config.d_model
    if inner != 2 * config.d_model:
        raise UserError(f"d_inner={inner}: llama.cpp runs Mamba with d_inner=2 x d_model only")
    if hf["use_bias"] or not hf["use_conv_bias"]:
        raise UserError(
            f"proj_bias={hf['use_bias']}, conv_bias={hf['use_conv_bias']}: llama.cpp runs Mamba "
            "with proj_bias=False and conv_bias=True only"
        )
    return {
        "feed_forward_length": np.uint32(0),
        "attention.head_count": np.uint32(0),
        "ssm.conv_kernel": np.uint32(hf["conv_kernel"]),
        "ssm.inner_size": np.uint32(inner),
        "ssm.state_size": np.uint32(hf["state_size"]),
        "ssm.time_step_rank": np.uint32(hf["time_step_rank"]),
        "ssm.dt_b_c_rms": np.bool_(False),
    }
