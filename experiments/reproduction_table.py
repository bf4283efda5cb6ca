"""The table of a reproduction: published against ours, with a verdict that is computed."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from slm_jax.scaling.report import table


@dataclass(frozen=True)
class Check:
    """One published number and ours.

    Attributes:
        law: whose number it is.
        quantity: what it is.
        published: as printed.
        ours: as computed here.
        tolerance: largest |ours - published| that counts as reproduced; None: the published number
            must lie in `interval`.
        source: of the published number.
        interval: 90 % interval of ours.
        at_most: the published number is a bound, and ours must not be above it.
        why: the cause that is known if they differ.
    """

    law: str
    quantity: str
    published: float
    ours: float
    tolerance: float | None
    source: str
    interval: tuple[float, float] | None = None
    at_most: bool = False
    why: str = ""

    @property
    def reproduced(self) -> bool:
        """Whether the two agree."""
        if self.tolerance is None:
            assert self.interval is not None, self
            return self.interval[0] <= self.published <= self.interval[1]
        gap = self.ours - self.published
        return gap <= self.tolerance if self.at_most else abs(gap) <= self.tolerance

    @property
    def verdict(self) -> str:
        """In words."""
        if self.reproduced:
            return "reproduced"
        return f"differs: {self.why or 'not understood'}"

    @property
    def cells(self) -> list[str]:
        """The row, as text."""
        limit = "in interval" if self.tolerance is None else f"±{self.tolerance:.2g}"
        if self.at_most and self.tolerance is not None:
            limit = f"+{self.tolerance:.2g}" if self.tolerance else "at most"
        spread = f"{show(self.interval[0])} to {show(self.interval[1])}" if self.interval else "-"
        return [
            self.law,
            self.quantity,
            show(self.published),
            show(self.ours),
            limit,
            spread,
            self.verdict,
        ]


_WIDTH = 170  # columns of a file or pipe, which has no width of its own


def console() -> Console:
    """Where tables are printed: as wide as the terminal."""
    made = Console()
    return made if made.is_terminal else Console(width=_WIDTH)


HEADINGS = ("law", "quantity", "published", "ours", "tolerance", "90 % interval", "verdict")


def show(value: float) -> str:
    """A number in five figures; rounding errors around zero are zero."""
    if abs(value) < 1e-10:
        return "0"
    if math.isfinite(value) and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.5g}".replace("e+", "e")
    return f"{value:.5g}"


def print_table(checks: Sequence[Check], title: str, screen: Console) -> None:
    """The table on screen, a law's name printed once."""
    shown = Table(title=title)
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading in ("law", "verdict") else "right")
    last = ""
    for check in checks:
        cells = check.cells
        if cells[0] == last:
            cells[0] = ""
        elif last:
            shown.add_section()
        last = check.law
        shown.add_row(*cells)
    screen.print(shown)


def markdown(checks: Sequence[Check]) -> str:
    """The table in Markdown, with sources."""
    cells = [[c.replace("|", "/") for c in (*check.cells, check.source)] for check in checks]
    return table((*HEADINGS, "source"), cells)


def summary(checks: Sequence[Check]) -> str:
    """How many agree."""
    good = sum(c.reproduced for c in checks)
    return f"{good} of {len(checks)} numbers reproduced, {len(checks) - good} differ"


def write_jsonl(path: Path, checks: Sequence[Check]) -> None:
    """One line a check."""
    records = [{**asdict(c), "verdict": c.verdict} for c in checks]
    path.write_text("".join(json.dumps(r, default=float) + "\n" for r in records))


def plot(path: Path, checks: Sequence[Check], title: str) -> None:
    """Every deviation in units of its tolerance; red differs."""
    scaled = [_deviation(c) for c in checks]
    x = np.sign(scaled) * np.log10(1 + np.abs(scaled))
    y = np.arange(len(checks))[::-1]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.17 * len(checks)), constrained_layout=True)
    colours = ["tab:blue" if c.reproduced else "tab:red" for c in checks]
    axes.axvspan(-math.log10(2), math.log10(2), color="tab:green", alpha=0.12, lw=0)
    axes.hlines(y, 0, x, color=colours, lw=1)
    axes.scatter(x, y, c=colours, s=12, zorder=3)
    axes.set_yticks(y, [f"{c.law}: {c.quantity}" for c in checks], fontsize=6)
    ticks = np.array([-100, -10, -1, 0, 1, 10, 100])
    axes.set_xticks(np.sign(ticks) * np.log10(1 + np.abs(ticks)), [str(t) for t in ticks])
    axes.set(
        xlabel="(ours - published) / tolerance, or ours / bound",
        title=title,
        ylim=(-1, len(checks)),
    )
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _deviation(check: Check) -> float:
    """In units of the tolerance, of the interval's half-width, or ours over a bound."""
    if check.at_most:
        return check.ours / check.published
    unit = check.tolerance
    if unit is None:
        assert check.interval is not None, check
        unit = (check.interval[1] - check.interval[0]) / 2
    return (check.ours - check.published) / unit
