"""What the Hopper kernels share: who sees whom in a tile, and the ring of buffers.

A block of threads is three warpgroups. The last only copies: 128 rows that stay, then, one after
another, the tiles that pass by. Tiles go to a ring of slots in shared memory, ahead of the other
two warpgroups, each of which computes with 64 of the rows that stay:

    warpgroup 0   rows  0 ..  63    waits for ready[slot], computes, arrives at free[slot]
    warpgroup 1   rows 64 .. 127    likewise
    warpgroup 2   copies            waits for free[slot], starts TMAs that arrive at ready[slot]

    slot                    0      1      0      1
    copied              | tile 0 tile 1 tile 2 tile 3 ...
    used by 0 and 1     |        tile 0 tile 1 tile 2 ...
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from slm_kernels import pallas
from slm_kernels.base2 import LOG2E

ROWS = 64  # of a wgmma instruction, and so of a warpgroup
COMPUTE = 2  # warpgroups that compute
BLOCK = ROWS * COMPUTE
SLOTS = 2  # of the ring; a power of two
# Registers of a thread. A block has 3 * 168: what the copier leaves goes to the others.
COPIER_REGISTERS, COMPUTE_REGISTERS = 24, 240

WGMMA = plgpu.Layout.WGMMA
Accumulator = plgpu.WGMMAAccumulatorRef
BY_ROW, BY_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)  # of a vector along the rows, or the columns

Ids = Mapping[str, Any]
"""Integers of each query or key by name: `"positions"`, and `"segments"` where there are some."""


@dataclass(frozen=True)
class Tiling:
    """What is static about a call.

    Attributes:
        causal: hide later positions.
        in_order: position s is index s for queries and keys: what is hidden is skipped.
        window: width of the sliding window, or `None`.
        softcap: bound of the scores, or `None`.
        scale: multiplies the scores; positive.
        segmented: whether segments are read.
        n_q: blocks of 128 queries.
        n_kv: blocks of 128 keys.
    """

    causal: bool
    in_order: bool
    window: int | None
    softcap: float | None
    scale: float
    segmented: bool
    n_q: int
    n_kv: int

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the integers that are read of each query and each key."""
        return ("positions", "segments") if self.segmented else ("positions",)

    @property
    def always_masked(self) -> bool:
        """Whether every tile needs a mask, not only those on the diagonal."""
        return not self.in_order or self.segmented or self.window is not None

    def keys(self, i: Any, tile: int) -> tuple[Any, Any, Any]:
        """Tiles of keys that block `i` of queries meets: the first, the first masked, the end."""
        if not self.in_order:
            return 0, 0, self.n_kv * (BLOCK // tile)
        end = (i + 1) * (BLOCK // tile)
        if self.window is None:
            return 0, 0 if self.always_masked else i * (BLOCK // tile), end
        first = jax.lax.div(jnp.maximum(i * BLOCK - (self.window - 1), 0), jnp.int32(tile))
        return first, first, end

    def queries(self, i: Any, tile: int) -> tuple[Any, Any, Any]:
        """Tiles of queries that meet block `i` of keys: the first, the first unmasked, the end."""
        end = self.n_q * (BLOCK // tile)
        if not self.in_order:
            return 0, end, end
        first = i * (BLOCK // tile)
        if not self.always_masked:
            return first, first + BLOCK // tile, end
        if self.window is None:
            return first, end, end
        last = jax.lax.div((i + 1) * BLOCK + self.window - 2, jnp.int32(tile))
        seen = jnp.minimum(last + 1, end)
        return first, seen, seen

    def visible(
        self, shape: tuple[int, int], q_ids: Ids, kv_ids: Ids, q_axis: int = 0
    ) -> jax.Array:
        """Who sees whom in a tile: a mask of `shape`, queries along `q_axis`."""
        q = {name: along(x, shape, q_axis) for name, x in q_ids.items()}
        kv = {name: along(x, shape, 1 - q_axis) for name, x in kv_ids.items()}
        parts = []
        if self.causal:
            parts.append(q["positions"] >= kv["positions"])
        if not self.in_order:
            parts.append(kv["positions"] >= 0)
        if self.window is not None:
            parts.append(q["positions"] - kv["positions"] < self.window)
            if not self.causal:
                parts.append(kv["positions"] - q["positions"] < self.window)
        if self.segmented:
            parts.append(q["segments"] == kv["segments"])
        return functools.reduce(jnp.logical_and, parts)

    @property
    def slope(self) -> float:
        """Scores times log2(e) are this times `capped` products; exp2 of them is exp of scores."""
        return LOG2E * (self.scale if self.softcap is None else self.softcap)

    def capped(self, products: jax.Array) -> jax.Array:
        """Products of queries and keys; with a softcap, tanh of them times scale / softcap.

        Written with exp2: the instruction for tanh has only 11 bits.
        """
        if self.softcap is None:
            return products
        return 1 - 2 / (1 + jnp.exp2(products * (2 * LOG2E * self.scale / self.softcap)))

    def visible_pairs(self, n_queries: int, n_keys: int) -> int:
        """Pairs of a query and a key that must be computed at least, for `CostEstimate`."""
        if not self.in_order:
            return n_queries * n_keys
        w = n_queries if self.window is None else min(self.window, n_queries)
        return w * (w + 1) // 2 + (n_queries - w) * w


def along(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """A vector along `axis` of a tile, the same along the other."""
    return jax.lax.broadcast_in_dim(x, shape, (axis,))


def matrices(n: int, rows: int, columns: int, dtype: Any) -> Any:
    """Shared memory for `n` matrices, laid out for TMA and wgmma: 8 rows of 128 bytes, swizzled."""
    tiling, swizzle = plgpu.TilingTransform, plgpu.SwizzleTransform
    transforms = (tiling((8, 64)), swizzle(128))  # type: ignore[abstract]
    return plgpu.SMEM((n, rows, columns), dtype, transforms=transforms)


def vectors(names: Sequence[str], n: int, rows: int, dtype: Any = jnp.int32) -> dict[str, Any]:
    """Shared memory for `n` vectors of each name."""
    return {name: plgpu.SMEM((n, rows), dtype) for name in names}


def load(refs: Mapping[str, Any], slot: Any, layout: Any) -> dict[str, jax.Array]:
    """The vectors of a slot, by name."""
    return {name: plgpu.load(ref.at[slot], layout=layout) for name, ref in refs.items()}


Copies = Sequence[tuple[Any, Any]]
"""Pairs of a part of the memory and an array of slots that it goes to."""


def fetch(copies: Copies, slot: Any, ready: Any) -> None:
    """Starts copies to a slot; each arrives at `ready[slot]`."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])


def fill_ring(
    n: Any, parts: Sequence[tuple[Callable[[Any], Copies], Any, Any]], before: Any = 0
) -> None:
    """Copies `n` tiles to the ring, each as soon as its slot is free.

    Args:
        n: tiles.
        parts: of a tile, that are waited for and set free apart: what to copy for tile n, the
            barriers for "ready" and for "free", one a slot.
        before: tiles that went to the ring before these.
    """

    @pl.loop(0, n)
    def _tile(step: Any) -> None:
        slot = (before + step) & (SLOTS - 1)
        for copies, ready, free in parts:
            wait = functools.partial(plgpu.barrier_wait, free.at[slot])
            pl.when(before + step >= SLOTS)(wait)
            fetch(copies(step), slot, ready)


def launch(
    body: Callable[..., None],
    name: str,
    grid: tuple[int, int, int],
    out_type: Any,
    scratch: Sequence[Any],
    cost: pl.CostEstimate,
) -> Callable[..., Any]:
    """The kernel on a grid of heads, blocks of 128 rows, and rows of the batch."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=("head", "block", "row"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name=name,
        # exp2 to 2 ulp by the special function unit, whose results are rounded to 8 or 11 bits.
        compiler_params=plgpu.CompilerParams(approx_math=True),
        cost_estimate=cost,
        interpret=pallas.interpret(),
    )
