"""Kernels of the TPU recurrence, forward and backward: see `tpu.py`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slm_kernels.pallas import interpret

LANES, TILE = 128, 8
F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays are cut: see `tpu.py`."""

    length: int  # steps, a multiple of the tile
    chunk: int  # of them in a grid step
    groups: int  # of 128 channels
    block: int  # of them in a grid step

    @property
    def blocks(self) -> int:
        """Grid steps in channels; the last may hold fewer groups."""
        return -(-self.groups // self.block)

    @property
    def parts(self) -> list[slice]:
        """Groups of a block that fill a register."""
        return [slice(g, min(g + 8, self.block)) for g in range(0, self.block, 8)]

    @property
    def chunks(self) -> int:
        """Grid steps in time; the last may be shorter."""
        return -(-self.length // self.chunk)

    @property
    def tail(self) -> int:
        """Steps of the last chunk."""
        return self.length - (self.chunks - 1) * self.chunk

    def tiles(self, x: jax.Array, padding: int) -> jax.Array:
        """`[B, L, D]` to `[B, L / 8, groups * 8, 128]`; steps are padded with `padding`."""
        pad = (0, self.length - x.shape[1]), (0, self.groups * LANES - x.shape[2])
        x = jnp.pad(x, ((0, 0), *pad), constant_values=padding)
        x = x.reshape(x.shape[0], -1, TILE, self.groups, LANES).swapaxes(2, 3)
        return x.reshape(x.shape[0], -1, self.groups * TILE, LANES)

    def untile(self, x: jax.Array) -> jax.Array:
        """The inverse of `tiles`, padding included."""
        x = x.reshape(x.shape[0], -1, self.groups, TILE, LANES).swapaxes(2, 3)
        return x.reshape(x.shape[0], -1, self.groups * LANES)

    def state(self, x: jax.Array) -> jax.Array:
        """`[B, D]` to `[B, blocks, groups of a block, 128]`."""
        x = jnp.pad(x, ((0, 0), (0, self.blocks * self.block * LANES - x.shape[1])))
        return x.reshape(x.shape[0], self.blocks, self.block, LANES)


class Steps:
    """A `[T / 8, groups * 8, 128]` block, read and written a step `[S, 128]` at a time."""

    def __init__(self, ref: Any, wide: Any):
        # Loads with a stride are of 32 bits: bfloat16 goes through a float32 copy.
        self.ref = ref if wide is None else wide
        self.narrow = None if wide is None else ref

    def widen(self) -> "Steps":
        """To be called before reading."""
        if self.narrow is not None:
            self.ref[...] = self.narrow[...].astype(F32)
        return self

    def store(self) -> None:
        """To be called after writing."""
        if self.narrow is not None:
            self.narrow[...] = self.ref[...].astype(self.narrow.dtype)

    def _at(self, i: Any, j: int, part: slice) -> tuple[Any, ...]:
        rows = pl.ds(part.start * TILE + j, part.stop - part.start, stride=TILE)
        return i, rows, slice(None)

    def get(self, i: Any, j: int, part: slice) -> jax.Array:
        """Groups `part` of step TILE * i + j."""
        return self.ref[self._at(i, j, part)]

    def set(self, i: Any, j: int, part: slice, value: jax.Array) -> None:
        """Writes them."""
        self.ref[self._at(i, j, part)] = value


def _keep(x: dict[str, Any], lay: Layout) -> Any:
    """A function of the step that gives k_t, or None for 1 everywhere.

    A product with ones spreads the flags `[16, T]`, one row of them not zero, over the lanes.
    """
    if x["flags"] is None:
        return None
    ones = jnp.ones((16, LANES), jnp.bfloat16)
    x["keep"][...] = 1.0 - jax.lax.dot_general(
        x["flags"][...], ones, (((0,), (0,)), ((), ())), preferred_element_type=F32
    )
    return lambda i, j, part: jnp.broadcast_to(
        x["keep"][pl.ds(i * TILE + j, 1), :], (part.stop - part.start, LANES)
    )


def _turns(lay: Layout, chunk: Any) -> Any:
    """Tiles of this chunk."""
    whole, tail = lay.chunk // TILE, lay.tail // TILE
    return whole if whole == tail else jnp.where(chunk == lay.chunks - 1, tail, whole)


def _run(state: Any, lay: Layout, turns: Any, steps: Any) -> None:
    """Takes the state, part by part, through `turns` tiles."""
    parts = jax.lax.fori_loop(0, turns, steps, [state[part] for part in lay.parts])
    for part, value in zip(lay.parts, parts, strict=True):
        state[part] = value


def _call(
    kernel: Any,
    lay: Layout,
    at: Any,
    inputs: dict[str, jax.Array | None],
    outputs: dict[str, jax.ShapeDtypeStruct | None],
    *,
    name: str,
    flops: int,
) -> dict[str, Any]:
    """`pallas_call` by names, an entry that is None being None in the kernel too.

    Args:
        kernel: called with the references by name, and the layout.
        lay: how the arrays are cut.
        at: maps the grid's time axis to the chunk.
        inputs: arrays in tiles `[B, L / 8, groups * 8, 128]`, states `[B, blocks, G, 128]` of
            G groups, states at chunk starts `[B, chunks, blocks, G, 128]` or flags
            `[B, chunks, 16, T]`.
        outputs: likewise.
        name: of the kernel.
        flops: that it does.
    """
    ins: dict[str, Any] = {k: x for k, x in inputs.items() if x is not None}
    outs: dict[str, Any] = {k: x for k, x in outputs.items() if x is not None}
    scratch = {"state": pltpu.VMEM((lay.block, LANES), F32)}
    if "flags" in ins:
        scratch["keep"] = pltpu.VMEM((lay.chunk, LANES), F32)

    def spec(name: str, x: Any) -> pl.BlockSpec:
        if name == "flags":
            return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, d, t: (b, at(t), 0, 0))
        if x.ndim == 5:
            return pl.BlockSpec(
                (None, None, None, *x.shape[3:]), lambda b, d, t: (b, at(t), d, 0, 0)
            )
        if name in ("h0", "last", "dlast", "dh0"):
            return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, d, t: (b, d, 0, 0))
        shape = lay.chunk // TILE, lay.block * TILE, LANES
        if x.dtype != F32:
            scratch[f"{name}_wide"] = pltpu.VMEM(shape, F32)
        return pl.BlockSpec((None, *shape), lambda b, d, t: (b, at(t), d, 0))

    in_specs, out_specs = ([spec(k, x) for k, x in part.items()] for part in (ins, outs))
    names = [*ins, *outs, *scratch]
    missing = dict.fromkeys(
        [*inputs, *outputs, "keep", *(f"{k}_wide" for k in (*inputs, *outputs))]
    )
    arrays = [*ins.values(), *outs.values()]
    blocks: list[Any] = [*in_specs, *out_specs]
    held = sum(4 * math.prod(s.shape) for s in scratch.values()) + 2 * sum(
        math.prod(n or 1 for n in s.block_shape) * x.dtype.itemsize
        for s, x in zip(blocks, arrays, strict=True)
    )
    got = pl.pallas_call(
        lambda *refs: kernel(missing | dict(zip(names, refs, strict=True)), lay),
        grid=(arrays[0].shape[0], lay.blocks, lay.chunks),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=list(outs.values()),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=held * 5 // 4 + 2**22,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=0,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        ),
        interpret=interpret(),
        name=name,
    )(*ins.values())
    return dict.fromkeys(outputs) | dict(zip(outs, got, strict=True))


# --- forward


def _forward_kernel(x: dict[str, Any], lay: Layout) -> None:
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _() -> None:
        x["state"][...] = x["h0"][...]

    if x["starts"] is not None:
        x["starts"][...] = x["state"][...]
    a, b, h = (Steps(x[k], x[f"{k}_wide"]) for k in ("a", "b", "h"))
    a.widen()
    b.widen()
    keep = _keep(x, lay)

    def steps(i: jax.Array, states: list[jax.Array]) -> list[jax.Array]:
        states = list(states)
        for j in range(TILE):
            for p, part in enumerate(lay.parts):
                decay = a.get(i, j, part)
                if keep is not None:
                    decay = decay * keep(i, j, part)
                states[p] = decay * states[p] + b.get(i, j, part)  # (1)
                h.set(i, j, part, states[p])
        return states

    _run(x["state"], lay, _turns(lay, chunk), steps)
    h.store()

    @pl.when(chunk == lay.chunks - 1)
    def _() -> None:
        x["last"][...] = x["state"][...]


def forward(lay: Layout, save: bool, a: Any, b: Any, h0: Any, flags: Any) -> dict[str, Any]:
    """`h` and `last`, and with `save` the states before each chunk."""
    starts = (h0.shape[0], lay.chunks, *h0.shape[1:])
    return _call(
        _forward_kernel,
        lay,
        lambda t: t,
        {"a": a, "b": b, "h0": h0, "flags": flags},
        {
            "h": jax.ShapeDtypeStruct(b.shape, b.dtype),
            "last": jax.ShapeDtypeStruct(h0.shape, F32),
            "starts": jax.ShapeDtypeStruct(starts, F32) if save else None,
        },
        name="linear_recurrence_forward",
        flops=(2 if flags is None else 3) * b.size,
    )


# --- backward


def _backward_kernel(x: dict[str, Any], lay: Layout) -> None:
    chunk = lay.chunks - 1 - pl.program_id(2)

    @pl.when(chunk == lay.chunks - 1)
    def _() -> None:
        x["state"][...] = x["dlast"][...]

    a, h, dh, da, db = (Steps(x[k], x[f"{k}_wide"]) for k in ("a", "h", "dh", "da", "db"))
    for read in (a, h, dh):
        read.widen()
    keep = _keep(x, lay)
    turns = _turns(lay, chunk)

    def before(i: jax.Array, j: int, part: slice) -> jax.Array:
        if j:
            return h.get(i, j - 1, part)
        last = h.get(jnp.maximum(i - 1, 0), TILE - 1, part)
        return jnp.where(i == 0, x["starts"][part], last)

    def steps(turn: jax.Array, es: list[jax.Array]) -> list[jax.Array]:
        i, es = turns - 1 - turn, list(es)
        for j in reversed(range(TILE)):
            for p, part in enumerate(lay.parts):
                g = es[p] + dh.get(i, j, part)  # (3)
                db.set(i, j, part, g)
                if keep is not None:
                    g = g * keep(i, j, part)
                da.set(i, j, part, g * before(i, j, part))  # (4)
                es[p] = g * a.get(i, j, part)
        return es

    _run(x["state"], lay, turns, steps)
    da.store()
    db.store()

    @pl.when(chunk == 0)
    def _() -> None:
        x["dh0"][...] = x["state"][...]


def backward(
    lay: Layout, a: Any, h: Any, starts: Any, flags: Any, dh: Any, dlast: Any
) -> dict[str, Any]:
    """Gradients of a, b and h0; that of b has the shape and dtype of `h`."""
    return _call(
        _backward_kernel,
        lay,
        lambda t: lay.chunks - 1 - t,
        {"a": a, "h": h, "dh": dh, "dlast": dlast, "starts": starts, "flags": flags},
        {
            "da": jax.ShapeDtypeStruct(a.shape, a.dtype),
            "db": jax.ShapeDtypeStruct(h.shape, h.dtype),
            "dh0": jax.ShapeDtypeStruct(dlast.shape, F32),
        },
        name="linear_recurrence_backward",
        flops=(3 if flags is None else 4) * h.size,
    )
