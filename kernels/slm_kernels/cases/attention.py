"""Uses of attention."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_kernels.attention import attention
from slm_kernels.cases.case import Arguments, Case, Shape, Work, array, nbytes

# Attention: B rows of S tokens, H query and K key/value heads of D, window W (0 for none).


def _attention_arguments(s: Shape, packed: bool = False) -> Arguments:
    kv = array(s["B"], s["S"], s["K"], s["D"])
    args = {"q": array(s["B"], s["S"], s["H"], s["D"]), "k": kv, "v": kv}
    args["positions"] = array(s["B"] if packed else 1, s["S"], dtype=jnp.int32)
    if packed:
        args["segments"] = array(s["B"], s["S"], dtype=jnp.int32)
    return args


def _attention(causal: bool = True, window: int | None = None, softcap: float | None = None) -> Any:
    def function(implementation: str) -> Callable[..., jax.Array]:
        def run(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            positions: jax.Array,
            segments: jax.Array | None = None,
        ) -> jax.Array:
            return attention(
                q,
                k,
                v,
                q_positions=positions,
                kv_positions=positions,
                q_segments=segments,
                kv_segments=segments,
                causal=causal,
                in_order=causal,
                window=window,
                softcap=softcap,
                implementation=implementation,
            )

        return run

    return function


def _attention_work(
    packed: bool = False, causal: bool = True, window: int | None = None
) -> Callable[[Shape, bool], Work]:
    """Two products forward, five backward, one exponential each (arXiv 2205.14135, appendix B).

    Documents of a packed row are not known here: it counts as one.
    """

    def work(s: Shape, backward: bool) -> Work:
        length, rows = s["S"], s["B"] * s["H"]
        w = length if window is None else min(window, length)
        seen = w * (w + 1) // 2 + (length - w) * w if causal else length * length
        scores = rows * seen
        args = _attention_arguments(s, packed)
        moved = nbytes(args) + nbytes({"out": args["q"]})
        if not backward:
            return Work(flops=4 * s["D"] * scores, bytes=moved, transcendentals=scores)
        # Read again, with the output's gradient; written: three gradients. And the row sums.
        moved += nbytes(args) + 2 * nbytes({"out": args["q"]}) + 2 * 4 * rows * length
        moved += nbytes({n: args[n] for n in "qkv"})
        return Work(flops=14 * s["D"] * scores, bytes=moved, transcendentals=2 * scores)

    return work


def _flash(causal: bool = True) -> Callable[..., jax.Array]:
    """The kernel of jax; it wants heads before tokens and as many of them for keys as queries."""

    def run(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        positions: jax.Array,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash

        del positions  # the order of the tokens
        n = min(512, q.shape[1])
        blocks = jax_flash.BlockSizes(
            block_q=n,
            block_k_major=n,
            block_k=n,
            block_b=1,
            block_q_major_dkv=n,
            block_k_major_dkv=n,
            block_k_dkv=n,
            block_q_dkv=n,
            block_k_major_dq=n,
            block_k_dq=n,
            block_q_dq=n,
        )
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        out = jax_flash.flash_attention(
            *(x.transpose(0, 2, 1, 3) for x in (q, k, v)),
            segment_ids=None if segments is None else jax_flash.SegmentIds(segments, segments),
            causal=causal,
            sm_scale=q.shape[3] ** -0.5,
            block_sizes=blocks,
        )
        return out.transpose(0, 2, 1, 3)

    return run


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """The other kernel of jax, forward, causal, at its best blocks for these chips.

    It reads its schedule from a prefetched table, which is zeros to the simulator; here the same
    schedule, pairs of blocks above the diagonal left out, comes from the grid's indices.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    del positions  # the order of the tokens
    n_q, n_kv = (min(1024, x.shape[1]) for x in (q, k))
    blocks = splash.BlockSizes(n_q, n_kv, min(512, n_kv))
    order = np.arange(q.shape[1], dtype=np.int32)
    mask = info.MaskInfo(None, None, None, None, order)

    def next_nonzero(h: Any, i: Any, j: Any, *_: Any, **__: Any) -> tuple[Any, None, Any, bool]:
        run = j * n_kv <= i * n_q + (n_q - 1)
        return jnp.where(run, j, 0), None, run, False

    def row(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.swapaxes(0, 1) for x in (q * q.shape[2] ** -0.5, k, v))
        hidden, seen = splash.DEFAULT_MASK_VALUE, operator.ge
        out = splash._splash_attention_forward(
            mask, q, k, v, None, None, hidden, False, blocks, None, False, seen
        )
        return out.swapaxes(0, 1)

    real = splash._next_nonzero
    splash._next_nonzero = next_nonzero
    try:
        return jax.vmap(row)(q, k, v)
    finally:
        splash._next_nonzero = real


# Candidates of a search. Blocks of 256 and less take twice as long or more on every TPU tried, and
# tiles of 256 or 1,024 keys a fifth longer.
_BLOCKS = {
    "attention_forward": [
        {"q": 1024, "kv": 1024, "q_tile": 512, "kv_tile": 512},
        {"q": 1024, "kv": 2048, "q_tile": 512, "kv_tile": 512},
        {"q": 1024, "kv": 4096, "q_tile": 512, "kv_tile": 512},
        {"q": 2048, "kv": 2048, "q_tile": 512, "kv_tile": 512},
    ],
    "attention_backward": [
        {"q": 1024, "kv": 1024, "q_tile": 512, "kv_tile": 512},
        {"q": 512, "kv": 1024, "q_tile": 512, "kv_tile": 512},
        {"q": 1024, "kv": 1024, "q_tile": 512, "kv_tile": 256},
    ],
}
_ATTENTION = {"B": 1, "S": 4096, "H": 2, "K": 2, "D": 128}
_ATTENTION_SMALL = {"S": 1024, "K": 1}

CASES = {
    "attention": Case(
        _ATTENTION,
        _ATTENTION_SMALL,
        _attention_arguments,
        _attention(),
        _attention_work(),
        {"jax": _flash(), "splash": _splash},
        blocks=_BLOCKS,
    ),
    "attention-packed": Case(
        _ATTENTION,
        _ATTENTION_SMALL,
        lambda s: _attention_arguments(s, packed=True),
        _attention(),
        _attention_work(packed=True),
        {"jax": _flash()},
    ),
    "attention-full": Case(
        _ATTENTION,
        _ATTENTION_SMALL,
        _attention_arguments,
        _attention(causal=False),
        _attention_work(causal=False),
        {"jax": _flash(causal=False)},
    ),
    # Sliding window and soft-capped scores, as in Gemma 2; heads of 64, as in small models.
    "attention-window": Case(
        {**_ATTENTION, "D": 64},
        _ATTENTION_SMALL,
        _attention_arguments,
        _attention(window=512, softcap=50.0),
        _attention_work(window=512),
    ),
}
