"""Uses of attention."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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


_ATTENTION = {"B": 1, "S": 4096, "H": 2, "K": 2, "D": 128}
_ATTENTION_SMALL = {"S": 1024, "K": 1}

CASES = {
    "attention": Case(
        _ATTENTION,
        _ATTENTION_SMALL,
        _attention_arguments,
        _attention(),
        _attention_work(),
        _flash(),
    ),
    "attention-packed": Case(
        _ATTENTION,
        _ATTENTION_SMALL,
        lambda s: _attention_arguments(s, packed=True),
        _attention(),
        _attention_work(packed=True),
        _flash(),
    ),
    "attention-full": Case(
        _ATTENTION,
        _ATTENTION_SMALL,
        _attention_arguments,
        _attention(causal=False),
        _attention_work(causal=False),
        _flash(causal=False),
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
