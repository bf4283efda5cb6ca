"""Profiles a TPU kernel without a TPU: libtpu compiles it ahead of time and simulates it.

    python -m slm_kernels.profile attention --target v5e --shape S=4096,D=128 --against jax

Each Pallas kernel of the case is compiled and simulated alone, its operands in HBM; what XLA puts
around it (transposes, sums) is one more row, from the compiler's own estimate. Columns:

    cycles      simulated, of one call
    us          max(cycles / clock, HBM bytes / bandwidth)
    HBM         bytes that the simulated DMAs move
    least       bytes that have to move: the kernel's own cost estimate; in the last row, the case's
    floor us    least / bandwidth
    share       of the roofline: max(matrix flops, bytes, elementwise operations, exponentials,
                each at the chip's peak) / us
    bound       which of these is the largest
    spills      bundles that touch a spilled register, of all bundles of the program
    MXU ...     slots taken, of those that the program's bundles have

For `--target h100` there is no simulator: `slm_kernels.aot.gpu` prints what ptxas and the machine
code say (registers, spills, shared memory, counts of wgmma, TMA and MUFU instructions).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

from slm_kernels import table as compare
from slm_kernels.aot import TARGETS, Job, Target, compile_jobs, gpu, simulate
from slm_kernels.aot.compile import PallasCall
from slm_kernels.aot.gpu_targets import GPU_TARGETS, Kernel
from slm_kernels.cases import CASES, Work
from slm_kernels.cases.case import PUBLIC
from slm_kernels.search import search

_UNITS = ("MXU", "VALU", "EUP")


@dataclass(frozen=True)
class Row:
    """One line of the table; `None` where nothing is known.

    Attributes:
        kernel: its name, or what the line sums up.
        runs: calls in one run of the program.
        cycles: of one call.
        microseconds: of one call.
        hbm_bytes: moved by one call.
        least_bytes: that have to move.
        floor_microseconds: `least_bytes` at the chip's bandwidth.
        share: of the roofline.
        bound: what the roofline is made of there.
        bundles: of the program.
        spills: bundles with a spill.
        slots: share of slots taken, by unit.
        error: why the simulator gave up.
    """

    kernel: str
    runs: int = 1
    cycles: int | None = None
    microseconds: float | None = None
    hbm_bytes: int | None = None
    least_bytes: float | None = None
    floor_microseconds: float | None = None
    share: float | None = None
    bound: str | None = None
    bundles: int | None = None
    spills: int | None = None
    slots: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


def roofline(work: Work, target: Target) -> tuple[float, str]:
    """Seconds below which no program can do the work, and what it is bound by."""
    bounds = {
        "MXU": work.flops / target.flops,
        "HBM": work.bytes / target.bandwidth,
        "VALU": work.vector_ops / target.vector_ops,
        "EUP": work.transcendentals / target.transcendentals,
    }
    name = max(bounds, key=lambda n: bounds[n])
    return bounds[name], name


def kernel_row(
    call: PallasCall,
    work: Work,
    target: Target,
    cycles: int | None,
    trace: simulate.Trace | None,
    slots: simulate.Slots | None,
    error: str = "",
) -> Row:
    """One kernel's line from what its author says of it and what the simulator found."""
    # Two cores share a parallel grid: the trace is of one of them.
    cores = target.cores if call.split else 1
    moved = trace.bytes * cores if trace is not None and trace.known else None
    seconds = None
    if cycles:  # 0 is what the simulator says of what it does not model
        seconds = max(cycles / target.clock, (moved or work.bytes) / target.bandwidth)
    floor, bound = roofline(work, target)
    return Row(
        kernel=call.name,
        runs=call.runs,
        cycles=cycles,
        microseconds=None if seconds is None else seconds * 1e6,
        hbm_bytes=moved,
        least_bytes=work.bytes or None,
        floor_microseconds=work.bytes / target.bandwidth * 1e6 if work.bytes else None,
        share=floor / seconds if seconds and floor else None,
        bound=bound if floor else None,
        bundles=None if slots is None else slots.bundles,
        spills=None if slots is None else slots.spills,
        slots={} if slots is None else {unit: slots.use[unit] for unit in _UNITS},
        error=error,
    )


def profile(
    case: str,
    target: str,
    shape: Mapping[str, int],
    implementation: str,
    backward: bool,
    skip: int = 0,
) -> list[Row]:
    """Compiles and simulates one program.

    Args:
        case: a key of `CASES`.
        target: a key of `TARGETS`.
        shape: size of each axis.
        implementation: of the operation, or a public one that the case has in `against`.
        backward: forward and backward.
        skip: of the program's Pallas kernels, leave out so many at its beginning.

    Returns:
        A row a Pallas kernel, one for what XLA adds if it adds something, and the whole. A share
        of the roofline is said of kernels only where their cost estimates are ours.

    Raises:
        ValueError: if the program does not compile.
        FileNotFoundError: if libtpu is not installed.
    """
    chip = TARGETS[target]
    least = CASES[case].work(shape, backward)
    program = compile_jobs(target, [Job(case, shape, implementation, backward)])[0]
    if program.error:
        raise ValueError(f"kernel={case!r} does not compile for {target}: {program.error}")
    rows = []
    for i, call in list(enumerate(program.calls))[skip:]:
        job = Job(case, shape, implementation, backward, kernel=i)
        work = Work()
        if implementation == "tpu":
            # A kernel without matrix products in its analysis counts elementwise operations.
            flops, vector = (call.flops, 0.0) if least.flops else (0.0, call.flops)
            work = Work(flops, call.bytes, vector, call.transcendentals)
        rows.append(_simulated(target, job, call, work))
    rest = [o for o in simulate.operations(program.hlo) if not o.pallas and o.cycles]
    if rest:
        cycles = sum((o.cycles or 0) * o.runs for o in rest)
        name = f"{len(rest)} XLA operation{'s' if len(rest) > 1 else ''}"
        rows.append(Row(name, cycles=cycles, microseconds=cycles / chip.clock * 1e6))
    return [*rows, _whole(rows, least, chip)]


def measure(line: compare.Line) -> compare.Cell:
    """Simulates a line of the table: the Pallas kernels alone, or else all operations."""
    chip, shape = TARGETS[line.target], compare.shape(line)
    least, skip = CASES[line.case].work(shape, line.backward), 0
    if line.backward:
        there = CASES[line.case].work(shape, False)
        least = Work(*(a - b for a, b in zip(astuple(least), astuple(there), strict=True)))
        skip = 1  # the kernel of the forward pass
    use = line.case, line.target, shape, line.implementation, line.backward, skip
    try:
        *rows, _ = profile(*use)
    except ValueError as e:
        return compare.Cell(error=str(e))
    rows = [r for r in rows if r.bound is not None or r.bundles is not None] or rows
    if any(not r.cycles or r.microseconds is None for r in rows):
        return compare.Cell(error=next((r.error for r in rows if r.error), ""))
    time = sum((r.microseconds or 0) * r.runs for r in rows)
    floor, bound = roofline(least, chip)
    known = [r for r in rows if r.hbm_bytes is not None]
    return compare.Cell(
        cycles=sum((r.cycles or 0) * r.runs for r in rows),
        microseconds=time,
        hbm_bytes=sum((r.hbm_bytes or 0) * r.runs for r in known) if known else None,
        least_bytes=least.bytes,
        share=floor * 1e6 / time,
        bound=bound,
        spills=" + ".join(f"{r.spills}/{r.bundles}" for r in rows if r.bundles) or None,
    )


def _simulated(target: str, job: Job, call: PallasCall, work: Work) -> Row:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record = compile_jobs(target, [job], simulate.flags(folder))[0]
        error = record.error
        if error:  # what the program looks like is known without the simulator
            record = compile_jobs(target, [job], simulate.dump_flags(folder))[0]
        found = [o for o in simulate.operations(record.hlo) if o.pallas]
        if not found:
            return kernel_row(call, work, TARGETS[target], None, None, None, record.error or error)
        own = found[0].name
        trace = None if error else simulate.find_trace(folder, own)
        slots = simulate.find_slots(folder, own)
        return kernel_row(call, work, TARGETS[target], found[0].cycles, trace, slots, error)


def _whole(rows: Sequence[Row], least: Work, target: Target) -> Row:
    floor, bound = roofline(least, target)
    known = bool(rows) and all(r.microseconds is not None for r in rows)
    total = sum((r.microseconds or 0) * r.runs for r in rows)
    return Row(
        "whole",
        cycles=sum((r.cycles or 0) * r.runs for r in rows) if known else None,
        microseconds=total if known else None,
        least_bytes=least.bytes,
        floor_microseconds=least.bytes / target.bandwidth * 1e6,
        share=floor * 1e6 / total if known else None,
        bound=bound,
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; `-` is not known."""

    def number(x: float | None, form: str = ",.1f") -> str:
        return "-" if x is None else format(x, form)

    def megabytes(x: float | None) -> str:
        return "-" if x is None else f"{x / 1e6:,.2f} MB"

    lines = [
        ["kernel", "calls", "cycles", "us", "HBM", "least", "floor us", "share", "bound", "spills"]
    ]
    lines[0] += _UNITS
    for r in rows:
        lines.append(
            [
                r.kernel,
                str(r.runs),
                number(r.cycles, ",d"),
                number(r.microseconds),
                megabytes(r.hbm_bytes),
                megabytes(r.least_bytes),
                number(r.floor_microseconds),
                number(r.share, ".0%"),
                r.bound or "-",
                "-" if r.bundles is None else f"{r.spills}/{r.bundles}",
                *(number(r.slots.get(unit), ".0%") for unit in _UNITS),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    return "\n".join(text + [f"{r.kernel}: not simulated: {r.error}" for r in rows if r.error])


def parse_shape(text: str, default: Mapping[str, int]) -> dict[str, int]:
    """`"S=2048,D=64"` over the sizes of a case.

    Raises:
        ValueError: on an axis that the case has not, or a size that is no positive integer.
    """
    shape = dict(default)
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in default:
            raise ValueError(f"shape={text!r}: no axis {axis!r}: choose from {', '.join(default)}")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"shape={text!r}: {axis}={size!r} is no size: want a positive integer")
        shape[axis] = int(size)
    return shape


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m slm_kernels.profile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("kernel", choices=CASES, nargs="?", help="a case of slm_kernels.cases")
    parser.add_argument(
        "--target", choices=[*TARGETS, *GPU_TARGETS], default="v5e", help="(default v5e)"
    )
    parser.add_argument("--shape", nargs="+", default=[""], metavar="S=4096,D=128", help="sizes")
    parser.add_argument("--against", choices=("xla", *PUBLIC), help="profile this one too")
    parser.add_argument(
        "--block-sizes", choices=("search",), help="simulate the case's candidates, store the best"
    )
    parser.add_argument("--backward", action="store_true", help="forward and gradients")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="fill the table there (slm_kernels.table)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    args = parser.parse_args(argv)
    if (args.kernel is None) == (args.table is None):
        parser.error("want a kernel, or --table FILE")
    try:
        if args.table is not None:
            compare.write(args.table, measure)
        results = [] if args.table is not None else _run(args)
    except (ValueError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    for limit in gpu.LIMITS if args.target in GPU_TARGETS else simulate.LIMITS:
        print(f"* {limit}")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _run(args: argparse.Namespace) -> list[dict[str, object]]:
    shapes = [parse_shape(text, CASES[args.kernel].shape) for text in args.shape]
    results: list[dict[str, object]] = []
    on_gpu = args.target in GPU_TARGETS
    if on_gpu and (args.against in PUBLIC or args.block_sizes):
        wrong = "block-sizes='search'" if args.block_sizes else f"against={args.against!r}"
        raise ValueError(f"{wrong}: only for TPUs: choose another target than {args.target}")
    for shape in shapes:
        if args.block_sizes:
            entry = search(args.kernel, args.target, shape, args.backward)
            results.append(asdict(entry))
            continue
        for implementation in ["gpu" if on_gpu else "tpu", *filter(None, [args.against])]:
            use = args.kernel, args.target, shape, implementation, args.backward
            rows: Sequence[Row] | Sequence[Kernel]
            if on_gpu:
                record = gpu.profile(*use)
                least = CASES[args.kernel].work(shape, args.backward)
                text, rows = gpu.table(record, least, GPU_TARGETS[args.target]), record.kernels
            else:
                rows = profile(*use)
                text = table(rows)
            sizes = ",".join(f"{axis}={n}" for axis, n in shape.items())
            passes = "forward and backward" if args.backward else "forward"
            print(f"{args.kernel} {sizes} on {args.target}, {passes}: {implementation}")
            print(text + "\n", flush=True)
            results.append(
                {
                    "kernel": args.kernel,
                    "target": args.target,
                    "shape": shape,
                    "implementation": implementation,
                    "backward": args.backward,
                    "rows": [asdict(row) for row in rows],
                }
            )
    return results


if __name__ == "__main__":
    sys.exit(main())
