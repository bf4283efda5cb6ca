"""What `trm_sudoku` leaves behind: tables on screen, report.md, report.png and report.jsonl."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from comparison import interval, show_tables
from rich.console import Console

from slm_jax.models.trm import TRMConfig, n_parameters
from slm_jax.train.metrics import read_metrics
from slm_jax.train.trm_experiment import TRMResult


@dataclass(frozen=True)
class Claim:
    """That the first arm solves more puzzles than the second."""

    more: str
    less: str


@dataclass(frozen=True)
class Measured:
    """One arm.

    Attributes:
        name: of the arm.
        model: what was trained.
        learning_rate: the best of the grid.
        grid: by learning rate, the share of held-back puzzles solved on the first seed; `None` if
            the run diverged.
        results: at the best rate, one a seed.
    """

    name: str
    model: TRMConfig
    learning_rate: float
    grid: dict[float, float | None]
    results: list[TRMResult]

    @property
    def depth(self) -> int:
        """Blocks between input and answer in one supervision step."""
        c = self.model
        return c.n_cycles * (c.n_latent_steps + 1) * c.n_layers

    def after(self, *, ema: bool) -> np.ndarray:
        """Share of the test puzzles solved: `[seeds, N]`, after supervision step 1..N."""
        return np.array([r.exact_ema if ema else r.exact for r in self.results], np.float64)

    def curves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """While training: steps `[E]`, share of held-back puzzles solved, raw and averaged.

        Both `[seeds, E]`, after all supervision steps.
        """
        n = len(self.results[0].exact)
        logs = [
            [r for r in read_metrics(Path(result.out)) if f"exact_{n}" in r]
            for result in self.results
        ]
        steps = np.array([r["step"] + 1 for r in logs[0]])
        raw, ema = (
            np.array([[r[f"exact_{n}{suffix}"] for r in log] for log in logs])
            for suffix in ("", "_ema")
        )
        return steps, raw, ema


def verdict(difference: float, half: float) -> str:
    """Whether a difference is above 0, in words."""
    if abs(difference) <= half or np.isnan(half):
        return f"{'direction only' if difference > 0 else 'not seen'}: the interval holds 0"
    return "holds" if difference > 0 else "the opposite holds"


def write_report(
    out: Path,
    measured: list[Measured],
    *,
    claims: tuple[Claim, ...],
    console: Console,
    title: str,
    command: str,
    n_test: int,
) -> None:
    """Prints the tables and writes report.md, report.png and report.jsonl to `out`.

    Args:
        out: folder.
        measured: one entry an arm, the recursion first.
        claims: what to judge, where both arms were run.
        console: where the tables are printed.
        title: of the report.
        command: what makes this report again.
        n_test: puzzles behind every share.
    """
    rows = [_row(m) for m in measured]
    judged = _judge(measured, claims)
    lines = [{"kind": "arm", **row} for row in rows] + [{"kind": "claim", **j} for j in judged]
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _plot(out / "report.png", measured, title)

    n = len(measured[0].results[0].exact)
    heads = ["arm", "parameters", "depth", "TFLOP", "steps", "lr", "after 1", f"after {n}, raw",
             f"after {n}, averaged", "± 95 %"]  # fmt: skip
    body = [
        [
            row["arm"],
            f"{row['parameters']:,}",
            str(row["depth"]),
            f"{row['flops'] / 1e12:.2f}",
            f"{row['steps']:,}",
            f"{row['learning_rate']:g}",
            f"{row['first']:.1%}",
            f"{row['raw']:.1%}",
            f"{row['averaged']:.1%}",
            _percent(row["half_width"]),
        ]
        for row in rows
    ]
    claim_heads = ["claim of the paper", "difference", "± 95 %", "here"]
    claim_body = [
        [j["claim"], f"{100 * j['difference']:+.1f}", _percent(j["half_width"]), j["verdict"]]
        for j in judged
    ]
    seeds = len(measured[0].results)
    notes = [
        f"Shares of {n_test:,} test puzzles solved entirely, mean of {seeds} seeds; the interval "
        "is Student's t over the seeds. Supervision steps at test time: 1 or "
        f"{n}; the direct arms are trained with one.",
        "Differences are between averaged weights after the last supervision step, in points, "
        "paired by seed; for the average against the raw weights and for more supervision steps, "
        "within the recursion arm.",
        "Every arm has the training FLOPs of the first; learning rate chosen on other puzzles.",
    ]
    console.print(f"\n{title}", style="bold")
    text = f"# {title}\n\n`{command}`\n"
    text += show_tables(console, [("Arms", heads, body), ("Claims", claim_heads, claim_body)])
    for note in notes:
        console.print(note, highlight=False)
    text += "\n" + "\n".join(f"- {note}" for note in notes) + "\n\n![curves](report.png)\n"
    (out / "report.md").write_text(text)
    console.print(f"report.md, report.png and report.jsonl are in {out}", highlight=False)


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.1f}"


def _row(m: Measured) -> dict[str, Any]:
    """Every figure of one arm."""
    raw, averaged = m.after(ema=False), m.after(ema=True)
    return {
        "arm": m.name,
        "parameters": n_parameters(m.model),
        "depth": m.depth,
        "steps": m.results[0].steps,
        "flops": m.results[0].flops,
        "learning_rate": m.learning_rate,
        "grid": {f"{rate:g}": solved for rate, solved in m.grid.items()},
        "first": float(averaged[:, 0].mean()),
        "raw": float(raw[:, -1].mean()),
        "averaged": float(averaged[:, -1].mean()),
        "half_width": interval(averaged[:, -1]),
        "seeds": [asdict(r) for r in m.results],
    }


def _judge(measured: list[Measured], claims: tuple[Claim, ...]) -> list[dict[str, Any]]:
    """Differences of what was run, paired by seed."""
    arms = {m.name: m for m in measured}
    found: list[tuple[str, np.ndarray]] = []
    for claim in claims:
        if claim.more in arms and claim.less in arms:
            more, less = (arms[n].after(ema=True)[:, -1] for n in (claim.more, claim.less))
            both = min(len(more), len(less))
            found.append((f"{claim.more} above {claim.less}", more[:both] - less[:both]))
    first = measured[0]
    averaged, raw = first.after(ema=True), first.after(ema=False)
    found.append((f"{first.name}: averaged above raw weights", averaged[:, -1] - raw[:, -1]))
    n = averaged.shape[1]
    if n > 1:
        name = f"{first.name}: {n} supervision steps above 1"
        found.append((name, averaged[:, -1] - averaged[:, 0]))
    out = []
    for name, differences in found:
        mean, half = float(differences.mean()), interval(differences)
        out.append(
            {
                "claim": name,
                "difference": mean,
                "half_width": half,
                "verdict": verdict(mean, half),
                "by_seed": differences.tolist(),
            }
        )
    return out


def _plot(file: Path, measured: list[Measured], title: str) -> None:
    """(a) by supervision step, (b) raw against averaged while training, (c) all arms."""
    figure, (steps, training, arms) = plt.subplots(
        1, 3, figsize=(14, 4.2), constrained_layout=True
    )  # fmt: skip
    colors = plt.get_cmap("tab10")(np.arange(10))
    for m, color in zip(measured, colors, strict=False):
        solved = 100 * m.after(ema=True)
        if solved.shape[1] == 1:  # of one supervision step: a point
            steps.plot([1], solved.mean(axis=0), "o", color=color, label=m.name)
        else:
            at = np.arange(1, solved.shape[1] + 1)
            steps.plot(at, solved.mean(axis=0), "o-", ms=3, color=color, label=m.name)
            steps.fill_between(at, solved.min(axis=0), solved.max(axis=0), color=color, alpha=0.15)
    steps.set(title="(a) by supervision step", xlabel="supervision steps at test time")
    steps.legend(fontsize=7)

    at, raw, averaged = measured[0].curves()
    for name, values, style in (("raw", raw, "--"), ("averaged", averaged, "-")):
        training.plot(at, 100 * values.mean(axis=0), style, color=colors[0], label=name)
        low, high = 100 * values.min(axis=0), 100 * values.max(axis=0)
        training.fill_between(at, low, high, color=colors[0], alpha=0.12)
    training.set(title=f"(b) {measured[0].name}: weights", xlabel="optimiser steps")
    training.legend(fontsize=7)

    for i, (m, color) in enumerate(zip(measured, colors, strict=False)):
        solved = 100 * m.after(ema=True)[:, -1]
        half = 100 * interval(m.after(ema=True)[:, -1])
        arms.barh(i, solved.mean(), color=color, alpha=0.5, xerr=None if np.isnan(half) else half)
        arms.plot(solved, np.full(len(solved), i), "k.", ms=4)
    arms.set_yticks(range(len(measured)), [m.name for m in measured])
    arms.invert_yaxis()
    arms.set(title="(c) equal training FLOPs", xlabel="puzzles solved (%)", xlim=(0, 100))
    for panel in (steps, training):
        panel.set_ylabel("puzzles solved (%)")
        panel.set_ylim(0, 100)
    for panel in (steps, training, arms):
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(file, dpi=150)
    plt.close(figure)
