"""What an ablation leaves behind: a table on screen, report.md, report.png and report.jsonl."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from comparison import interval, show_tables
from rich.console import Console

from slm_jax.cli.show import count
from slm_jax.models.lm import LMConfig
from slm_jax.models.presets import state_bytes, summary
from slm_jax.scaling.effective_size import Reading, Target, draws_at_one_length, effective_size
from slm_jax.scaling.rows import Rows
from slm_jax.scaling.study import seed_noise
from slm_jax.train.experiment import Result
from slm_jax.train.metrics import bits_per_byte, read_metrics


@dataclass(frozen=True)
class Measured:
    """One architecture, measured.

    Attributes:
        name: of the architecture.
        model: its configuration.
        best_learning_rate: of the grid, by held-out loss on the first seed.
        grid: held-out loss by learning rate, infinite if it diverged.
        results: one a seed, at the best learning rate.
        seq_len: tokens of a row, for the FLOPs.
        tokens_per_step: tokens of a batch.
    """

    name: str
    model: LMConfig
    best_learning_rate: float
    grid: dict[float, float]
    results: list[Result]
    seq_len: int
    tokens_per_step: int

    @property
    def losses(self) -> np.ndarray:
        """Held-out nats a token, one a seed."""
        return np.array([r.valid_loss for r in self.results])


def effective_sizes(measured: list[Measured], reference: list[Measured]) -> list[Reading | None]:
    """Parameters of the dense model that has each architecture's loss after the same tokens.

    `None` without a reference of three sizes, or with one seed: then the noise is not known.
    """
    sizes = {m.name: summary(m.model, m.seq_len).total for m in [*measured, *reference]}

    def table(of: list[Measured]) -> Rows:
        n = np.concatenate([np.full(len(m.losses), sizes[m.name], float) for m in of])
        d = np.full(len(n), of[0].results[0].tokens, float)
        loss = np.concatenate([m.losses for m in of])
        cell = np.repeat(np.arange(len(of)), [len(m.losses) for m in of])
        return Rows({"N": n, "D": d, "C": 6 * n * d, "loss": loss, "cell": cell})

    everything = measured + [r for r in reference if r not in measured]
    if len({sizes[m.name] for m in reference}) < 3 or all(len(m.losses) < 2 for m in everything):
        return [None] * len(measured)
    noise = seed_noise(table(everything), by=("cell",))
    laws = draws_at_one_length(table(reference), noise)
    found: list[Reading | None] = []
    for m in measured:
        error = noise * float(m.losses.mean()) / math.sqrt(len(m.losses))
        target = Target(
            float(m.losses.mean()), sizes[m.name], m.results[0].tokens, loss_error=error
        )
        found.append(effective_size(laws, target, readings=("iso-data size",))["iso-data size"])
    return found


def row(
    m: Measured, bytes_per_token: float, bigram: float, effective: Reading | None
) -> dict[str, Any]:
    """Every figure of one architecture, for the table and for report.jsonl."""
    sizes = summary(m.model, m.seq_len)
    loss = float(m.losses.mean())
    rates = sorted(m.grid)
    return {
        "architecture": m.name,
        "loss": loss,
        "loss_interval": interval(m.losses),
        "bits_per_byte": bits_per_byte(loss, bytes_per_token),
        "bits_per_byte_interval": bits_per_byte(interval(m.losses), bytes_per_token),
        "below_bigram_nats_per_byte": bigram - loss / bytes_per_token,
        "best_learning_rate": m.best_learning_rate,
        "best_at_edge_of_grid": len(rates) > 2 and m.best_learning_rate in (rates[0], rates[-1]),
        "grid": {f"{rate:g}": value for rate, value in m.grid.items()},
        "seeds": len(m.results),
        "parameters": sizes.total,
        "active_parameters": sizes.active,
        "effective_size": None if effective is None else asdict(effective),
        "training_flops_per_token": sizes.training_flops,
        "tokens": m.results[0].tokens,
        "tokens_per_second": float(np.median([r.tokens_per_second for r in m.results])),
        "compile_seconds": m.results[0].compile_seconds,
        "memory_bytes": m.results[0].memory_bytes,
        "state_bytes_per_token_1k": state_bytes(m.model, 1024) / 1024,
        "state_bytes_per_token_32k": state_bytes(m.model, 32768) / 32768,
        "runs": [r.out for r in m.results],
    }


def _effective(reading: dict[str, Any] | None) -> str:
    if reading is None:
        return "not measured"
    found = Reading(**reading)
    if not found.reached:
        return "out of reach"
    return "{} ({} to {})".format(*(count(x) for x in (found.median, found.low, found.high)))


_QUALITY = (
    ("model", lambda r: r["architecture"]),
    ("nats/token", lambda r: f"{r['loss']:.3f} ± {r['loss_interval']:.3f}"),
    ("bits/byte", lambda r: f"{r['bits_per_byte']:.3f} ± {r['bits_per_byte_interval']:.3f}"),
    ("best lr", lambda r: f"{r['best_learning_rate']:g}" + "*" * r["best_at_edge_of_grid"]),
    ("params", lambda r: f"{r['parameters']:,}"),
    ("active", lambda r: f"{r['active_parameters']:,}"),
    ("= dense of", lambda r: _effective(r["effective_size"])),
)
_COST = (
    ("model", lambda r: r["architecture"]),
    ("MFLOP/tok", lambda r: f"{r['training_flops_per_token'] / 1e6:.2f}"),
    ("tokens/s", lambda r: f"{r['tokens_per_second']:,.0f}"),
    ("compile s", lambda r: f"{r['compile_seconds']:.1f}"),
    ("peak MB", lambda r: f"{r['memory_bytes'] / 1e6:.0f}"),
    ("state B/tok 1k", lambda r: f"{r['state_bytes_per_token_1k']:,.0f}"),
    ("at 32k", lambda r: f"{r['state_bytes_per_token_32k']:,.0f}"),
)


def write_report(
    out: Path,
    measured: list[Measured],
    *,
    reference: list[Measured],
    bytes_per_token: float,
    bigram: float,
    console: Console,
    title: str,
    command: str,
) -> None:
    """Prints the table and writes report.md, report.png and report.jsonl into `out`.

    Args:
        out: folder.
        measured: one entry an architecture.
        reference: the dense family at several sizes; empty for no effective sizes.
        bytes_per_token: of the held-out text.
        bigram: held-out loss of a byte bigram, nats a byte.
        console: where the table is printed.
        title: of the report.
        command: what makes this report again.
    """
    rows = [
        row(m, bytes_per_token, bigram, effective)
        for m, effective in zip(measured, effective_sizes(measured, reference), strict=True)
    ]
    rows.sort(key=lambda r: r["loss"])
    (out / "report.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    _plot(out / "report.png", measured, title)

    notes = [
        f"Held-out loss, mean over {rows[0]['seeds']} seeds with the 95 % Student-t interval of "
        "the mean, at the learning rate that was best on the first seed.",
        f"A byte bigram has {bigram:.3f} nats/byte on the same text.",
        "MFLOP/tok is a training step's (3 x forward); peak MB is the compiler's figure for one "
        "step; state is what decoding keeps a row, over the tokens seen.",
    ]
    if reference:
        sizes = ", ".join(f"{summary(m.model, m.seq_len).total:,}" for m in reference)
        losses = ", ".join(f"{m.losses.mean():.3f}" for m in reference)
        notes.append(
            "= dense of: parameters of the dense model of this loss after the same tokens (median "
            f"and 90 % interval), from dense models of {sizes} parameters (loss {losses}); out of "
            "reach: in more than 5 % of the draws no dense model gets there on these tokens."
        )
    if any(r["best_at_edge_of_grid"] for r in rows):
        notes.append("* the best learning rate is at the edge of its grid: widen --learning-rates.")
    text = f"# {title}\n\n`{command}`\n"
    console.print(f"\n{title}", style="bold")
    text += show_tables(
        console,
        [
            (
                name,
                [heading for heading, _ in columns],
                [[str(cell(r)) for _, cell in columns] for r in rows],
            )
            for name, columns in (("Quality", _QUALITY), ("Cost", _COST))
        ],
    )
    for note in notes:
        console.print(note, highlight=False)
    text += "\n" + "\n".join(f"- {note}" for note in notes)
    text += "\n\n![loss against FLOPs](report.png)\n"
    text += "\nLearning-rate grid (held-out loss, first seed):\n\n"
    for r in rows:
        grid = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in r["grid"].items())
        text += f"- {r['architecture']}: {grid}\n"
    (out / "report.md").write_text(text)
    console.print(f"report.md, report.png and report.jsonl are in {out}", highlight=False)


def _plot(file: Path, measured: list[Measured], title: str) -> None:
    """Training loss (each batch is new text) against FLOPs, a band from lowest to highest seed."""
    figure, axes = plt.subplots(figsize=(7.5, 4.8), constrained_layout=True)
    for m in measured:
        curves = [_curve(Path(r.out)) for r in m.results]
        steps, losses = curves[0][0], np.stack([c[1] for c in curves])
        flops = summary(m.model, m.seq_len).training_flops * m.tokens_per_step * steps
        (line,) = axes.plot(flops, losses.mean(axis=0), label=m.name)
        axes.fill_between(
            flops, losses.min(axis=0), losses.max(axis=0), color=line.get_color(), alpha=0.25, lw=0
        )
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="loss (nats/token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _curve(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps done and losses of a run, averaged over windows of a thirtieth of it."""
    records = [r for r in read_metrics(folder) if "nll" in r]
    steps = np.array([r["step"] + 1 for r in records])
    losses = np.array([r["nll"] for r in records])
    width = max(1, len(losses) // 30)
    kept = len(losses) // width * width
    return (
        steps[:kept].reshape(-1, width).mean(axis=1),
        losses[:kept].reshape(-1, width).mean(axis=1),
    )
