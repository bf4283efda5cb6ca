"""config.json to `LMConfig` and back.

Back and forth is held together by one rule: a class is chosen for an `LMConfig` only if the
config.json written for it reads back as the same model. So nothing is lost without a word.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from slm_jax.errors import UserError
from slm_jax.models.hf import rope
from slm_jax.models.hf.families import FAMILIES, Family
from slm_jax.models.hf.fields import Fields
from slm_jax.models.hf.plans import LayerPlan
from slm_jax.models.hf.values import differences, values
from slm_jax.models.lm import LMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import ChannelConfig, LayerConfig, MixerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.ssm import MambaConfig

COMMON_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
)
"""Fields that are read and written for every class."""

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
"""Names of `transformers` and ours."""


def family_of(model_type: Any) -> Family:
    """The entry of a `model_type`; UserError if there is none."""
    if model_type not in FAMILIES:
        raise UserError(f"model_type={model_type!r} is unknown: choose from {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def config_from_hf(hf: Mapping[str, Any]) -> LMConfig:
    """The model that a config.json describes.

    Fields that the class does not read are ignored, as `transformers` does; so are those that
    matter in training only (dropout, router losses). Weights are float32 masters and the compute
    dtype is float32 whatever `dtype` says.

    Args:
        hf: the parsed config.json.

    Raises:
        UserError: for an unknown `model_type`, a missing field, or a value that our blocks do not
            follow; the message names it.
    """
    family = family_of(hf.get("model_type"))
    keys = (*COMMON_KEYS, *rope.KEYS, "head_dim", *family.keys)
    given = {key: hf[key] for key in keys if key in hf}
    f = Fields(hf["model_type"], given, family.defaults)
    for key, allowed in {"quantization_config": (None,), **family.only}.items():
        if key in hf and hf[key] not in allowed:
            f.refuse(key, hf[key], allowed)

    width = f.integer("hidden_size")
    norm = dataclasses.replace(family.norm, eps=f[family.eps_key])
    plans = family.plan(f)
    kinds = {plan: _layer(family, f, plan) for plan in dict.fromkeys(plans)}
    layers = [kinds[plan] for plan in plans]
    tied = bool(f["tie_word_embeddings"])
    return LMConfig(
        vocab_size=f.integer("vocab_size"),
        d_model=width,
        n_layers=len(layers),
        pattern=_period(layers),
        norm=norm,
        tie_embeddings=tied,
        head_bias=bool(f["lm_head_bias"]),
        embedding_scale=width**0.5 if family.scaled_embedding else None,
        final_softcap=f["final_logit_softcapping"],
        max_seq_len=f.integer("max_position_embeddings"),
        residual_dtype="float32" if f["residual_in_fp32"] else None,
        init_std=f["initializer_range"],
    )


def _period(layers: list[LayerConfig]) -> tuple[LayerConfig, ...]:
    """The shortest pattern that repeats to `layers`; its last repetition may be cut off."""
    n = len(layers)
    period = next(p for p in range(1, n + 1) if all(layers[i] == layers[i % p] for i in range(n)))
    return tuple(layers[:period])


def _layer(family: Family, f: Fields, plan: LayerPlan) -> LayerConfig:
    mixer: MixerConfig = _attention(family, f, plan) if plan.attention else _mamba(family, f)
    return LayerConfig(mixer, _channel(family, f, plan), family.norm_position)


def _attention(family: Family, f: Fields, plan: LayerPlan) -> AttentionConfig:
    heads = f.integer("num_attention_heads")
    head_dim = f["head_dim"] or f.integer("hidden_size") // heads
    scalar, bias = f["query_pre_attn_scalar"], bool(f["attention_bias"])
    return AttentionConfig(
        n_heads=heads,
        n_kv_heads=f["num_key_value_heads"] or heads,
        head_dim=head_dim,
        rope=rope.rope_from_hf(
            f,
            family.rope_types,
            family.rope_aliases,
            partial="partial_rotary_factor" in family.keys,
        )
        if plan.rope
        else None,
        window=plan.window,
        softcap=f["attn_logit_softcapping"],
        scale=None if scalar in (None, head_dim) else scalar**-0.5,
        qk_norm=family.qk_norm,
        qkv_bias=bias or family.qkv_bias,
        out_bias=bias,
    )


def _mamba(family: Family, f: Fields) -> MambaConfig:
    own = {name: f[key] for name, key in family.ssm_keys.items()}
    expand, rank = own.pop("expand"), own.pop("dt_rank")
    return MambaConfig(
        d_inner=int(expand * f.integer("hidden_size")),
        dt_rank=None if rank == "auto" else rank,
        inner_norms=family.inner_norms,
        **own,
    )


def _channel(family: Family, f: Fields, plan: LayerPlan) -> ChannelConfig | None:
    if "intermediate_size" not in family.keys:
        return None
    named = {**ACTIVATIONS, **family.activations}
    name = f[family.activation_key]
    if name not in named:
        f.refuse(family.activation_key, name, list(named))
    width = f.integer("intermediate_size")
    activation: Any = named[name]
    if not plan.moe:
        return MLPConfig(width, activation, bias=bool(f["mlp_bias"]))
    return MoEConfig(
        n_experts=f.integer(family.experts_key),
        d_ff=width,
        top_k=f.integer("num_experts_per_tok"),
        routing="renormalised" if f["norm_topk_prob"] else family.routing,
        activation=activation,
        jitter_eps=f["router_jitter_noise"],
    )


def config_to_hf(config: LMConfig, model_type: str | None = None) -> dict[str, Any]:
    """The config.json of a model.

    What `transformers` has no word for and that does not change the logits is left out: dtype,
    remat, scan_unroll. Experts are dropless there, whatever `dispatch` says.

    Args:
        config: the model.
        model_type: which class to write it for; `None` takes the first that fits, in the order of
            `FAMILIES` (a plain Phi-3 is a Llama with other tensor names).

    Raises:
        UserError: if no class, or not the one asked for, computes the same function.
    """
    if config.mup.base_width is not None:
        raise UserError(
            f"mup.base_width={config.mup.base_width}: no class of transformers has its multipliers "
            "of logits and branches: export a model trained with mup.base_width=None"
        )
    if config.recursion is not None:
        raise UserError(
            f"recursion over layers {config.recursion.first} to {config.recursion.last}: no class "
            "of transformers repeats its layers: export a model with recursion=None"
        )
    if model_type is None:
        candidates, verdict = FAMILIES, "no class of transformers computes this model"
    else:
        candidates = {model_type: family_of(model_type)}
        verdict = f"model_type={model_type} does not compute this model"
    refusals: list[str] = []
    nearest: tuple[int, str] | None = None
    for name, family in candidates.items():
        hf = _written(name, family, config)
        try:
            heads = hf.get("num_attention_heads", 1)
            if family.whole_heads and config.d_model % heads:
                raise UserError(f"d_model={config.d_model} must be a multiple of n_heads={heads}")
            unlike = differences(config, config_from_hf(hf))
        except UserError as error:
            refusals.append(f"{name}: {error}")
            continue
        if not unlike:
            return hf
        more = f" and {len(unlike) - 1} more changes" if len(unlike) > 1 else ""
        change = (len(unlike), f"{name} needs {unlike[0]}{more}")
        nearest = change if nearest is None else min(nearest, change)
    raise UserError(f"{verdict}: {refusals[0] if nearest is None else nearest[1]}")


def _written(name: str, family: Family, config: LMConfig) -> dict[str, Any]:
    """config.json for one class, right or wrong: `config_from_hf` is the judge."""
    known = values(config, {ours: theirs for theirs, ours in ACTIVATIONS.items()})
    for ours, theirs in family.ssm_keys.items():
        if ours in known:
            known[theirs] = known[ours]
    keys = list(COMMON_KEYS + family.keys)
    heads, head_dim = known.get("num_attention_heads"), known.get("head_dim")
    if heads and head_dim != config.d_model // heads:
        keys.append("head_dim")
    return {
        "model_type": name,
        "architectures": [family.architecture],
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **{key: known[key] for key in keys if key in known},
    }
