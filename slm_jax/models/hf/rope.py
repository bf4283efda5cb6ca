"""`rope_parameters` of a config.json (or `rope_scaling` and `rope_theta` of older ones)."""

import math
from collections.abc import Mapping
from typing import Any

from slm_jax.models.hf.fields import Fields
from slm_jax.nn.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)

KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")
"""Fields of a config.json that are read here for every class."""


def rope_from_hf(
    f: Fields, types: tuple[str, ...], aliases: Mapping[str, str], *, partial: bool
) -> RopeConfig:
    """The rotation that a configuration asks for.

    Args:
        f: the configuration.
        types: rope types that the class and our blocks both know.
        aliases: other names of them.
        partial: whether the class honours `partial_rotary_factor`.

    Raises:
        UserError: for another type, one rotation for each kind of layer, or a missing number.
    """
    given: dict[str, Any] = dict(f["rope_scaling"] or f["rope_parameters"] or {})
    if nested := [key for key, value in given.items() if isinstance(value, dict)]:
        f.refuse("rope_parameters", nested, ["one rotation for all layers"])
    length = f.integer("max_position_embeddings")
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = aliases.get(kind, kind)
    if kind not in types:
        f.refuse("rope_type", kind, types)
    fraction = given.get("partial_rotary_factor", f["partial_rotary_factor"])
    if fraction != 1.0 and not partial:
        f.refuse("partial_rotary_factor", fraction, [1.0])

    def number(key: str) -> Any:
        if given.get(key) is None:
            f.refuse(f"rope_parameters.{key}", None, [f"a value, as rope_type={kind} needs it"])
        return given[key]

    original = (
        f["original_max_position_embeddings"]
        or given.get("original_max_position_embeddings")
        or length
    )
    factor = given.get("factor") or length / original
    scaling: RopeScaling | None = None
    match kind:
        case "linear":
            scaling = LinearScaling(number("factor"))
        case "dynamic":
            scaling = NTKScaling(number("factor"), length)
        case "yarn":
            scaling = YarnScaling(
                factor,
                original,
                beta_fast=given.get("beta_fast") or 32.0,
                beta_slow=given.get("beta_slow") or 1.0,
                attention_factor=_yarn_attention(given, factor),
                truncate=given.get("truncate", True),
            )
        case "llama3":
            scaling = Llama3Scaling(
                number("factor"), original, number("low_freq_factor"), number("high_freq_factor")
            )
        case "longrope":
            scaling = LongRopeScaling(
                tuple(number("short_factor")),
                tuple(number("long_factor")),
                original,
                given.get("attention_factor") or _longrope_attention(factor, original),
            )
    theta = given.get("rope_theta") or f["rope_theta"]
    return RopeConfig(theta=float(theta), fraction=float(fraction), scaling=scaling)


def _yarn_attention(given: dict[str, Any], factor: float) -> float | None:
    """The explicit factor, or DeepSeek's ratio; `None` leaves the formula to `YarnScaling`."""
    explicit, m, m_all = (given.get(k) for k in ("attention_factor", "mscale", "mscale_all_dim"))
    if explicit is not None or not (m and m_all):
        return explicit
    log = math.log(factor) if factor > 1 else 0.0
    return (0.1 * m * log + 1.0) / (0.1 * m_all * log + 1.0)


def _longrope_attention(factor: float, original: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` for a rotation; `config_from_hf` tells whether a class follows them."""
    out: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.fraction != 1.0:
        out["partial_rotary_factor"] = rope.fraction
    match rope.scaling:
        case None:
            return out | {"rope_type": "default"}
        case LinearScaling(factor):
            return out | {"rope_type": "linear", "factor": factor}
        case NTKScaling(factor):
            return out | {"rope_type": "dynamic", "factor": factor}
        case YarnScaling() as yarn:
            out |= {
                "rope_type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_length,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "truncate": yarn.truncate,
            }
            if yarn.attention_factor is not None:
                out["attention_factor"] = yarn.attention_factor
            return out
        case Llama3Scaling() as llama3:
            return out | {
                "rope_type": "llama3",
                "factor": llama3.factor,
                "original_max_position_embeddings": llama3.original_length,
                "low_freq_factor": llama3.low_freq_factor,
                "high_freq_factor": llama3.high_freq_factor,
            }
        case LongRopeScaling() as longrope:
            return out | {
                "rope_type": "longrope",
                "short_factor": list(longrope.short_factor),
                "long_factor": list(longrope.long_factor),
                "original_max_position_embeddings": longrope.original_length,
                "attention_factor": longrope.attention_factor,
            }
