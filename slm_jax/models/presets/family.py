"""Families: one architecture at every size, from its width and depth alone.

Embeddings begin with a standard deviation of 1/sqrt(width), so that a tied head gives logits of
about 1 at every size; with the usual 0.02 a model of width 24 loses 0.2 nats in its first steps.
"""

from collections.abc import Callable
from dataclasses import replace

from slm_jax.errors import UserError
from slm_jax.models.lm import LMConfig
from slm_jax.models.presets.build import dense, mamba
from slm_jax.nn.moe import MoEConfig

_EXPERTS, _TOP_K = 8, 2


def _heads(width: int) -> int:
    """Heads of 128 in a wide model; in a narrow one as many of 24 or more as divide it."""
    if _wide(width):
        return width // 128
    return max((n for n in range(1, width // 24 + 1) if width % (2 * n) == 0), default=1)


def _inner(width: int, ratio: float) -> int:
    """`ratio` x width as the nearest multiple of 4, of 128 in a wide model."""
    multiple = 128 if _wide(width) else 4
    return max(multiple, multiple * round(ratio * width / multiple))


def _wide(width: int) -> bool:
    """Whether its matrices are cut into tiles of 128."""
    return width >= 512 and width % 128 == 0


def _dense(width: int, layers: int, vocab_size: int) -> LMConfig:
    return dense(
        width,
        layers,
        _heads(width),
        d_ff=_inner(width, 8 / 3),
        qk_norm="head",
        vocab_size=vocab_size,
        init_std=width**-0.5,
        scan_unroll=_unroll(layers),
    )


def _moe(width: int, layers: int, vocab_size: int) -> LMConfig:
    # Two experts of half the dense width: the FLOPs of the dense family at the same width.
    model = _dense(width, layers, vocab_size)
    experts = MoEConfig(_EXPERTS, _inner(width, 8 / 3 / _TOP_K), _TOP_K)
    return replace(model, pattern=(replace(model.pattern[0], channel=experts),))


def _mamba(width: int, layers: int, vocab_size: int) -> LMConfig:
    # A scan of twice the width and no MLP has half the weights of attention and MLP together.
    return mamba(
        width,
        2 * layers,
        vocab_size=vocab_size,
        init_std=width**-0.5,
        scan_unroll=_unroll(2 * layers),
    )


def _unroll(layers: int) -> int:
    """All layers of a toy: a CPU runs them faster, and they compile in seconds."""
    return layers if layers <= 8 else 1


FAMILIES: dict[str, Callable[[int, int, int], LMConfig]] = {
    "dense": _dense,
    "moe": _moe,
    "mamba": _mamba,
}
"""(width, layers, vocabulary) -> model. dense: Llama-like, QK-norm, tied embeddings; moe: the same
with each MLP cut into 8 experts of half its width, two of them active; mamba: two selective scans
for each layer of attention and MLP."""


def member(family: str, width: int, layers: int | None = None, *, vocab_size: int) -> LMConfig:
    """The model of a family at a width.

    Args:
        family: a name in `FAMILIES`.
        width: of the residual stream, a multiple of 4.
        layers: default `depth(width)`.
        vocab_size: rows of the embedding.

    Raises:
        UserError: on an unknown family or a width that is no multiple of 4.
    """
    if family not in FAMILIES:
        raise UserError(f"family={family!r} is not known: choose {', '.join(FAMILIES)}")
    if width < 8 or width % 4:
        raise UserError(f"width={width} must be a multiple of 4, 8 or more")
    return FAMILIES[family](width, depth(width) if layers is None else layers, vocab_size)


def depth(width: int) -> int:
    """Layers that suit a width: one per 12 to 32 of width below 256, from there one per 80 to 100.

    From 256 on it is round(width / (55 + 4 log2 width)), the recipe of the Marin project; it has no
    answer for toys, whose depth is 1 + width / 40, at least 2.
    """
    if width >= 256:
        # log2 rounded down: the depth of an integer must not hang on the last bit of a logarithm.
        return max(6, round(width / (55 + 4 * (width.bit_length() - 1))))
    return max(2, round(1 + width / 40))
