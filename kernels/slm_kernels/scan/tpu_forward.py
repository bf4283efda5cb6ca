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
# Steps in a tile of HBM, of float32 and of bfloat16: XLA packs two of the latter in 32 bits.
TILE = 8
F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays are cut: see the head of this file."""

    chunk: int  # steps, T
    blocks: int  # of channels
    rows: int  # groups of 128 channels in a block, S
    n: int  # states, a multiple of 8
    most: int  # steps written out in a loop's body

    @property
    def group(self) -> int:
        """States that stay in registers together."""
        return 16 if self.n & 15 == 0 else 8

    @property
    def unroll(self) -> int:
        """Steps written out in a loop's body, of which a chunk is a whole number."""
        return math.gcd(self.most, self.chunk)

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
    """Three arrays of bfloat16 values whose sum is `x`: thrice the upper half of what remains."""
    rest, parts = x, []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(rest, jnp.int32) & jnp.int32(-65536)
        parts.append(jax.lax.bitcast_convert_type(bits, F32))
        rest = rest - parts[-1]
    return parts


def columns(x: jax.Array) -> jax.Array:
    """`[G, T]` as `[T, 128]`: lanes k, k + G, ... of row t hold the parts of entry (k, t).

    Turned while it is float32, and 128 long: other products of bfloat16 that was made here do not
    pass the simulator's checks.
    """
    parts = [x.astype(F32)] if x.dtype == jnp.bfloat16 else three_parts(x)
    zeros = jnp.zeros((LANES - x.shape[0] * len(parts), x.shape[1]), F32)
    return jnp.concatenate([*parts, zeros]).T


def spread_all(x: dict[str, Any], lay: Layout) -> None:
    """Spreads b and c, `[N, T]`, to `[N, T, 128]`, and flags of resets to endless steps."""
    row = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) & (lay.group - 1)

    def states(g: Any) -> None:
        of = pl.ds(g * lay.group, lay.group)
        both = jnp.concatenate([columns(x["b"][of]), columns(x["c"][of])]).astype(jnp.bfloat16)
        for k in range(lay.group):
            ones = jnp.where(row == k, 1.0, 0.0).astype(jnp.bfloat16)  # adds up the parts
            sums = jnp.dot(both, ones, preferred_element_type=F32)
            x["b_full"][g * lay.group + k] = sums[: lay.chunk]
            x["c_full"][g * lay.group + k] = sums[lay.chunk :]

    each(lay.n // lay.group, states)
    if x["reset"] is not None:
        flags = x["reset"][...].astype(F32).T[:, :1]
        x["r_full"][0] = jnp.broadcast_to(flags, (lay.chunk, LANES)) * FOREVER


def full(ref: Any, states: Any, t: Any, rows: int) -> jax.Array:
    """Row t of each of `ref[states]` in every sublane: `[states, S, 128]`."""
    row = ref[states, pl.ds(t, 1), :]
    return jnp.broadcast_to(row, (row.shape[0], rows, LANES))


class Steps:
    """A block of `[T / tile, blocks, S * tile, 128]`, read and written a step `[S, 128]` a time."""

    def __init__(self, ref: Any, block: Any, lay: Layout):
        self.ref, self.block, self.rows, self.unroll = ref, block, lay.rows, lay.unroll

    def _at(self, i: Any, j: int) -> tuple[Any, ...]:
        of_tile = pl.ds(j % TILE, self.rows, stride=TILE)
        tile = i * (self.unroll // TILE) + j // TILE
        return tile, pl.ds(self.block, 1), of_tile, slice(None)

    def get(self, i: Any, j: int) -> jax.Array:
        """Step unroll * i + j."""
        return self.ref[self._at(i, j)][0]

    def set(self, i: Any, j: int, value: jax.Array) -> None:
        """Writes step unroll * i + j."""
        self.ref[self._at(i, j)] = value[None]


def reader(ref: Any, wide: Any, block: Any, lay: Layout) -> Steps:
    """Steps of an input; loads with a stride are of 32 bits, so bfloat16 is widened first."""
    if wide is None:
        return Steps(ref, block, lay)
    wide[:, 0] = ref[:, block].astype(F32)
    return Steps(wide, 0, lay)


def writer(ref: Any, wide: Any, block: Any, lay: Layout) -> Steps:
    """Steps of an output, which `narrow` completes."""
    return Steps(ref, block, lay) if wide is None else Steps(wide, 0, lay)


def narrow(ref: Any, wide: Any, block: Any) -> None:
    """Writes what `writer` collected."""
    if wide is not None:
        ref[:, block] = wide[:, 0].astype(ref.dtype)


def wide(x: jax.Array, lay: Layout) -> Any:
    """Scratch for `reader` or `writer`, or None if they need none."""
    if x.dtype == F32:
        return None
    return pltpu.VMEM((lay.chunk // TILE, 1, lay.rows * TILE, LANES), F32)


def each(count: int, body: Any) -> None:
    """body(i) for i of `count`."""
    if count == 1:
        body(0)
    else:
        pl.loop(0, count)(body)


def specs(lay: Layout, at: Any) -> dict[str, Any]:
    """Block of every array; `at` maps the grid's time axis to the chunk."""
    state = (lay.blocks, lay.n, lay.rows, LANES)
    skip = (lay.blocks, lay.rows, LANES)
    steps = (None, lay.chunk // TILE, lay.blocks, lay.rows * TILE, LANES)

    def chunk_of(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, rows, lay.chunk), lambda b, t: (b, at(t), 0, 0))

    return {
        "steps": pl.BlockSpec(steps, lambda b, t: (b, at(t), 0, 0, 0)),
        "a": pl.BlockSpec(state, lambda b, t: (0, 0, 0, 0)),
        "d": pl.BlockSpec(skip, lambda b, t: (0, 0, 0)),
        "b": chunk_of(lay.n),
        "reset": chunk_of(16),
        "state": pl.BlockSpec((None, *state), lambda b, t: (b, 0, 0, 0, 0)),
        "start": pl.BlockSpec((None, None, *state), lambda b, t: (b, at(t), 0, 0, 0, 0)),
        "skip": pl.BlockSpec((None, *skip), lambda b, t: (b, 0, 0, 0)),
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
        grid=(batch, chunks),
        in_specs=[spec for _, spec in ins.values()],
        out_specs=[spec for _, spec in outs.values()],
        out_shape=[shape for shape, _ in outs.values()],
        scratch_shapes=list(tmp.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
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
    rows, group, resets = lay.rows, lay.group, x["reset"] is not None
    begins = pl.program_id(1) == 0
    spread_all(x, lay)

    def channels(block: Any) -> None:
        @pl.when(begins)
        def _() -> None:
            x["last"][block] = x["initial"][block]

        if x["starts"] is not None:
            x["starts"][block] = x["last"][block]
        u, dt = (reader(x[k], x[f"{k}_wide"], block, lay) for k in ("u", "dt"))
        y = writer(x["y"], x["y_wide"], block, lay)
        skip = x["d"][block]

        def states(g: Any) -> None:
            of = pl.ds(g * group, group)

            def steps(i: jax.Array, h: jax.Array) -> jax.Array:
                for j in range(lay.unroll):
                    t = i * lay.unroll + j
                    u_t, dt_t = u.get(i, j), dt.get(i, j)
                    long = dt_t + full(x["r_full"], slice(None), t, rows)[0] if resets else dt_t
                    decay = jnp.exp2(long * x["a2"][block, of])
                    h = decay * h + (dt_t * u_t) * full(x["b_full"], of, t, rows)
                    total = skip * u_t
                    if lay.n != group:
                        total = jnp.where(g == 0, total, y.get(i, j))
                    y.set(i, j, total + jnp.sum(h * full(x["c_full"], of, t, rows), axis=0))
                return h

            h = x["last"][block, of]
            x["last"][block, of] = jax.lax.fori_loop(0, lay.chunk // lay.unroll, steps, h)

        each(lay.n // group, states)
        narrow(x["y"], x["y_wide"], block)

    each(lay.blocks, channels)


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
