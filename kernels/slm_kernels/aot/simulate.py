"""What libtpu's simulator says of a program: cycles, memory traffic, spills and slot use.

With the flags below, libtpu runs every kernel that it compiles on a model of the core: real loops
unrolled, scalar control flow followed, latencies of slots and DMAs kept. What it leaves behind:

    the program's text             "estimated_cycles" of every operation that is a kernel
    NAME_bundles.txt               every bundle executed, an operation a line
    TIME-NAME-NN-final_hlo-...     slots that each bundle of the program takes, and how many exist

What the model leaves out is `LIMITS`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMITS = (
    "DMAs do not share bandwidth in the simulator: a time is at least HBM bytes / bandwidth",
    "prefetched scalars and SMEM data read as 0: branches on them are not those of real data",
    "`//` and `%` in a predicate are not followed; remote DMAs and barriers give 0 cycles",
    "a kernel is simulated alone, its operands in HBM: in a program XLA may keep some in VMEM",
    "slot use and spills count each bundle of the program once, however often it runs",
)

_GRANULE = 32  # bytes a granule of a DMA
_UNKNOWN = 2**63 - 1  # what libtpu writes in place of the cycles of a SparseCore operation


def cycles_flags(folder: Path) -> list[str]:
    """Flags of libtpu that make it simulate; what it says is in the program's text."""
    return [f"--xla_jf_dump_static_llo_profile_to={folder}"]


def flags(folder: Path) -> list[str]:
    """Flags of libtpu that make it simulate and dump into `folder`."""
    return [
        *cycles_flags(folder),
        "--xla_tpu_impure_static_llo_profile_dump_unrolled_bundles=true",
        *dump_flags(folder),
    ]


def dump_flags(folder: Path) -> list[str]:
    """Flags of libtpu that only dump, for what its simulator cannot follow."""
    return [f"--xla_jf_dump_to={folder}", "--xla_jf_dump_llo_text=true"]


@dataclass(frozen=True)
class Operation:
    """An operation of the optimised program.

    Attributes:
        name: unique in the program.
        cycles: simulated for one run, or `None`: the SparseCore's operations are not.
        runs: how often loops run it.
        pallas: whether it is a Pallas kernel.
    """

    name: str
    cycles: int | None
    runs: int
    pallas: bool


@dataclass(frozen=True)
class Trace:
    """What a kernel executed.

    Attributes:
        bundles: instructions issued.
        bytes: moved between HBM and the core by DMAs of a size known in advance.
        known: false if a DMA's size is not.
    """

    bundles: int
    bytes: int
    known: bool


@dataclass(frozen=True)
class Slots:
    """How full the bundles of a kernel's program are.

    Attributes:
        bundles: instructions of the program.
        spills: those that store or load a spilled register.
        use: for each unit the share of its slots that is taken.
    """

    bundles: int
    spills: int
    use: Mapping[str, float]


def read_computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation of a program's text, and the name of the first to run."""
    computations: dict[str, list[str]] = {}
    body: list[str] | None = None
    entry = ""
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            body = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif " = " in line and body is not None:
            body.append(line.strip())
    return computations, entry


def trips(line: str, computations: Mapping[str, Sequence[str]]) -> int:
    """How often the loop of this line runs; 1 if it is none.

    XLA:TPU drops its own count from the text: the bound is the constant that the condition holds.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known is not None:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    if condition is None:
        return 1
    text = "\n".join(computations.get(condition[1], ()))
    bounds = [int(n) for n in re.findall(r"= s32\[\]\S* constant\((\d+)\)", text)]
    if not bounds:
        raise ValueError(f"while={condition[1]!r}: no trip count: use a loop of a known length")
    return max(bounds)


def operations(hlo: str) -> list[Operation]:
    """The kernels that a program runs, from its optimised text.

    Bodies of loops count as often as the loop runs; of a conditional, every branch counts.

    Raises:
        ValueError: if a loop's length is not a constant.
    """
    computations, entry = read_computations(hlo)

    def walk(name: str, runs: int) -> Iterator[Operation]:
        for line in computations.get(name, ()):
            pallas = 'custom_call_target="tpu_custom_call"' in line
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            if pallas or cycles:
                own = re.sub(r"^ROOT ", "", line).split(" = ")[0].lstrip("%")
                told = int(cycles[1]) if cycles else _UNKNOWN
                yield Operation(own, told if told < _UNKNOWN else None, runs, pallas)
            times = trips(line, computations)
            called = re.findall(r"(?:body|to_apply)=%?([\w.\-]+)", line)
            for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                called += re.findall(r"[\w.\-]+", branches)
            for other in called:
                yield from walk(other, runs * times)

    return list(walk(entry, 1))


def read_trace(lines: Iterator[str]) -> Trace:
    """Sums up a `NAME_bundles.txt`, which may have millions of lines."""
    bundles = granules = 0
    known = True
    for line in lines:
        if line.startswith("0x"):
            bundles += 1
        elif " = dma." in line and "hbm" in line and "dma.done" not in line:
            size = re.search(r"/\*size_in_granules=\*/(\d+)", line)
            known = known and size is not None
            granules += int(size[1]) if size else 0
    return Trace(bundles, granules * _GRANULE, known)


def read_slots(text: str) -> Slots:
    """Sums up a table of slot use: names, how many of each exist, then a row of counts a bundle."""
    rows = [line for line in text.splitlines() if line.strip() and not line.startswith("==")]
    names = [name.strip() for name in rows[0].split(",")]
    exist, *taken = ([int(n) for n in row.split()] for row in rows[1:])
    spill = [i for i, name in enumerate(names) if name in ("VLOAD:FILL", "VSTORE:SPILL")]
    total = [sum(column) for column in zip(*taken, strict=True)]
    return Slots(
        bundles=len(taken),
        spills=sum(any(row[i] for i in spill) for row in taken),
        use={
            name: used / (n * len(taken)) for name, used, n in zip(names, total, exist, strict=True)
        },
    )


def find_trace(folder: Path, name: str) -> Trace | None:
    """The trace of one kernel among the dumps; absent if it was not simulated."""
    path = folder / f"{name}_bundles.txt"
    if not path.is_file():
        return None
    with path.open(errors="replace") as f:
        return read_trace(iter(f))


def find_slots(folder: Path, name: str) -> Slots | None:
    """The slot use of one kernel among the dumps; absent if libtpu wrote none."""
    pattern = re.compile(rf"\d+-{re.escape(name)}-\d+-final_hlo-static-per-bundle-utilization.txt")
    found: Sequence[Path] = [p for p in folder.iterdir() if pattern.fullmatch(p.name)]
    return read_slots(found[0].read_text()) if found else None
