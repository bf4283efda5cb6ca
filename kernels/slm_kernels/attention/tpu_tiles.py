"""What the forward and the backward kernel on TPU share: tiles, who sees whom in one, its scores.

    keys j ->  0     1     2     3        queries and keys go in blocks of q and kv tokens
    query  0  edge                        (powers of two); a block pair is cut into tiles of
    blocks 1  full  edge                  q_tile x kv_tile scores. With `in_order` the pairs above
    i      2  full  full  edge            the diagonal (and left of a window) are neither computed
           3  full  full  full  edge      nor copied, and only pairs on an edge are masked.

Everything that decides this is computed from grid indices with compares and shifts.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from slm_kernels.base2 import LOG2E
from slm_kernels.dispatch import device_kind

LANES = 128
# Finite, so that a row that has seen nothing yet stays free of NaN.
HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tokens of a block of queries and of keys, and of the tiles computed at a time.

    Powers of two, at least 128; a block is a whole number of tiles. Shorter or longer sequences
    get smaller blocks where that saves padding.
    """

    q: int = 1024
    kv: int = 1024
    q_tile: int = 512
    kv_tile: int = 512

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < LANES or value & (value - 1):
                raise ValueError(f"{field.name}={value} is not a power of two from {LANES}")
        for block, tile in (("q", "q_tile"), ("kv", "kv_tile")):
            if getattr(self, tile) > getattr(self, block):
                raise ValueError(
                    f"{tile}={getattr(self, tile)} is more than {block}={getattr(self, block)}: "
                    f"choose at most that"
                )


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static side of one call: its mask, and its blocks fitted to the lengths."""

    causal: bool
    in_order: bool
    window: int | None
    softcap: float | None
    scale: float
    segmented: bool
    q: int
    kv: int
    q_tile: int
    kv_tile: int
    n_q: int
    n_kv: int

    # ---- block pairs ---------------------------------------------------------------------------

    def first_kv(self, i: Any) -> Any:
        """First block of keys that query block i sees."""
        if not self.in_order or self.window is None:
            return i * 0
        return jnp.maximum(i * self.q - (self.window - 1), 0) >> log2(self.kv)

    def last_kv(self, i: Any) -> Any:
        """Last block of keys that query block i sees."""
        if not self.in_order:
            return i * 0 + (self.n_kv - 1)
        return jnp.minimum(((i + 1) * self.q - 1) >> log2(self.kv), self.n_kv - 1)

    def kv_steps(self) -> int:
        """Most blocks of keys that any query block sees."""
        if not self.in_order or self.window is None:
            return self.n_kv
        return min(self.n_kv, (self.q + self.window - 2) // self.kv + 2)

    def first_q(self, j: Any) -> Any:
        """First block of queries that sees key block j."""
        return (j * self.kv) >> log2(self.q) if self.in_order else j * 0

    def last_q(self, j: Any) -> Any:
        """Last block of queries that sees key block j."""
        if not self.in_order or self.window is None:
            return j * 0 + (self.n_q - 1)
        end = (j + 1) * self.kv - 1 + self.window - 1
        return jnp.minimum(end >> log2(self.q), self.n_q - 1)

    def q_steps(self, n_q: int) -> int:
        """Most blocks of queries, of n_q in a row, that see any key block."""
        if not self.in_order or self.window is None:
            return n_q
        return min(n_q, (self.kv + self.window - 2) // self.q + 2)

    # ---- tiles ---------------------------------------------------------------------------------

    def all_visible(self, i: Any, j: Any) -> Any:
        """Whether each query of block i sees every key of block j (or `False`)."""
        if not self.in_order or self.segmented:
            return False
        inner = (j + 1) * self.kv - 1 <= i * self.q
        if self.window is not None:
            inner = inner & ((i + 1) * self.q - 1 - j * self.kv < self.window)
        return inner

    def any_visible(self, q_start: Any, kv_start: Any) -> Any:
        """Whether some query of a tile sees some key of it (or `True`: not known)."""
        if not self.in_order:
            return True
        some = kv_start <= q_start + self.q_tile - 1
        if self.window is not None:
            some = some & (q_start - (kv_start + self.kv_tile - 1) < self.window)
        return some

    def mask(
        self, q_start: Any, kv_start: Any, q_axis: int, ids: tuple[Any, Any, Any, Any]
    ) -> jax.Array:
        """Who sees whom in a tile, queries on axis `q_axis`: bool.

        Args:
            q_start: index of its first query.
            kv_start: index of its first key.
            q_axis: 0 or 1.
            ids: q_positions, kv_positions, q_segments, kv_segments, broadcastable to the tile.
        """
        q_positions, kv_positions, q_segments, kv_segments = ids
        if self.in_order:
            # In a document positions differ as indices do, and the segments tell documents apart.
            shape = (self.kv_tile, self.q_tile) if q_axis else (self.q_tile, self.kv_tile)
            q_index = jax.lax.broadcasted_iota(jnp.int32, shape, q_axis)
            kv_index = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - q_axis)
            ahead = q_index - kv_index
            mask = ahead >= kv_start - q_start
            if self.window is not None:
                mask &= ahead < self.window + kv_start - q_start
        else:
            mask = kv_positions >= 0
            if self.causal:
                mask &= kv_positions <= q_positions
            if self.window is not None:
                mask &= q_positions - kv_positions < self.window
                if not self.causal:
                    mask &= kv_positions - q_positions < self.window
        if self.segmented:
            mask &= q_segments == kv_segments
        return mask

    def scores(self, products: jax.Array) -> jax.Array:
        """Scores times log2(e), from the products of queries and keys: exp2 then gives exp."""
        if self.softcap is None:
            return products * (self.scale * LOG2E)
        return jnp.tanh(products * (self.scale / self.softcap)) * (self.softcap * LOG2E)

    def visible_pairs(self, n_queries: int, n_keys: int) -> int:
        """Pairs of a query and a key that must be computed at least, for `CostEstimate`."""
        if not self.in_order:
            return n_queries * n_keys
        w = n_queries if self.window is None else min(self.window, n_queries)
        return w * (w + 1) // 2 + (n_queries - w) * w


def each_tile(
    t: Tiling,
    i: Any,
    j: Any,
    group: int,
    places: Callable[[bool], Sequence[tuple[int, int]]],
    tile: Callable[[Any, int, int, bool], None],
) -> None:
    """Runs the tiles of a pair of blocks that any query sees, masked only where they must be.

    Args:
        t: the tiling.
        i: block of queries.
        j: block of keys.
        group: query heads.
        places: first query and key of each tile in its block, for masked tiles or not.
        tile: called with a head, a place and whether to mask.
    """

    def tiles(masked: bool) -> None:
        def head(g: Any) -> None:
            for q_at, kv_at in places(masked):
                run = functools.partial(tile, g, q_at, kv_at, masked)
                if masked and t.in_order:
                    pl.when(t.any_visible(i * t.q + q_at, j * t.kv + kv_at))(run)
                else:
                    run()

        if group == 1:
            head(0)
        else:
            pl.loop(0, group)(head)

    inner = t.all_visible(i, j)
    if inner is False:
        tiles(True)
    else:
        pl.when(inner)(lambda: tiles(False))
        pl.when(jnp.logical_not(inner))(lambda: tiles(True))


def vmem_limit() -> int:
    """Bytes that a kernel may take on the chip: above its default share where there is more.

    A core of v4 has 16 MiB, one of v5e and later has at least 64.
    """
    return (16 if device_kind() == "TPU v4" else 48) * 2**20


def log2(power: int) -> int:
    """Exponent of a power of two."""
    return power.bit_length() - 1


def fit(length: int, block: int) -> int:
    """The largest power of two from 128 to `block` that pads `length` by an eighth at most."""
    least = round_up(length, LANES)
    while block > LANES and 8 * round_up(length, block) > 9 * least:
        block //= 2
    return block


def round_up(length: int, block: int) -> int:
    """The next multiple of `block`."""
    return -(-length // block) * block


def pad(x: jax.Array, axis: int, length: int, value: int = 0) -> jax.Array:
    """`x` with `axis` padded at its end to `length`."""
    if x.shape[axis] == length:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def column(row: jax.Array) -> jax.Array:
    """A row `[1, n]` as a column `[n, 128]`, its value on every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def lanes(x: jax.Array, width: int) -> jax.Array:
    """A column `[n, 128]` with the same value on every lane, as wide as `width`."""
    if width <= LANES:
        return x[:, :width]
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def varying(*arrays: Any) -> list[Any]:
    """The arrays (or `None`s), varying over each mesh axis of a `shard_map` that one does."""
    mine = [frozenset() if x is None else jax.typeof(x).manual_axis_type.varying for x in arrays]
    axes = frozenset().union(*mine)
    return [
        x if x is None or axes == m else jax.lax.pcast(x, tuple(axes - m), to="varying")
        for x, m in zip(arrays, mine, strict=True)
    ]


def shape_like(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """Type of a kernel's result that varies over the mesh axes over which `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Product of two matrices over an axis of each, float32."""
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
