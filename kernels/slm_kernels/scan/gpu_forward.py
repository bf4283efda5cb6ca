"""Forward kernels of the scan on Hopper, and what they share with the backward: see `gpu.py`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from slm_kernels import pallas

CHANNELS = 128  # of a block: one a thread
ROWS = 64  # of a sum over channels: the steps of a group times the states
GROUPS = 8  # of steps in a piece
SLOTS = 2  # pieces in shared memory; a power of two
F32 = jnp.float32
_SHARED = ("b", "c", "reset")  # by all channels
_BY_CHANNEL = plgpu.Layout.WG_STRIDED((CHANNELS,), 1)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays are cut.

    Attributes:
        n: states, 16 or 32.
        spans: parts of a row that are scanned side by side.
        pieces: of a span.
    """

    n: int
    spans: int
    pieces: int

    @property
    def group(self) -> int:
        """Steps whose states are in registers together on the way back."""
        return ROWS // self.n

    @property
    def piece(self) -> int:
        """Steps that are copied together, and that a saved state is kept for."""
        return GROUPS * self.group

    @property
    def steps(self) -> int:
        """Steps of a row, padding included."""
        return self.spans * self.pieces * self.piece


Refs = Mapping[str, Any]


def launch(
    body: Callable[[Refs], None],
    name: str,
    grid: tuple[int, int, int],
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    scratch: Mapping[str, Any],
    *,
    flops: int,
    exps: int,
) -> dict[str, Any]:
    """Runs a kernel on a grid of blocks of channels, spans and rows of the batch.

    Args:
        body: called with the references to memory by name; those of what is `None` are left out.
        name: of the kernel.
        grid: blocks, spans, rows.
        inputs: arrays.
        outputs: what is written.
        scratch: shared memory and barriers.
        flops: floating-point operations, without exponentials.
        exps: exponentials.

    Returns:
        The outputs by name.
    """
    given = {k: x for k, x in inputs.items() if x is not None}
    wanted = {k: x for k, x in outputs.items() if x is not None}
    names = [*given, *wanted, *scratch]
    moved: list[Any] = [*given.values(), *wanted.values()]
    out = plgpu.kernel(
        lambda *refs: body(dict(zip(names, refs, strict=True))),
        out_type=list(wanted.values()),
        grid=grid,
        grid_names=("block", "span", "row"),
        scratch_types=list(scratch.values()),
        kernel_name=name,
        # exp2 to 2 ulp by the special function unit. A thread has channels of its own: where one
        # reads what another wrote the kernels say so.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=exps,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        ),
        interpret=pallas.interpret(),
    )(*given.values())
    return dict(zip(wanted, out, strict=True))


def load(ref: Any) -> jax.Array:
    """128 channels as float32, one a thread."""
    return plgpu.load(ref, layout=_BY_CHANNEL).astype(F32)


def zeros(n: int) -> list[jax.Array]:
    """`n` times 128 channels of zeros."""
    return [plgpu.layout_cast(jnp.zeros((CHANNELS,), F32), _BY_CHANNEL) for _ in range(n)]


def place() -> tuple[Any, Any, Any]:
    """Row of the batch, span and channels of this block."""
    row, span, block = (jax.lax.axis_index(axis) for axis in ("row", "span", "block"))
    return row, span, pl.ds(block * CHANNELS, CHANNELS)


def slots(lay: Layout, arrays: Mapping[str, jax.Array | None]) -> dict[str, Any]:
    """Shared memory for pieces of arrays `[B, L, D]`, `[B, L, N]` or `[B, L]`, and a barrier."""
    given = {k: x for k, x in arrays.items() if x is not None}
    width = {k: x.shape[2:] if k in _SHARED else (CHANNELS,) for k, x in given.items()}
    memory = {
        f"{k}_s": plgpu.SMEM((SLOTS, lay.piece, *width[k]), x.dtype) for k, x in given.items()
    }
    return memory | {"ready": plgpu.Barrier(num_arrivals=len(given), num_barriers=SLOTS)}


def over_pieces(
    x: Refs,
    lay: Layout,
    names: Sequence[str],
    body: Callable[[Any, Any, list[jax.Array]], list[jax.Array]],
    carry: list[jax.Array],
    *,
    span: Any,
    backwards: bool = False,
) -> list[jax.Array]:
    """Calls `body(piece of the row, slot, carry)` with one piece after another in shared memory.

    Args:
        x: references; piece of `x[k]` goes to `x[f"{k}_s"]` at the slot.
        lay: how arrays are cut.
        names: what to copy.
        body: may change what is in its slot; returns the new carry.
        carry: at first.
        span: which part of the row.
        backwards: the last piece first.
    """
    row, _, channels = place()

    def at(i: Any) -> Any:
        return span * lay.pieces + (lay.pieces - 1 - i if backwards else i)

    def fetch(i: Any) -> None:
        slot, steps = i & (SLOTS - 1), pl.ds(at(i) * lay.piece, lay.piece)
        for k in names:
            part = (row, steps) if k in _SHARED else (row, steps, channels)
            plgpu.copy_gmem_to_smem(x[k].at[part], x[f"{k}_s"].at[slot], x["ready"].at[slot])

    for i in range(min(SLOTS, lay.pieces)):
        fetch(i)

    def one(i: Any, carry: list[jax.Array]) -> list[jax.Array]:
        slot = i & (SLOTS - 1)
        plgpu.barrier_wait(x["ready"].at[slot])
        carry = body(at(i), slot, carry)
        plgpu.commit_smem()  # everyone has read the slot

        @pl.when(i + SLOTS < lay.pieces)
        def _() -> None:
            fetch(i + SLOTS)

        return carry

    return jax.lax.fori_loop(0, lay.pieces, one, carry)


class Steps:
    """What (1) and (2) need of the steps of a piece in shared memory.

    Attributes:
        a2: decay rates times log2(e), 128 channels for each state.
    """

    def __init__(self, x: Refs, slot: Any, a2: list[jax.Array]) -> None:
        self._x, self._slot, self.a2 = x, slot, a2

    def channels(self, name: str, t: Any) -> jax.Array:
        """128 channels of an array at a step, float32."""
        return load(self._x[f"{name}_s"].at[self._slot, t])

    def scalar(self, name: str, t: Any, n: int) -> jax.Array:
        """What all channels share of a state at a step."""
        return self._x[f"{name}_s"][self._slot, t, n]

    def long(self, t: Any, dt: jax.Array) -> jax.Array:
        """The step size, endless where a document begins."""
        return dt + self._x["reset_s"][self._slot, t] if "reset" in self._x else dt

    def advance(
        self, t: Any, h: list[jax.Array], long: jax.Array, dtu: jax.Array
    ) -> list[jax.Array]:
        """The states after a step, (2)."""
        return [
            jnp.exp2(long * a2) * state + dtu * self.scalar("b", t, n)
            for n, (a2, state) in enumerate(zip(self.a2, h, strict=True))
        ]


def rates(x: Refs, lay: Layout) -> list[jax.Array]:
    """Decay rates of this block's channels times log2(e), state by state."""
    _, _, channels = place()
    return [load(x["a2"].at[n, channels]) for n in range(lay.n)]


def passed_on(
    x: Refs, lay: Layout, a2: list[jax.Array], names: tuple[str, str], n_spans: Any, nth: Any
) -> list[jax.Array]:
    """What comes into a span through others, (10) or (11).

    Args:
        x: references.
        lay: how arrays are cut.
        a2: decay rates times log2(e).
        names: of what comes into the row, `[B, N, D]`, and of what spans add, `[B, spans, N, D]`.
        n_spans: how many it goes through.
        nth: the number of the i-th of them.
    """
    row, _, channels = place()
    first, added = names

    def through(i: Any, carry: list[jax.Array]) -> list[jax.Array]:
        total = load(x["totals"].at[row, nth(i), channels])
        return [
            jnp.exp2(total * a2[n]) * carry[n] + load(x[added].at[row, nth(i), n, channels])
            for n in range(lay.n)
        ]

    carry = [load(x[first].at[row, n, channels]) for n in range(lay.n)]
    if lay.spans == 1:
        return carry
    return jax.lax.fori_loop(0, n_spans, through, carry)


def scan_from_zero(
    body: Callable[[Refs, Layout], None],
    name: str,
    lay: Layout,
    inputs: Mapping[str, Any],
    a2: jax.Array,
) -> dict[str, Any]:
    """What each span but one adds and how long it is, by a kernel of its own.

    Args:
        body: writes `ends` and `totals`.
        name: of the kernel.
        lay: how arrays are cut.
        inputs: what comes in pieces, `dt` `[B, L, D]` among it.
        a2: decay rates times log2(e), `[N, D]`.

    Returns:
        `ends` `[B, spans - 1, N, D]` and `totals` `[B, spans - 1, D]`; neither for a single span.
    """
    if lay.spans == 1:
        return {}
    batch, length, width = inputs["dt"].shape
    n_spans, work = lay.spans - 1, batch * length * width * lay.n
    return launch(
        lambda x: body(x, lay),
        name,
        (width // CHANNELS, n_spans, batch),
        {**inputs, "a2": a2},
        {
            "ends": jax.ShapeDtypeStruct((batch, n_spans, lay.n, width), F32),
            "totals": jax.ShapeDtypeStruct((batch, n_spans, width), F32),
        },
        slots(lay, inputs),
        flops=4 * work,
        exps=work,
    )


# --- forward


def _ends_kernel(x: Refs, lay: Layout) -> None:
    row, span, channels = place()
    a2 = rates(x, lay)

    def piece(_: Any, slot: Any, carry: list[jax.Array]) -> list[jax.Array]:
        s = Steps(x, slot, a2)

        def step(t: Any, carry: list[jax.Array]) -> list[jax.Array]:
            *h, total = carry
            dt = s.channels("dt", t)
            long = s.long(t, dt)
            return [*s.advance(t, h, long, dt * s.channels("u", t)), total + long]

        return jax.lax.fori_loop(0, lay.piece, step, carry)

    names = [k for k in ("u", "dt", "b", "reset") if k in x]
    *h, total = over_pieces(x, lay, names, piece, zeros(lay.n + 1), span=span)
    for n in range(lay.n):
        x["ends"].at[row, span, n, channels][...] = h[n]
    x["totals"].at[row, span, channels][...] = total


def _forward_kernel(x: Refs, lay: Layout) -> None:
    row, span, channels = place()
    a2, skip = rates(x, lay), load(x["d"].at[channels])
    h = passed_on(x, lay, a2, ("initial", "ends"), span, lambda i: i)

    def piece(i: Any, slot: Any, h: list[jax.Array]) -> list[jax.Array]:
        s = Steps(x, slot, a2)
        if "starts" in x:
            for n in range(lay.n):
                x["starts"].at[row, i, n, channels][...] = h[n]

        def step(t: Any, h: list[jax.Array]) -> list[jax.Array]:
            u, dt = s.channels("u", t), s.channels("dt", t)
            h = s.advance(t, h, s.long(t, dt), dt * u)
            y = skip * u
            for n in range(lay.n):
                y += h[n] * s.scalar("c", t, n)
            x["y_s"].at[t][...] = y.astype(x["y"].dtype)
            return h

        plgpu.wait_smem_to_gmem(0)  # the results of the piece before have left
        h = jax.lax.fori_loop(0, lay.piece, step, h)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x["y_s"], x["y"].at[row, pl.ds(i * lay.piece, lay.piece), channels])
        return h

    names = [k for k in ("u", "dt", "b", "c", "reset") if k in x]
    h = over_pieces(x, lay, names, piece, h, span=span)
    plgpu.wait_smem_to_gmem(0)

    @pl.when(span == lay.spans - 1)
    def _() -> None:
        for n in range(lay.n):
            x["last"].at[row, n, channels][...] = h[n]


def forward(lay: Layout, save: bool, args: Mapping[str, Any]) -> dict[str, Any]:
    """`y`, `last`, and with `save` the states that the backward pass begins from, `starts`.

    Args:
        lay: how the arrays are cut.
        save: whether a backward pass follows.
        args: `u` and `dt` `[B, L, D]`, `a2` `[N, D]`, `b` and `c` `[B, L, N]`, `d` `[D]`, `reset`
            `[B, L]` float32 or `None`, `initial` `[B, N, D]`; L and D whole spans and blocks.

    Returns:
        `y` `[B, L, D]`, `last` `[B, N, D]`, `starts` `[B, L / piece, N, D]`.
    """
    u = args["u"]
    batch, length, width = u.shape
    blocks, work = width // CHANNELS, u.size * lay.n

    def result(*shape: int, dtype: Any = F32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    first = {k: args[k] for k in ("u", "dt", "b", "reset")}
    ends = scan_from_zero(_ends_kernel, "selective_scan_ends", lay, first, args["a2"])
    inputs = {k: args[k] for k in ("u", "dt", "b", "c", "reset")}
    return launch(
        lambda x: _forward_kernel(x, lay),
        "selective_scan_forward",
        (blocks, lay.spans, batch),
        inputs | {k: args[k] for k in ("a2", "d", "initial")} | ends,
        {
            "y": result(length, width, dtype=u.dtype),
            "last": result(lay.n, width),
            "starts": result(length // lay.piece, lay.n, width) if save else None,
        },
        slots(lay, inputs) | {"y_s": plgpu.SMEM((lay.piece, CHANNELS), u.dtype)},
        flops=6 * work + 3 * u.size,
        exps=work,
    )
