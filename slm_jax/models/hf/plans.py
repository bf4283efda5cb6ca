"""What a configuration says of one layer and not of all: one function a form of saying it."""

from collections.abc import Callable
from typing import NamedTuple

from slm_jax.models.hf.fields import Fields


class LayerPlan(NamedTuple):
    """One layer."""

    attention: bool = True
    rope: bool = True
    window: int | None = None
    moe: bool = False


def uniform(f: Fields, *, attention: bool = True, moe: bool = False) -> list[LayerPlan]:
    """All layers alike; `sliding_window`, where the class has it, holds for all."""
    plan = LayerPlan(attention=attention, window=f["sliding_window"], moe=moe)
    return [plan] * f.integer("num_hidden_layers")


def sparse(f: Fields) -> list[LayerPlan]:
    """`uniform`, with experts in every layer."""
    return uniform(f, moe=True)


def mamba(f: Fields) -> list[LayerPlan]:
    """`uniform`, without attention."""
    return uniform(f, attention=False)


def qwen(f: Fields) -> list[LayerPlan]:
    """Windows by `layer_types`, or from layer `max_window_layers` on."""
    return _by_type(f, lambda i: i >= f["max_window_layers"])


def gemma2(f: Fields) -> list[LayerPlan]:
    """Windows by `layer_types`, or in even layers."""
    return _by_type(f, lambda i: i % 2 == 0)


def smollm3(f: Fields) -> list[LayerPlan]:
    """Layers without rope by `no_rope_layers` (0 is without), or every so many; they may window."""
    n = f.integer("num_hidden_layers")
    rope = f["no_rope_layers"] or [(i + 1) % f["no_rope_layer_interval"] != 0 for i in range(n)]
    if len(rope) < n:
        f.refuse("no_rope_layers", f"{len(rope)} entries", [f"{n}, one a layer"])
    plans = _by_type(f, lambda i: not rope[i])
    return [plan._replace(rope=bool(rope[i])) for i, plan in enumerate(plans)]


def jamba(f: Fields) -> list[LayerPlan]:
    """Attention and experts each at their period and offset, no rope."""

    def at(i: int, kind: str) -> bool:
        return i % f.integer(f"{kind}_layer_period") == f[f"{kind}_layer_offset"]

    experts = f.integer("num_experts") > 1
    return [
        LayerPlan(attention=at(i, "attn"), rope=False, moe=experts and at(i, "expert"))
        for i in range(f.integer("num_hidden_layers"))
    ]


def _by_type(f: Fields, sliding: Callable[[int], bool]) -> list[LayerPlan]:
    """Windows where `layer_types` says so, or where `sliding(layer)` is true if it is missing."""
    n = f.integer("num_hidden_layers")
    windows = {
        "sliding_attention": f["sliding_window"] if f["use_sliding_window"] else None,
        "full_attention": None,
    }
    kinds = f["layer_types"] or [
        "sliding_attention" if sliding(i) else "full_attention" for i in range(n)
    ]
    for kind in kinds:
        if kind not in windows:
            f.refuse("layer_types", kind, list(windows))
    if len(kinds) != n:
        f.refuse("layer_types", f"{len(kinds)} entries", [f"{n}, one a layer"])
    return [LayerPlan(window=windows[kind]) for kind in kinds]
