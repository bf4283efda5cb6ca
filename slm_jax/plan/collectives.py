"""Collectives of a compiled program, read from its optimised text."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from slm_kernels.aot.simulate import read_computations, trips

_OF_SLICES = " of slices"
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(
    rf"= (?P<type>.*?) (?:ragged-)?(?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\("
)
# What libtpu makes of a collective that leaves the slice: hosts pass it on.
_LEAVING = re.compile(
    r"= \((?P<type>[^()]*\{.*?\}), .*? send\(.*_xla_megascale_target=\"\{(?P<slices>[\d,]+)\}.*"
    r"_xla_megascale_transfer_type=\"(?P<kind>\w+)\""
)
_ARRAY = re.compile(r"\b([a-z]+)(\d+)?[a-z0-9]*\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind, size and group in one run of a program.

    Attributes:
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all` or `collective-permute`;
            with ` of slices` what goes over the network between slices of TPUs.
        count: how many are run.
        bytes: of the whole array on one device, of all of them: what an all-gather gives and a
            reduce-scatter takes.
        sent: that one device has to send at least, of all of them.
        group: devices that take part; slices, of those between them.
    """

    kind: str
    count: int
    bytes: int
    sent: float
    group: int

    @property
    def leaves_slice(self) -> bool:
        """Whether it goes over the network between slices, not over the links of chips."""
        return self.kind.endswith(_OF_SLICES)


def read_collectives(hlo: str, n_devices: int) -> list[Collective]:
    """The collectives that a program runs on a device, loops multiplied out, largest first.

    TPU compilers hide them in fusions: an asynchronous all-gather stands in the fusions that start
    it, go on with it and end it, and an all-reduce of which each device keeps a part is a
    reduce-scatter.

    Args:
        hlo: optimised text.
        n_devices: group of a collective that names none.

    Raises:
        ValueError: if a loop with a collective in it has no constant length.
    """
    computations, entry = read_computations(hlo)
    sums: dict[tuple[str, int], list[float]] = {}
    for kind, size, group, runs in _walk(entry, 1, computations, n_devices):
        total = sums.setdefault((kind, group), [0, 0, 0.0])
        total[0] += runs
        total[1] += size * runs
        total[2] += _sent(kind, size, group) * runs
    found = [
        Collective(kind, int(count), int(size), sent, group)
        for (kind, group), (count, size, sent) in sums.items()
    ]
    return sorted(found, key=lambda c: -c.sent)


def _sent(kind: str, size: int, group: int) -> float:
    """Bytes that a device has to send: all but its own part, twice in an all-reduce."""
    if kind == "collective-permute":
        return float(size)
    return size * (group - 1) / group * (2 if kind.startswith("all-reduce") else 1)


def _walk(
    name: str, runs: int, computations: Mapping[str, Sequence[str]], n_devices: int
) -> Iterator[tuple[str, int, int, int]]:
    """(kind, bytes, group, runs) of every collective below a computation of the control flow."""
    seen: set[str] = set()
    for line in computations.get(name, ()):
        for kind, size, group, identity in _inside(name, line, computations, n_devices):
            if identity is None or identity not in seen:
                yield kind, size, group, runs
                seen |= {identity} if identity else set()
        called = re.findall(r"(?:body|true_computation|false_computation)=%?([\w.\-]+)", line)
        for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
            called += re.findall(r"[\w.\-]+", branches)
        if re.search(r" (?:call|call-start|async-start)\(", line):
            called += re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line)
        inner = [c for other in called for c in _walk(other, 1, computations, n_devices)]
        if inner:
            times = trips(line, computations)
            yield from ((kind, size, group, n * runs * times) for kind, size, group, n in inner)


def _inside(
    owner: str, line: str, computations: Mapping[str, Sequence[str]], n_devices: int
) -> Iterator[tuple[str, int, int, str | None]]:
    """(kind, bytes, group, identity) of an instruction, or of those in the fusion that it calls."""
    if " fusion(" in line:
        for inner in re.findall(r"calls=%?([\w.\-]+)", line):
            for other in computations.get(inner, ()):
                yield from _inside(inner, other, computations, n_devices)
        return
    if leaving := _LEAVING.search(line):
        size = sum(_nbytes(*array) for array in _ARRAY.findall(leaving["type"])[:1])
        kind = leaving["kind"].lower().replace("_", "-") + _OF_SLICES
        yield kind, size, leaving["slices"].count(",") + 1, None
        return
    found = _OPERATION.search(line)
    if found is None:
        return
    kind, group = found["kind"], _group(line, n_devices)
    size = sum(_nbytes(*array) for array in _ARRAY.findall(found["type"]))
    # What starts an operation names operand and result; of a sum, on GPUs only.
    both = found["start"] and (kind == "all-gather" or found["type"].startswith("(("))
    if both and kind in ("all-gather", "reduce-scatter"):
        size = size * group // (group + 1)
    elif both or (found["start"] and kind == "collective-permute"):
        size //= 2
    elif kind == "reduce-scatter":
        size *= group
    if kind == "all-reduce" and owner.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    yield kind, size, group, _identity(line)


def _identity(line: str) -> str | None:
    """What the pieces of one asynchronous collective have in common; `None`: it is in one piece.

    Its channel, or a chain of its own where jax wrote it: all those of `shard_map` are channel 1.
    """
    if chain := re.search(r'chain_id="(\d+)"', line):
        return f"chain {chain[1]}"
    channel = re.search(r"channel_id=(\d+)", line)
    return None if channel is None or channel[1] == "1" else channel[1]


def _nbytes(letters: str, bits: str, dimensions: str) -> int:
    width = int(bits) if bits else {"pred": 8}.get(letters, 0)
    return math.prod(int(d) for d in dimensions.split(",") if d) * width // 8


def _group(line: str, n_devices: int) -> int:
    """Devices of a group, of `{{0,1},{2,3}}`, `[2,4]<=[8]` or `mesh['a'=2,'b'=4] {'b'}`."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return pairs[1].count("{")
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=@?\w*\[?([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return n_devices
