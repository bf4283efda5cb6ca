"""What `compress_models` leaves: tables on screen, report.md, report.png and report.jsonl."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from comparison import show_tables
from compression_cells import Cell
from rich.console import Console

BUDGETS = (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8)
"""Of the dense model's bytes, at which the methods are compared."""


@dataclass(frozen=True)
class Found:
    """A measured cell.

    Attributes:
        model: its name.
        cell: how it was made smaller.
        data: what `compression_cells.measure` said.
    """

    model: str
    cell: Cell
    data: dict[str, Any]

    @property
    def losses(self) -> np.ndarray:
        """Mean nats a token of each window."""
        return np.asarray(self.data["losses"], np.float64)

    @property
    def weights(self) -> np.ndarray:
        """Tokens of each window."""
        return np.asarray(self.data["weights"], np.float64)

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return float(np.average(self.losses, weights=self.weights))

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return int(self.data["bytes"])

    @property
    def seconds(self) -> float:
        """Of quantising and pruning."""
        return float(self.data["seconds"])

    @property
    def kind(self) -> str:
        """What is compared at equal bytes: quantised, pruned, both or dense."""
        if self.cell.both:
            return "both"
        return "quantised" if self.cell.quantiser else "pruned" if self.cell.pruner else "dense"


def bootstrap(
    values: np.ndarray, weights: np.ndarray, draws: int, seed: int = 0
) -> tuple[float, float, float]:
    """Weighted mean over windows and its 95 % interval, windows drawn with their weights.

    Args:
        values: `[windows]`; for what is paired, a combination taken window by window.
        weights: `[windows]`.
        draws: how often.
        seed: of the draws.
    """
    index = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    means = np.sum((values * weights)[index], axis=1) / np.sum(weights[index], axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.average(values, weights=weights)), float(low), float(high)


def interaction(
    both: Found, quantised: Found, pruned: Found, dense: Found, draws: int
) -> dict[str, Any]:
    """How much more both cost together than the sum of each alone, in nats a token."""
    excess = both.losses - quantised.losses - pruned.losses + dense.losses
    mean, low, high = bootstrap(excess, dense.weights, draws)
    verdict = "worse together" if low > 0 else "better together" if high < 0 else "adds up"
    return {
        "cell": both.cell.name,
        "quantised": quantised.loss - dense.loss,
        "pruned": pruned.loss - dense.loss,
        "both": both.loss - dense.loss,
        "interaction": mean,
        "low": low,
        "high": high,
        "verdict": verdict,
    }


def frontier(found: Sequence[Found]) -> list[Found]:
    """The cells that no other beats in bytes and loss, the smallest first."""
    best: list[Found] = []
    for one in sorted(found, key=lambda f: (f.nbytes, f.loss)):
        if not best or one.loss < best[-1].loss:
            best.append(one)
    return best


def best_within(found: Sequence[Found], kind: str, nbytes: float) -> Found | None:
    """The cell of a kind with the lowest loss among those that are small enough."""
    fits = [f for f in found if f.kind == kind and f.nbytes <= nbytes]
    return min(fits, key=lambda f: f.loss, default=None)


def in_words(model: str, found: Sequence[Found], draws: int) -> list[str]:
    """Which frontier wins, in sentences made of the numbers."""
    dense = next(f for f in found if f.kind == "dense")
    edge = [f for f in frontier(found) if f.kind != "dense"]
    counts = {k: sum(f.kind == k for f in edge) for k in ("quantised", "pruned", "both")}
    families: dict[str, int] = {}
    for f in edge:
        families[f.cell.family] = families.get(f.cell.family, 0) + 1
    ranked = sorted(families.items(), key=lambda item: -item[1])
    out = [
        f"{model}: of {len(edge)} smaller models on the frontier {counts['quantised']} are "
        f"quantised, {counts['pruned']} pruned, {counts['both']} both ("
        + ", ".join(f"{name} {n}" for name, n in ranked)
        + ")."
    ]
    for share in BUDGETS:
        best = {
            kind: one
            for kind in ("quantised", "pruned", "both")
            if (one := best_within(found, kind, share * dense.nbytes)) is not None
        }
        if not best:
            least = min(f.nbytes for f in found) / dense.nbytes
            out.append(f"{model}: nothing is smaller than {least:.3f} of the dense bytes.")
            break
        order = sorted(best.values(), key=lambda f: f.loss)
        text = f"{model}, at most {share:.3g} of the dense bytes: " + ", ".join(
            f"{f.kind} {f.loss - dense.loss:+.3f} ({f.cell.name})" for f in order
        )
        if len(order) > 1:
            gap, low, high = bootstrap(order[1].losses - order[0].losses, dense.weights, draws)
            sure = "" if low > 0 else ", not sure"
            text += f"; {order[0].kind} wins by {gap:.3f} ({low:.3f} to {high:.3f}{sure})"
        out.append(text + ".")
    return out


def write_report(
    out: Path, found: list[Found], *, draws: int, console: Console, command: str
) -> None:
    """Prints the tables and writes report.md, report.png and report.jsonl to `out`.

    Args:
        out: folder.
        found: all cells of all models, the dense one of each among them.
        draws: bootstrap draws.
        console: where the tables are printed.
        command: what makes this report again.
    """
    by_model: dict[str, list[Found]] = {}
    for one in found:
        by_model.setdefault(one.model, []).append(one)
    lines: list[dict[str, Any]] = []
    tables, sentences = [], []
    for model, of in by_model.items():
        rows, body = _cells(of, draws)
        lines += [{"kind": "cell", "model": model, **row} for row in rows]
        heads = ["cell", "MiB", "of dense", "bits / weight", "loss", "rise", "95 %", "s", "edge"]
        tables.append((f"{model}: every cell", heads, body))
        judged = _interactions(of, draws)
        lines += [{"kind": "interaction", "model": model, **row} for row in judged]
        if judged:
            tables.append((f"{model}: both together", *_interaction_table(judged)))
        sentences += in_words(model, of, draws)
        lines += [
            {"kind": "frontier", "model": model, "cell": f.cell.name, "bytes": f.nbytes}
            for f in frontier(of)
        ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _plot(out / "report.png", by_model)
    windows = {model: len(of[0].losses) for model, of in by_model.items()}
    notes = [
        "Held-out windows: " + ", ".join(f"{model} {n}" for model, n in windows.items()) + ". "
        f"Rises are nats a token above the dense model in bfloat16; intervals by {draws:,} "
        "bootstrap draws of windows, paired.",
        "Bytes of the whole safetensors file, embedding, head and norms included; a matrix with "
        "zeros as a bit a weight and the rest, where that is smaller.",
    ]
    title = "Fewer bits, fewer weights, or both"
    console.print(f"\n{title}", style="bold")
    text = f"# {title}\n\n`{command}`\n\n" + "\n".join(f"- {line}" for line in sentences) + "\n"
    text += show_tables(console, tables)
    for note in (*notes, *sentences):
        console.print(note, highlight=False)
    text += "\n" + "\n".join(f"- {note}" for note in notes)
    text += "\n\n![loss against bytes](report.png)\n"
    (out / "report.md").write_text(text)
    console.print(f"report.md, report.png and report.jsonl are in {out}", highlight=False)


def _cells(of: list[Found], draws: int) -> tuple[list[dict[str, Any]], list[list[str]]]:
    dense = next(f for f in of if f.kind == "dense")
    edge = {f.cell for f in frontier(of)}
    rows, body = [], []
    for f in of:
        rise, low, high = bootstrap(f.losses - dense.losses, dense.weights, draws)
        row = {
            **asdict(f.cell),
            "cell": f.cell.name,
            "family": f.cell.family,
            "bytes": f.nbytes,
            "loss": f.loss,
            "rise": rise,
            "low": low,
            "high": high,
            "zeros": f.data["zeros"],
            "parameters": f.data["parameters"],
            "seconds": f.seconds,
            "frontier": f.cell in edge,
        }
        rows.append(row)
        # Of the dense model's weights: a smaller model has fewer of its own.
        bits = 8 * f.nbytes / dense.data["parameters"]
        body.append(
            [
                f.cell.name,
                f"{f.nbytes / 2**20:.2f}",
                f"{f.nbytes / dense.nbytes:.3f}",
                f"{bits:.2f}",
                f"{f.loss:.4f}",
                f"{rise:+.4f}",
                f"{low:+.4f} to {high:+.4f}",
                f"{f.seconds:.1f}",
                "*" if f.cell in edge else "",
            ]
        )
    return rows, body


def _interactions(of: list[Found], draws: int) -> list[dict[str, Any]]:
    cells = {f.cell: f for f in of}
    out = []
    for f in of:
        if f.cell.both:
            quantised, pruned = (cells[corner] for corner in f.cell.alone)
            out.append(interaction(f, quantised, pruned, cells[Cell()], draws))
    return out


def _interaction_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    heads = ["cell", "quantised alone", "pruned alone", "both", "interaction", "95 %", "verdict"]
    body = [
        [
            row["cell"],
            *(f"{row[k]:+.4f}" for k in ("quantised", "pruned", "both", "interaction")),
            f"{row['low']:+.4f} to {row['high']:+.4f}",
            row["verdict"],
        ]
        for row in rows
    ]
    return heads, body


def _plot(file: Path, by_model: dict[str, list[Found]]) -> None:
    """Rise of the loss over bytes, a line a family; the frontier in grey behind."""
    figure, panels = plt.subplots(
        1, len(by_model), figsize=(5.5 * len(by_model), 4.6), squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    families = list(dict.fromkeys(f.cell.family for of in by_model.values() for f in of))
    colors = dict(zip(families, plt.get_cmap("tab20")(np.arange(len(families)) % 20), strict=True))
    styles = {"quantised": "o-", "pruned": "s--", "both": "^:", "dense": "*"}
    for panel, (model, of) in zip(panels[0], by_model.items(), strict=True):
        dense = next(f for f in of if f.kind == "dense")
        edge = frontier(of)
        panel.plot(
            [f.nbytes / dense.nbytes for f in edge],
            [f.loss for f in edge],
            color="0.8",
            lw=5,
            label="frontier",
        )
        for family in families:
            line = sorted((f for f in of if f.cell.family == family), key=lambda f: f.nbytes)
            if line:
                panel.plot(
                    [f.nbytes / dense.nbytes for f in line],
                    [f.loss for f in line],
                    styles[line[0].kind],
                    color=colors[family],
                    ms=5,
                    label=family,
                )
        worst = max(f.loss for f in edge)
        panel.set(
            title=model,
            xscale="log",
            xlabel="bytes of the file / dense in bfloat16",
            ylabel="held-out loss (nats a token)",
            ylim=(0.98 * dense.loss, dense.loss + 1.3 * max(worst - dense.loss, 1e-3)),
        )
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=6)
    figure.savefig(file, dpi=150)
    plt.close(figure)
