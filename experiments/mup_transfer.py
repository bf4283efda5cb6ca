"""Does the best learning rate stay where it is when the model gets wider? With muP, and without.

    python experiments/mup_transfer.py                                   # minutes on 2 CPU cores
    python experiments/mup_transfer.py --widths 64 128 256 512 --base-width 512 --steps 1000

A dense and a Mamba model are trained at several widths, each over a grid of learning rates in
factors of two, in the standard parametrisation and with muP. The best rate is the vertex of the
parabola in log rate through the lowest held-out loss and its neighbours; a grid whose lowest point
is at its edge is continued. Every run resumes where it stopped.

It repeats figure 1 of Tensor Programs V (arXiv 2203.03466) at the size of a CPU, and its coordinate
check (appendix D.1): how far the residual stream and the logits move in the first steps.

The base width, where both are the same model, is the widest. muP multiplies the logits by
base_width / width, so this choice also sets their multiplier: with the base at width 32, tied
embeddings and a hundred steps, logits grow too slowly for any rate to be good.

Expected over a fourfold width: the best rate moves by less than one grid step (a factor of two)
with muP and by more without, downwards; the logits' change is flat in the width with muP.

Measured at the default size, widths 32 to 128, two seeds: dense 0.0105 to 0.0032 (-1.7 octaves)
without muP and 0.0028 to 0.0032 (+0.2) with it; Mamba 0.0163 to 0.0041 (-2.0) and 0.0054 to 0.0041
(-0.4). With muP the narrow models also end lower: dense 2.49 against 2.86 nats at width 32.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from mup_report import Curve, write_report
from rich.console import Console

from slm_jax import cli
from slm_jax.data import Corpus, DataConfig, open_data, train_batches
from slm_jax.errors import UserError
from slm_jax.models.lm import LMConfig
from slm_jax.models.presets import dense, mamba
from slm_jax.nn.parametrization import MuPConfig
from slm_jax.parallel import MeshConfig, distributed
from slm_jax.train.coordinates import coordinate_changes
from slm_jax.train.experiment import Experiment, run
from slm_jax.train.loop import DivergedError, LoopConfig
from slm_jax.train.optimizer import OptimizerConfig, ScheduleConfig

HEAD_DIM = 16
EXTENSIONS = 4
"""Most points added to a grid whose lowest loss is at its edge."""

# Heads of one width, so that a wider model has more of them.
ARCHITECTURES: dict[str, Callable[[int, int], LMConfig]] = {
    "dense": lambda d, n: dense(d, n, d // HEAD_DIM, d_ff=3 * d, head_dim=HEAD_DIM, scan_unroll=n),
    "mamba": lambda d, n: mamba(d, n, scan_unroll=n),
}
Parametrisation = Literal["standard", "muP"]


@dataclass(frozen=True)
class Transfer:
    """Best learning rate by width, with muP and without."""

    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    """Which to train."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Multiples of 16."""
    base_width: int = 128
    """The width at which both parametrisations are the same."""
    layers: int = 2
    """Of each model."""
    learning_rates: tuple[float, ...] = tuple(2.0**k for k in range(-10, -4))
    """Grid, each twice the one before."""
    seeds: int = 2
    """Runs a point; their losses are averaged."""
    steps: int = 100
    """Optimiser steps of a run."""
    warmup_steps: int = 10
    """Steps of linear warm-up; then the rate is constant."""
    batch_size: int = 16
    """Rows a step."""
    seq_len: int = 64
    """Tokens a row."""
    eval_tokens: int = 16384
    """Held-out tokens a run is judged by."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule."""
    check_widths: tuple[int, ...] = (32, 64, 128)
    """Widths of the coordinate check."""
    check_steps: int = 3
    """Steps of the coordinate check, at the middle of the grid."""
    data: DataConfig = DataConfig()
    """Text and tokenizer."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    loop: LoopConfig = LoopConfig(log_every=10, keep_checkpoints=1, quiet=True)
    """Logging, evaluation, checkpoints."""
    out: Path = Path("runs/mup_transfer")
    """Folder of the report and of one run folder a run."""
    overwrite: bool = False
    """Train again what is in the folder already."""

    def __post_init__(self) -> None:
        for name in self.architectures:
            if name not in ARCHITECTURES:
                raise UserError(
                    f"architectures={name!r} is unknown: choose from {', '.join(ARCHITECTURES)}"
                )
        for width in (*self.widths, *self.check_widths):
            if width < HEAD_DIM or width % HEAD_DIM:
                raise UserError(f"widths={width} is not a multiple of head_dim={HEAD_DIM}")
        for name in ("widths", "check_widths"):
            values = getattr(self, name)
            if len(values) < 2 or list(values) != sorted(set(values)):
                raise UserError(f"{name}={values} must be two or more, growing")
        rates = np.array(self.learning_rates)
        if len(rates) < 3 or rates[0] <= 0 or not np.allclose(rates[1:] / rates[:-1], 2):
            raise UserError(
                f"learning_rates={self.learning_rates} must be three or more, each twice the last"
            )
        if self.seeds < 1:
            raise UserError(f"seeds={self.seeds} must be at least 1")


def build(
    config: Transfer, name: str, parametrisation: Parametrisation, width: int, vocab_size: int
) -> LMConfig:
    """One model. At the base width both parametrisations are the same model."""
    mup = MuPConfig(base_width=config.base_width if parametrisation == "muP" else None)
    return replace(
        ARCHITECTURES[name](width, config.layers),
        vocab_size=vocab_size,
        max_seq_len=config.seq_len,
        mup=MuPConfig() if width == config.base_width else mup,
    )


def best_rate(losses: dict[float, float]) -> float | None:
    """The vertex of the parabola, in log rate, through the lowest loss and its two neighbours.

    Args:
        losses: loss by learning rate; rates a constant factor apart.

    Returns:
        The rate there, or `None` if the lowest is at the edge or beside a run that diverged.
    """
    rates = sorted(losses)
    values = np.array([losses[r] for r in rates])
    i = int(np.argmin(values))
    if i in (0, len(rates) - 1) or not np.isfinite(values[i - 1 : i + 2]).all():
        return None
    low, middle, high = values[i - 1 : i + 2]
    offset = 0.5 * (low - high) / (low - 2 * middle + high)
    return rates[i] * (rates[i + 1] / rates[i]) ** float(offset)


def sweep(
    config: Transfer,
    name: str,
    parametrisation: Parametrisation,
    width: int,
    corpus: Corpus,
    console: Console,
) -> Curve:
    """Trains one model at every rate of the grid, and further if the lowest is at its edge."""
    model = build(config, name, parametrisation, width, corpus.tokenizer.vocab_size)
    # The base width is trained once.
    label = "standard" if width == config.base_width else parametrisation

    def loss(rate: float, seed: int) -> float:
        experiment = Experiment(
            model=model,
            data=config.data,
            optimizer=config.optimizer,
            schedule=ScheduleConfig(rate, "constant", config.warmup_steps),
            steps=config.steps,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            eval_tokens=config.eval_tokens,
            seed=seed,
            mesh=config.mesh,
            loop=config.loop,
            out=config.out / f"{name}-{label}" / f"width{width}-lr{rate:.6g}-seed{seed}",
            overwrite=config.overwrite,
        )
        try:
            return run(experiment, corpus).valid_loss
        except DivergedError:
            return math.inf

    def point(rate: float) -> None:
        by_seed[rate] = [loss(rate, seed) for seed in range(config.seeds)]

    by_seed: dict[float, list[float]] = {}
    for rate in config.learning_rates:
        point(rate)
    for _ in range(EXTENSIONS):
        rates = sorted(by_seed)
        lowest = min(rates, key=lambda r: float(np.mean(by_seed[r])))
        if lowest not in (rates[0], rates[-1]):
            break
        point(lowest / 2 if lowest == rates[0] else lowest * 2)
    curve = Curve(name, parametrisation, width, {r: by_seed[r] for r in sorted(by_seed)})
    best = best_rate(curve.means)
    console.print(
        f"{name} {parametrisation:>8} width {width:>4}  best rate "
        + (f"{best:.3g}" if best else "not bracketed")
        + f"  loss {min(curve.means.values()):.4f}",
        highlight=False,
    )
    return curve


def check(config: Transfer, corpus: Corpus) -> list[dict[str, object]]:
    """The coordinate check of every architecture in both parametrisations."""
    batch = next(
        train_batches(
            corpus,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            seed=0,
        )
    )
    rate = config.learning_rates[len(config.learning_rates) // 2]
    rows: list[dict[str, object]] = []
    changes: dict[LMConfig, dict[str, np.ndarray]] = {}
    for name in config.architectures:
        for parametrisation in ("standard", "muP"):
            for width in config.check_widths:
                model = build(config, name, parametrisation, width, corpus.tokenizer.vocab_size)
                if model not in changes:  # at the base width it is one model
                    changes[model] = coordinate_changes(
                        model,
                        {k: batch[k] for k in ("tokens", "targets", "weights")},
                        optimizer=config.optimizer,
                        learning_rate=rate,
                        steps=config.check_steps,
                    )
                rows.append(
                    {
                        "architecture": name,
                        "parametrisation": parametrisation,
                        "width": width,
                        "learning_rate": rate,
                        **{k: v.tolist() for k, v in changes[model].items()},
                    }
                )
    return rows


def main(config: Transfer) -> None:
    """Runs the sweeps and the check, and writes the report."""
    console = Console()
    corpus = open_data(config.data)
    curves = [
        sweep(config, name, parametrisation, width, corpus, console)
        for name in config.architectures
        for width in config.widths
        for parametrisation in ("standard", "muP")
    ]
    checked = check(config, corpus)
    if distributed.is_first():
        write_report(
            config.out,
            curves,
            checked,
            best_rate=best_rate,
            base_width=config.base_width,
            console=console,
            title=f"{corpus.name}: best learning rate by width",
            command="python experiments/mup_transfer.py",
        )


if __name__ == "__main__":
    sys.exit(cli.run(main, Transfer, description=__doc__))
