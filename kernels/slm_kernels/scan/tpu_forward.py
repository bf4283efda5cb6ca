"""Forward kernel of the TPU scan, and what it shares with the backward: see `tpu.py`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slm_kernels.pallas import interpret
from slm_kernels.scan.decay import FOREVER, log2_rates

LANES = 128
UNROLL = 16  # steps; a multiple of the tile
TILE = (
    8  # steps in a tile of HBM, of float32 and of bfloat16: XLA packs two of the latter in 32 bits
)
F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays are cut: see the head of this file."""

    chunk: int  # steps, T
    blocks: int  # of channels
    rows: int  # groups of 128 channels in a block, S
    n: int  # states, a multiple of 8

    @property
    def group(self) -> int:
        """States that stay in registers together."""
        return 16 if self.n & 15 == 0 else 8

    @property
    def unroll(self) -> int:
        """Steps written out in a loop's body, a multiple of the tile."""
        return min(UNROLL, self.chunk)

    @property
    def width(self) -> int:
        """Channels, padding included."""
        return self.blocks * self.rows * LANES

    def tiles(self, x: jax.Array) -> jax.Array:
        """`[B, L, D]` to `[B, L / tile, blocks, S * tile, 128]`; padded steps have dt = 0."""
        pad = (0, -x.shape[1] % self.chunk), (0, self.width - x.shape[2])
        x = jnp.pad(x, ((0, 0), *pad))
        x = x.reshape(x.shape[0], -1, TILE, self.blocks * self.rows, LANES).swapaxes(2, 3)
        return x.reshape(x.shape[0], -1, self.blocks, self.rows * TILE, LANES)

    def untile(self, x: jax.Array) -> jax.Array:
        """The inverse of `tiles`, padding included."""
        batch = x.shape[0]
        x = x.reshape(batch, -1, self.blocks * self.rows, TILE, LANES).swapaxes(2, 3)
        return x.reshape(batch, -1, self.width)

    def states(self, x: jax.Array, n: int | None = None) -> jax.Array:
        """`[..., D, N]` to `[..., blocks, n, S, 128]`; n is that of the layout by default."""
        n = self.n if n is None else n
        pad = [(0, 0)] * (x.ndim - 2) + [(0, self.width - x.shape[-2]), (0, n - x.shape[-1])]
        x = jnp.pad(x, pad)
        x = x.reshape(*x.shape[:-2], self.blocks, self.rows, LANES, x.shape[-1])
        return jnp.moveaxis(x, -1, -3)

    def unstates(self, x: jax.Array) -> jax.Array:
        """The inverse of `states`, padding included."""
        x = jnp.moveaxis(x, -3, -1)
        return x.reshape(*x.shape[:-4], self.width, self.n)

    def projection(self, x: jax.Array) -> jax.Array:
        """`[B, L, N]` to `[B, L / T, N, T]`."""
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.chunk), (0, self.n - x.shape[2])))
        return x.reshape(x.shape[0], -1, self.chunk, self.n).swapaxes(2, 3)


# --- what both kernels do


def three_parts(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is `x`: three times the upper half of what remains."""
    rest, parts = x.astype(F32), []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(rest, jnp.int32) & jnp.int32(-65536)
        part = jax.lax.bitcast_convert_type(bits, F32)
        rest = rest - part
        parts.append(part.astype(jnp.bfloat16))
    return parts


def spread(x: jax.Array) -> jax.Array:
    """`[G, T]` to `[T, G * 128]`: entry (n, t) fills lanes 128 n .. 128 n + 127 of row t."""
    size = x.shape[0]
    stack = x if x.dtype == jnp.bfloat16 else jnp.concatenate(three_parts(x))
    shape = (stack.shape[0], size * LANES)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) & (size - 1)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1) >> 7
    ones = jnp.where(row == column, 1.0, 0.0).astype(jnp.bfloat16)
    return jax.lax.dot_general(stack, ones, (((0,), (0,)), ((), ())), preferred_element_type=F32)


def spread_all(x_ref: Any, out_ref: Any, lay: Layout) -> None:
    """`[N, T]` to `[N, T, 128]`, each entry over all lanes."""

    @pl.loop(0, lay.n // lay.group)
    def _(g: jax.Array) -> None:
        wide = spread(x_ref[pl.ds(pl.multiple_of(g * lay.group, 8), lay.group), :])
        for k in range(lay.group):
            out_ref[g * lay.group + k] = wide[:, k * LANES : (k + 1) * LANES]


def full(ref: Any, states: Any, t: Any, rows: int) -> jax.Array:
    """Row t of each of `ref[states]` in every sublane: `[states, S, 128]`."""
    row = ref[states, pl.ds(t, 1), :]
    return jnp.broadcast_to(row, (row.shape[0], rows, LANES))


class Steps:
    """A `[T / tile, S * tile, 128]` block, read and written one step `[S, 128]` at a time."""

    def __init__(self, ref: Any, lay: Layout):
        self.ref, self.rows, self.unroll = ref, lay.rows, lay.unroll
        self.tile = ref.shape[1] // lay.rows

    def _at(self, i: Any, j: int) -> tuple[Any, ...]:
        of_tile = pl.ds(j % self.tile, self.rows, stride=self.tile)
        return i * (self.unroll // self.tile) + j // self.tile, of_tile, slice(None)

    def get(self, i: Any, j: int) -> jax.Array:
        """Step unroll * i + j."""
        return self.ref[self._at(i, j)]

    def set(self, i: Any, j: int, value: jax.Array) -> None:
        """Writes step unroll * i + j."""
        self.ref[self._at(i, j)] = value


def reader(ref: Any, wide: Any, lay: Layout) -> Steps:
    """Steps of an input; loads with a stride are of 32 bits, so bfloat16 is widened first."""
    if wide is None:
        return Steps(ref, lay)
    wide[...] = ref[...].astype(F32)
    return Steps(wide, lay)


def wide(x: jax.Array, lay: Layout) -> Any:
    """Scratch for `reader`, or None if it needs none."""
    if x.dtype == F32:
        return None
    return pltpu.VMEM((lay.chunk // TILE, lay.rows * TILE, LANES), F32)


def over_groups(lay: Layout, body: Any) -> None:
    """body(g) for each group of states."""
    if lay.n == lay.group:
        body(0)
    else:
        pl.loop(0, lay.n // lay.group)(body)


def specs(lay: Layout, at: Any) -> dict[str, Any]:
    """Block of every array; `at` maps the grid's time axis to the chunk."""
    of_batch = (None, lay.blocks, lay.n, lay.rows, LANES)

    steps = (None, lay.chunk // TILE, None, lay.rows * TILE, LANES)

    def chunk_of(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, rows, lay.chunk), lambda b, t, d: (b, at(t), 0, 0))

    return {
        "steps": pl.BlockSpec(steps, lambda b, t, d: (b, at(t), d, 0, 0)),
        "a": pl.BlockSpec((None, lay.n, lay.rows, LANES), lambda b, t, d: (d, 0, 0, 0)),
        "d": pl.BlockSpec((None, lay.rows, LANES), lambda b, t, d: (d, 0, 0)),
        "b": chunk_of(lay.n),
        "reset": chunk_of(16),
        "state": pl.BlockSpec(of_batch, lambda b, t, d: (b, 0, 0, 0, 0)),
        "start": pl.BlockSpec(
            (None, None, None, lay.n, lay.rows, LANES), lambda b, t, d: (b, at(t), d, 0, 0, 0)
        ),
        "skip": pl.BlockSpec((None, lay.blocks, lay.rows, LANES), lambda b, t, d: (b, 0, 0, 0)),
    }


def call(
    kernel: Any,
    lay: Layout,
    inputs: dict[str, tuple[Any, Any]],
    outputs: dict[str, tuple[Any, Any]],
    scratch: dict[str, Any],
    *,
    name: str,
    flops: int,
    exps: int,
) -> dict[str, Any]:
    """`pallas_call` by names; an entry that is None is None in the kernel too."""

    def given(part: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in part.items() if (v[0] if isinstance(v, tuple) else v) is not None}

    ins, outs, tmp = given(inputs), given(outputs), given(scratch)
    names = [*ins, *outs, *tmp]
    missing = dict.fromkeys([*inputs, *outputs, *scratch])
    batch, chunks = ins["b"][0].shape[:2]
    moved = [v[0] for v in (*ins.values(), *outs.values())]
    blocks: list[Any] = [*ins.values(), *outs.values()]
    held = 2 * sum(
        math.prod(size or 1 for size in spec.block_shape) * v.dtype.itemsize for v, spec in blocks
    ) + sum(math.prod(s.shape) * 4 for s in tmp.values())
    got = pl.pallas_call(
        lambda *refs: kernel(missing | dict(zip(names, refs, strict=True)), lay),
        grid=(batch, chunks, lay.blocks),
        in_specs=[spec for _, spec in ins.values()],
        out_specs=[spec for _, spec in outs.values()],
        out_shape=[shape for shape, _ in outs.values()],
        scratch_shapes=list(tmp.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=held * 5 // 4 + 2**22,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=exps,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        ),
        interpret=interpret(),
        name=name,
    )(*(x for x, _ in ins.values()))
    return dict.fromkeys(outputs) | dict(zip(outs, got, strict=True))


def shared(
    lay: Layout, spec: Any, u: Any, dt: Any, a: Any, b: Any, c: Any, d: Any, reset: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and scratch that both kernels have."""
    a2 = log2_rates(a, resets=reset is not None)
    full = pltpu.VMEM((lay.n, lay.chunk, LANES), F32)
    inputs = {
        "u": (u, spec["steps"]),
        "dt": (dt, spec["steps"]),
        "a2": (a2, spec["a"]),
        "b": (b, spec["b"]),
        "c": (c, spec["b"]),
        "d": (d, spec["d"]),
        "reset": (reset, spec["reset"]),
    }
    scratch = {
        "b_full": full,
        "c_full": full,
        "r_full": None if reset is None else pltpu.VMEM((1, lay.chunk, LANES), F32),
        "u_wide": wide(u, lay),
        "dt_wide": wide(dt, lay),
    }
    return inputs, scratch


# --- forward


def _forward_kernel(x: dict[str, Any], lay: Layout) -> None:
    rows, group = lay.rows, lay.group
    block, resets = pl.program_id(2), x["reset"] is not None

    @pl.when(block == 0)
    def _() -> None:
        spread_all(x["b"], x["b_full"], lay)
        spread_all(x["c"], x["c_full"], lay)
        if resets:
            x["r_full"][0] = spread(x["reset"][...])[:, :LANES] * FOREVER

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        x["last"][block] = x["initial"][block]

    if x["starts"] is not None:
        x["starts"][...] = x["last"][block]
    u, dt = (reader(x[k], x[f"{k}_wide"], lay) for k in ("u", "dt"))
    y = Steps(x["y"] if x["y_wide"] is None else x["y_wide"], lay)
    skip = x["d"][...]

    def states(g: Any) -> None:
        of = pl.ds(g * group, group)

        def steps(i: jax.Array, h: jax.Array) -> jax.Array:
            for j in range(lay.unroll):
                t = i * lay.unroll + j
                u_t, dt_t = u.get(i, j), dt.get(i, j)
                long = dt_t + full(x["r_full"], slice(None), t, rows)[0] if resets else dt_t
                decay = jnp.exp2(long * x["a2"][of])
                h = decay * h + (dt_t * u_t) * full(x["b_full"], of, t, rows)
                total = skip * u_t
                if lay.n != group:
                    total = jnp.where(g == 0, total, y.get(i, j))
                y.set(i, j, total + jnp.sum(h * full(x["c_full"], of, t, rows), axis=0))
            return h

        h = x["last"][block, of]
        x["last"][block, of] = jax.lax.fori_loop(0, lay.chunk // lay.unroll, steps, h)

    over_groups(lay, states)
    if x["y_wide"] is not None:
        x["y"][...] = x["y_wide"][...].astype(x["y"].dtype)


def forward(lay: Layout, save: bool, *args: Any) -> dict[str, Any]:
    """`y` and `last`, and with `save` the states at chunk starts: `[B, L / T, blocks, N, S, 128]`.

    Args:
        lay: how the arrays are cut.
        save: whether a backward pass follows.
        *args: u, dt, a, b, c, d, reset or `None`, initial state, in the layout of the kernels.
    """
    *shared_args, initial = args
    u, _, a, b = args[:4]
    spec = specs(lay, lambda t: t)
    inputs, scratch = shared(lay, spec, *shared_args)
    starts = jax.ShapeDtypeStruct((*b.shape[:2], *a.shape), F32) if save else None
    work = u.size * lay.n
    return call(
        _forward_kernel,
        lay,
        inputs | {"initial": (initial, spec["state"])},
        {
            "y": (jax.ShapeDtypeStruct(u.shape, u.dtype), spec["steps"]),
            "last": (jax.ShapeDtypeStruct(initial.shape, F32), spec["state"]),
            "starts": (starts, spec["start"]),
        },
        scratch | {"y_wide": wide(u, lay)},
        name="selective_scan_forward",
        flops=6 * work + 3 * u.size,
        exps=work,
    )
