"""The table of `kernels/README.md`: our kernels and the best public ones at the same shapes.

    python -m slm_kernels.profile --table kernels/README.md

simulates every line of `LINES`, each kept under `.cache/profile` until the kernels' sources, jax or
libtpu change, and writes what it has between two marks in the file after each.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from slm_kernels.aot.sources import fingerprint
from slm_kernels.cases import CASES

BEGIN, END = "<!-- profile-kernels: begin -->\n", "<!-- profile-kernels: end -->\n"
CACHE = Path(".cache", "profile")


@dataclasses.dataclass(frozen=True)
class Line:
    """A program to simulate.

    Attributes:
        case: a key of `CASES`.
        sizes: that differ from the case's own.
        implementation: ours (`"tpu"`), `"xla"` or a public one of the case.
        backward: count the kernels of the gradients, instead of those of the forward pass.
        target: a key of `TARGETS`.
    """

    case: str
    sizes: tuple[tuple[str, int], ...]
    implementation: str
    backward: bool
    target: str


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is written of a line; `None` where it is not known.

    Attributes:
        cycles: of the kernels, or of all operations where none of them is a kernel.
        microseconds: likewise, or what the bytes need at peak bandwidth where that is more.
        hbm_bytes: that the kernels move.
        least_bytes: that they have to move.
        share: of the roofline.
        bound: what that is made of.
        spills: bundles with a spill, of all bundles.
        error: why it could not be simulated.
    """

    cycles: int | None = None
    microseconds: float | None = None
    hbm_bytes: int | None = None
    least_bytes: float | None = None
    share: float | None = None
    bound: str | None = None
    spills: str | None = None
    error: str = ""


def _lines() -> list[Line]:
    lines = []

    def add(case: str, text: str, implementations: str, backward: bool = False) -> None:
        pairs = (part.split("=") for part in text.split(","))
        sizes = tuple((axis, int(size)) for axis, size in pairs)
        for target in ("v5e", "v6e"):
            for name in implementations.split():
                lines.append(Line(case, sizes, name, backward, target))

    add("attention", "S=4096,H=2,K=2,D=128", "tpu jax splash")
    add("scan-f32", "L=2048,D=2048", "tpu associative_scan lax.scan xla")
    add("attention", "S=4096,H=1,K=1,D=128", "tpu jax", backward=True)
    add("scan-f32", "L=2048,D=2048", "tpu", backward=True)
    add("attention", "S=2048,H=4,K=1,D=64", "tpu jax splash")  # of a model with 32 heads, 8 of keys
    add("attention", "S=2048,H=1,K=1,D=256", "tpu jax splash")
    add("attention-window", "S=4096,H=1,K=1", "tpu")
    add("attention", "S=8192,H=1,K=1,D=128", "tpu jax splash")
    add("scan", "L=2048,D=2048", "tpu")
    return lines


LINES = _lines()


def write(file: Path, measure: Callable[[Line], Cell], lines: Sequence[Line] = ()) -> None:
    """Fills the table in a file.

    Args:
        file: has the two marks `BEGIN` and `END`.
        measure: simulates a line.
        lines: `LINES` by default.

    Raises:
        ValueError: if the file has no such marks.
        FileNotFoundError: if libtpu is not installed.
    """
    lines = lines or LINES
    if not (BEGIN in (text := file.read_text()) and END in text.split(BEGIN)[1]):
        raise ValueError(f"table={str(file)!r}: no place for it: add the lines {BEGIN}{END}")
    cells: dict[Line, Cell] = {}
    for line in lines:
        cells[line] = _kept(line, measure)
        before, rest = file.read_text().split(BEGIN)
        file.write_text(before + BEGIN + markdown(cells) + END + rest.split(END)[1])
        print(markdown({line: cells[line]}).splitlines()[-1], flush=True)


def _kept(line: Line, measure: Callable[[Line], Cell]) -> Cell:
    name = f"{fingerprint(line.target)} {dataclasses.asdict(line)}"
    path = CACHE / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    if path.is_file():
        return Cell(**json.loads(path.read_text()))
    cell = measure(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(cell)))
    return cell


def markdown(cells: dict[Line, Cell]) -> str:
    """The table of what was simulated."""
    text = ["| what | on | by | cycles | us | HBM, least | of the roofline | spills |"]
    text.append("|---|---|---|---|---|---|---|---|")
    for line, c in cells.items():
        sizes = ", ".join(f"{axis} {size:,}" for axis, size in line.sizes)
        what = f"{line.case}{' backward' if line.backward else ''}, {sizes}"
        by = {"tpu": "**ours**", "jax": "jax flash"}.get(line.implementation, line.implementation)
        if c.cycles is None or c.microseconds is None:
            text.append(f"| {what} | {line.target} | {by} | {c.error or 'not simulated'} | | | | |")
            continue
        moved = "-" if c.hbm_bytes is None else f"{c.hbm_bytes / 1e6:,.1f}"
        least = "-" if c.least_bytes is None else f"{c.least_bytes / 1e6:,.1f} MB"
        share = "-" if c.share is None else f"{c.share:.0%} ({c.bound})"
        text.append(
            f"| {what} | {line.target} | {by} | {c.cycles:,} | {c.microseconds:,.1f} "
            f"| {moved}, {least} | {share} | {c.spills or '-'} |"
        )
    return "\n".join(text) + "\n"


def shape(line: Line) -> dict[str, int]:
    """All sizes of a line."""
    return {**CASES[line.case].shape, **dict(line.sizes)}
