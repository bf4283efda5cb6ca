"""What `mup_transfer` leaves behind: a table on screen, report.md, two plots and report.jsonl."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from comparison import show_tables
from rich.console import Console

from slm_jax.train.coordinates import width_exponent

PARAMETRISATIONS = ("standard", "muP")


@dataclass(frozen=True)
class Curve:
    """Held-out loss against learning rate, of one model.

    Attributes:
        architecture: its name.
        parametrisation: standard or muP.
        width: d_model.
        losses: nats a token by learning rate, one a seed; infinite if the run diverged.
    """

    architecture: str
    parametrisation: str
    width: int
    losses: dict[float, list[float]]

    @property
    def means(self) -> dict[float, float]:
        """Mean over the seeds."""
        return {rate: float(np.mean(v)) for rate, v in self.losses.items()}

    def of_seed(self, seed: int) -> dict[float, float]:
        """Losses of one seed."""
        return {rate: v[seed] for rate, v in self.losses.items()}


BestRate = Callable[[dict[float, float]], float | None]


def row(curve: Curve, best_rate: BestRate) -> dict[str, Any]:
    """Every figure of one curve, for report.jsonl."""
    seeds = len(next(iter(curve.losses.values())))
    return {
        "kind": "sweep",
        "architecture": curve.architecture,
        "parametrisation": curve.parametrisation,
        "width": curve.width,
        "best_learning_rate": best_rate(curve.means),
        "best_learning_rate_by_seed": [best_rate(curve.of_seed(s)) for s in range(seeds)],
        "lowest_loss": min(curve.means.values()),
        "losses": {f"{rate:.6g}": values for rate, values in curve.losses.items()},
    }


def shift(rows: list[dict[str, Any]]) -> float | None:
    """Octaves (grid steps) that the best rate moves from the narrowest to the widest model.

    Args:
        rows: of one architecture in one parametrisation, by growing width.

    Returns:
        log2 of the last best rate over the first; `None` if one of them is not bracketed.
    """
    first, last = rows[0]["best_learning_rate"], rows[-1]["best_learning_rate"]
    return None if first is None or last is None else math.log2(last / first)


def verdict(octaves: float | None) -> str:
    """Whether that is less than one grid step, in words."""
    if octaves is None:
        return "not bracketed by the grid"
    return "less than one grid step" if abs(octaves) < 1 else "one grid step or more"


def write_report(
    out: Path,
    curves: list[Curve],
    checks: list[dict[str, Any]],
    *,
    best_rate: BestRate,
    base_width: int,
    console: Console,
    title: str,
    command: str,
) -> None:
    """Prints the tables and writes report.md, report.png, coordinates.png, report.jsonl to `out`.

    Args:
        out: folder.
        curves: one entry a model, by growing width.
        checks: rows of the coordinate check: architecture, parametrisation, width, and the changes
            (`stream`, `logits`) after each step.
        best_rate: reads the best rate off losses by rate.
        base_width: where the parametrisations meet.
        console: where the tables are printed.
        title: of the report.
        command: what makes this report again.
    """
    rows = [row(curve, best_rate) for curve in curves]
    groups = {
        (a, p): [r for r in rows if (r["architecture"], r["parametrisation"]) == (a, p)]
        for a in dict.fromkeys(c.architecture for c in curves)
        for p in PARAMETRISATIONS
    }
    widths = [r["width"] for r in next(iter(groups.values()))]
    factor = widths[-1] / widths[0]
    shifts = [
        {
            "kind": "shift",
            "architecture": a,
            "parametrisation": p,
            "width_factor": factor,
            "octaves": shift(group),
        }
        for (a, p), group in groups.items()
    ]
    lines = [*rows, *shifts, *({"kind": "coordinates", **c} for c in checks)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _plot_sweeps(out / "report.png", curves, groups, title)
    _plot_checks(out / "coordinates.png", checks)

    heads = ["model", *(f"best lr, width {w}" for w in widths), "octaves", f"over {factor:g}x"]
    cells = [
        [
            f"{a}, {p}",
            *(_rate(r) for r in group),
            "-" if moved["octaves"] is None else f"{moved['octaves']:+.2f}",
            verdict(moved["octaves"]),
        ]
        for ((a, p), group), moved in zip(groups.items(), shifts, strict=True)
    ]
    check_heads, check_cells = _check_table(checks)
    text = f"# {title}\n\n`{command}`\n"
    console.print(f"\n{title}", style="bold")
    text += show_tables(
        console,
        [
            ("Best learning rate", heads, cells),
            ("Coordinate check", check_heads, check_cells),
        ],
    )
    notes = [
        "Best rate: vertex of the parabola in log rate through the lowest mean loss and its "
        "neighbours; in brackets the vertices of the single seeds. A grid step is one octave.",
        f"Both parametrisations are the same model at width {base_width}; it is trained once.",
        "Coordinate check: root mean square of the change in the first steps on one batch, and the "
        "exponent of its growth with the width.",
    ]
    for note in notes:
        console.print(note, highlight=False)
    text += "\n" + "\n".join(f"- {note}" for note in notes)
    text += "\n\n![loss against learning rate](report.png)\n\n![coordinates](coordinates.png)\n"
    text += "\nHeld-out loss, nats a token, mean over the seeds:\n\n"
    for curve in curves:
        losses = ", ".join(f"{rate:.4g}: {loss:.4f}" for rate, loss in curve.means.items())
        text += f"- {curve.architecture}, {curve.parametrisation}, width {curve.width}: {losses}\n"
    (out / "report.md").write_text(text)
    console.print(f"report.md, two plots and report.jsonl are in {out}", highlight=False)


def _rate(r: dict[str, Any]) -> str:
    def short(rate: float | None) -> str:
        return "-" if rate is None else f"{rate:.2g}"

    seeds = ", ".join(short(rate) for rate in r["best_learning_rate_by_seed"])
    return f"{short(r['best_learning_rate'])} ({seeds})"


def _check_table(checks: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Changes after the last step by width, and their exponents."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for c in checks:
        groups.setdefault((c["architecture"], c["parametrisation"]), []).append(c)
    widths = [c["width"] for c in next(iter(groups.values()))]
    heads = ["model", "of", *(f"width {w}" for w in widths), "exponent"]
    body = []
    for (architecture, parametrisation), group in groups.items():
        for name in ("stream", "logits"):
            last = [c[name][-1] for c in group]
            exponent = width_exponent(widths, last)
            values = [f"{v:.3f}" for v in last]
            body.append([f"{architecture}, {parametrisation}", name, *values, f"{exponent:+.2f}"])
    return heads, body


def _plot_sweeps(
    file: Path,
    curves: list[Curve],
    groups: dict[tuple[str, str], list[dict[str, Any]]],
    title: str,
) -> None:
    """Loss against rate, a line a width, a panel a model; the parabolas' vertices are dotted."""
    names = list(dict.fromkeys(a for a, _ in groups))
    figure, axes = plt.subplots(
        len(names),
        2,
        figsize=(9, 3.6 * len(names)),
        sharex=True,
        sharey="row",
        squeeze=False,
        constrained_layout=True,
    )
    for (architecture, parametrisation), rows in groups.items():
        panel = axes[names.index(architecture)][PARAMETRISATIONS.index(parametrisation)]
        mine = [
            c
            for c in curves
            if (c.architecture, c.parametrisation) == (architecture, parametrisation)
        ]
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(mine)))
        for curve, color, r in zip(mine, colors, rows, strict=True):
            rates = np.array(list(curve.losses))
            values = np.array(list(curve.losses.values()))
            panel.plot(rates, values.mean(axis=1), "o-", ms=4, color=color, label=curve.width)
            panel.plot(rates, values, ".", ms=3, color=color, alpha=0.5)
            if r["best_learning_rate"]:
                panel.axvline(r["best_learning_rate"], color=color, ls=":")
        lowest = min(min(c.means.values()) for c in curves if c.architecture == architecture)
        panel.set(
            xscale="log",
            ylim=(lowest - 0.05, lowest + 1.2),
            title=f"{architecture}, {parametrisation}: {verdict(shift(rows))}",
        )
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend(title="width")
    for panel in axes[-1]:
        panel.set_xlabel("learning rate")
    for panel in axes[:, 0]:
        panel.set_ylabel("held-out loss (nats/token)")
    figure.suptitle(title)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _plot_checks(file: Path, checks: list[dict[str, Any]]) -> None:
    """Change of stream and logits against width, a line a step."""
    names = list(dict.fromkeys(c["architecture"] for c in checks))
    columns = [(p, k) for p in PARAMETRISATIONS for k in ("stream", "logits")]
    figure, axes = plt.subplots(
        len(names),
        len(columns),
        figsize=(3.2 * len(columns), 2.8 * len(names)),
        sharex=True,
        squeeze=False,
        constrained_layout=True,
    )
    for name, line in zip(names, axes, strict=True):
        for (parametrisation, what), panel in zip(columns, line, strict=True):
            mine = [
                c
                for c in checks
                if (c["architecture"], c["parametrisation"]) == (name, parametrisation)
            ]
            changes = np.array([c[what] for c in mine])
            for step in range(changes.shape[1]):
                panel.plot([c["width"] for c in mine], changes[:, step], "o-", label=step + 1)
            panel.set(title=f"{name}, {parametrisation}: {what}", yscale="log")
            panel.set_xscale("log", base=2)
            panel.grid(alpha=0.3, which="both")
        line[0].set_ylabel("change (RMS)")
        line[0].legend(title="step")
    for panel in axes[-1]:
        panel.set_xlabel("width")
    figure.savefig(file, dpi=150)
    plt.close(figure)
