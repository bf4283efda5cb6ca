"""What an `LMConfig` says under the names of config.json, and how two of them differ."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from slm_jax.models.hf.rope import rope_to_hf
from slm_jax.models.lm import LMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.rope import LongRopeScaling
from slm_jax.nn.ssm import MambaConfig


def values(config: LMConfig, activations: Mapping[str, str]) -> dict[str, Any]:
    """Every field that some class may want, read off the first layer that has it.

    Args:
        config: the model.
        activations: our names to those of `transformers`.
    """
    layers = [config.layer(i) for i in range(config.n_layers)]
    attention = [m for x in layers if isinstance(m := x.mixer, AttentionConfig)]
    mamba = [m for x in layers if isinstance(m := x.mixer, MambaConfig)]
    channels = [c for x in layers if isinstance(c := x.channel, MLPConfig | MoEConfig)]
    experts = [c for c in channels if isinstance(c, MoEConfig)]
    out: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm.eps,
        "layer_norm_epsilon": config.norm.eps,
        "final_logit_softcapping": config.final_softcap,
        "lm_head_bias": config.head_bias,
        "residual_in_fp32": config.residual_dtype == "float32",
        "num_experts": 1,
        "num_experts_per_tok": 1,
    }
    if attention:
        a = attention[0]
        windows = [x.mixer.window for x in layers if isinstance(x.mixer, AttentionConfig)]
        window = next((w for w in windows if w is not None), None)
        scale = a.head_dim**-0.5 if a.scale is None else a.scale
        out |= {
            "num_attention_heads": a.n_heads,
            "num_key_value_heads": a.n_kv_heads,
            "head_dim": a.head_dim,
            "attention_bias": a.out_bias,
            "sliding_window": window,
            "use_sliding_window": window is not None,
            "layer_types": [
                "full_attention" if w is None else "sliding_attention" for w in windows
            ],
            "no_rope_layers": [int(m.rope is not None) for m in attention],
            "attn_logit_softcapping": a.softcap,
            "query_pre_attn_scalar": max(1, round(scale**-2)),
        }
        if ropes := [m.rope for m in attention if m.rope is not None]:
            out["rope_parameters"] = rope_to_hf(ropes[0])
            if isinstance(ropes[0].scaling, LongRopeScaling):
                out["original_max_position_embeddings"] = ropes[0].scaling.original_length
    if channels:
        c = channels[0]
        name = activations.get(c.activation)
        out |= {
            "intermediate_size": c.d_ff,
            "hidden_act": name,
            "hidden_activation": name,
            "mlp_bias": getattr(c, "bias", False),
        }
    if experts:
        e = experts[0]
        out |= {
            "num_experts": e.n_experts,
            "num_local_experts": e.n_experts,
            "num_experts_per_tok": e.top_k,
            "norm_topk_prob": e.routing == "renormalised",
            "router_jitter_noise": e.jitter_eps,
        }
    if mamba:
        m = mamba[0]
        out |= {
            "d_state": m.d_state,
            "d_conv": m.d_conv,
            "expand": m.d_inner // config.d_model,
            "dt_rank": m.resolved_dt_rank(config.d_model),
            "conv_bias": m.conv_bias,
            "proj_bias": m.proj_bias,
        }
        out.setdefault("hidden_act", "silu")
    out |= _every("attn", [isinstance(x.mixer, AttentionConfig) for x in layers])
    out |= _every("expert", [isinstance(x.channel, MoEConfig) for x in layers])
    return out


def _every(kind: str, where: list[bool]) -> dict[str, int]:
    """Period and offset of the layers where `where` is true; a guess if they have none."""
    at = [i for i, here in enumerate(where) if here] or [len(where)]
    period = at[1] - at[0] if len(at) > 1 else len(where) + (at[0] == len(where))
    return {f"{kind}_layer_period": period, f"{kind}_layer_offset": at[0]}


# What may differ between two models that compute the same logits.
_IGNORED = ("dtype", "remat", "scan_unroll", "dispatch", "capacity_factor")


def differences(ours: LMConfig, theirs: LMConfig) -> list[str]:
    """Where two models differ in what they compute.

    As `layers.0.mixer.window=None instead of 8`, the value of `theirs` first; empty if both compute
    the same function.
    """
    a, b = _flat(ours), _flat(theirs)
    missing = object()
    return [
        f"{key}={b.get(key)!r} instead of {a.get(key)!r}"
        for key in dict.fromkeys([*a, *b])
        if a.get(key, missing) != b.get(key, missing)
    ]


def _flat(config: LMConfig) -> dict[str, Any]:
    """Every setting by its path, layer by layer, in one form where there are several."""
    out: dict[str, Any] = {}

    def add(path: str, value: Any) -> None:
        if not dataclasses.is_dataclass(value):
            out[path] = value
            return
        out[path] = type(value).__name__
        for field in dataclasses.fields(value):
            if field.name not in _IGNORED:
                add(f"{path}.{field.name}", getattr(value, field.name))

    for field in dataclasses.fields(config):
        if field.name not in ("pattern", *_IGNORED):
            add(field.name, getattr(config, field.name))
    for i in range(config.n_layers):
        layer, path = config.layer(i), f"layers.{i}"
        add(path, layer)
        if isinstance(layer.mixer, AttentionConfig):
            out.pop("residual_dtype", None)  # only Mamba's class has a word for it
            if layer.mixer.scale is None:
                out[f"{path}.mixer.scale"] = layer.mixer.head_dim**-0.5
        if isinstance(layer.mixer, MambaConfig):
            out[f"{path}.mixer.dt_rank"] = layer.mixer.resolved_dt_rank(config.d_model)
        if isinstance(layer.channel, MoEConfig) and layer.channel.routing != "sparsemixer":
            del out[f"{path}.channel.jitter_eps"]
    return out
