"""Which architecture learns text best at equal size: dense GQA, MoE top-2, Mamba or a hybrid?

    python experiments/ablate_architectures.py                          # tinyshakespeare, minutes
    python experiments/ablate_architectures.py --match flops --steps 2000 --seeds 3

Every architecture is a function of a width; a solver picks the width at which it has the
parameters (or the FLOPs a token) of the dense reference. Each learning rate of a small grid is
tried on the first seed, the best one is repeated on the others. Every run resumes where it stopped.
Dense models of other widths are trained the same way: each architecture's effective size is that of
the dense model with its loss (`slm_jax.scaling.effective_size`).

Expected at the default size (about 0.4 M parameters, 0.1 M bytes of tinyshakespeare, 2 CPU cores):
all four at least 0.2 nats a byte below a byte bigram; the scans ahead of attention, as at this
scale in arXiv 2312.00752 (figure 4). The measured table is in the README.

Adding a fifth architecture is one line in `ARCHITECTURES`.
"""

import bisect
import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ablation_report import Measured, write_report
from comparison import best_of_grid
from rich.console import Console

from slm_jax import cli
from slm_jax.data import Corpus, DataConfig, bigram_loss, open_data
from slm_jax.errors import UserError
from slm_jax.models.lm import LMConfig
from slm_jax.models.presets import dense, hybrid, mamba, moe, summary
from slm_jax.parallel import MeshConfig, distributed
from slm_jax.train.experiment import Experiment, Result, run
from slm_jax.train.loop import DivergedError, LoopConfig
from slm_jax.train.optimizer import OptimizerConfig, ScheduleConfig

# (width, layers, e) -> model. `e` is near 1 and stretches the inner width, so that the solver can
# match a size to a fraction of a percent.
ARCHITECTURES: dict[str, Callable[[int, int, float], LMConfig]] = {
    "dense": lambda d, n, e: dense(d, n, 4, 2, round(e * d * 8 / 3), scan_unroll=n),
    "moe": lambda d, n, e: moe(d, n, 4, 2, round(e * d / 2), n_experts=8, scan_unroll=n),
    "mamba": lambda d, n, e: mamba(d, 2 * n, expand=2 * e),
    "hybrid": lambda d, n, e: hybrid(
        d, n, 4, 2, round(e * d * 2), attention_period=min(n, 8), attention_offset=min(n, 8) // 2
    ),
}


@dataclass(frozen=True)
class Ablation:
    """Trains several architectures of one size on one text and compares them."""

    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    """Which to compare."""
    match: Literal["parameters", "flops"] = "parameters"
    """What is equal: parameters, or training FLOPs a token."""
    width: int = 96
    """Width of the dense model that sets the size."""
    layers: int = 4
    """Layers of attention or scan with an MLP; Mamba has twice as many, without MLPs."""
    reference_widths: tuple[int, ...] = (48, 64, 128)
    """Further widths of the dense model, for the effective sizes; none for no such column."""
    learning_rates: tuple[float, ...] = (1e-2, 3e-2)
    """Grid tried on the first seed."""
    seeds: int = 2
    """Runs at the best learning rate."""
    steps: int = 100
    """Optimiser steps of a run."""
    batch_size: int = 16
    """Rows a step."""
    seq_len: int = 64
    """Tokens a row."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    optimizer: OptimizerConfig = OptimizerConfig("muon")
    """Update rule, the same for all."""
    data: DataConfig = DataConfig()
    """Text and tokenizer."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    loop: LoopConfig = LoopConfig()
    """Logging, evaluation, checkpoints."""
    out: Path = Path("runs/ablate_architectures")
    """Folder of the report and of one run folder a run."""
    overwrite: bool = False
    """Train again what is in the folder already."""

    def __post_init__(self) -> None:
        for name in self.architectures:
            if name not in ARCHITECTURES:
                raise UserError(
                    f"architectures={name!r} is unknown: choose from {', '.join(ARCHITECTURES)}"
                )
        if not self.architectures or not self.learning_rates or self.seeds < 1:
            raise UserError("architectures, learning_rates and seeds must not be empty")


def solve(
    build: Callable[[int, int, float], LMConfig],
    layers: int,
    size: Callable[[LMConfig], float],
    target: float,
) -> LMConfig:
    """The model of this family whose size is nearest to `target`.

    First the width (a multiple of 8) at the family's usual proportions, then the inner width.

    Raises:
        UserError: if nothing comes within 2 %.
    """

    def error(model: LMConfig) -> float:
        return abs(math.log(size(model) / target))

    stretches = [1 + s / 100 for s in range(-30, 31)]
    candidates: list[LMConfig] = []
    for d in _around(range(16, 8192, 8), lambda d: size(build(d, layers, 1.0)), target):
        sizes = functools.partial(_size_of, build, d, layers, size)
        candidates += [build(d, layers, e) for e in _around(stretches, sizes, target)]
    best = min(candidates, key=error)
    if error(best) > 0.02:
        raise UserError(
            f"no width gives {target:,.0f}; the nearest has {size(best):,.0f}: change --width"
        )
    return best


def _size_of(
    build: Callable[[int, int, float], LMConfig],
    width: int,
    layers: int,
    size: Callable[[LMConfig], float],
    stretch: float,
) -> float:
    return size(build(width, layers, stretch))


def _around[T](options: Sequence[T], size: Callable[[T], float], target: float) -> Sequence[T]:
    """The two options, whose sizes rise, with the target between them; one if it is below all."""
    low = bisect.bisect_left(options, target, hi=len(options) - 1, key=size)
    return options[max(low - 1, 0) : low + 1]


def fitted(config: Ablation, model: LMConfig, vocab_size: int) -> LMConfig:
    """The model with the vocabulary and the context of the data."""
    return replace(model, vocab_size=vocab_size, max_seq_len=config.seq_len)


def models(config: Ablation, vocab_size: int) -> dict[str, LMConfig]:
    """One model an architecture, all of the size of the dense reference."""
    fit = functools.partial(fitted, config, vocab_size=vocab_size)

    def size(model: LMConfig) -> float:
        sizes = summary(fit(model), config.seq_len)
        return sizes.total if config.match == "parameters" else sizes.training_flops

    target = size(ARCHITECTURES["dense"](config.width, config.layers, 1.0))
    return {
        name: fit(solve(ARCHITECTURES[name], config.layers, size, target))
        for name in config.architectures
    }


def measure(
    config: Ablation, name: str, model: LMConfig, corpus: Corpus, console: Console
) -> Measured:
    """Runs the grid and the seeds of one architecture."""

    def one(learning_rate: float, seed: int) -> Result | None:
        experiment = Experiment(
            model=model,
            data=config.data,
            optimizer=config.optimizer,
            schedule=ScheduleConfig(learning_rate, warmup_steps=config.warmup_steps),
            steps=config.steps,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            seed=seed,
            mesh=config.mesh,
            loop=config.loop,
            out=config.out / name / f"lr{learning_rate:g}-seed{seed}",
            overwrite=config.overwrite,
        )
        try:
            result = run(experiment, corpus)
        except DivergedError as error:
            console.print(f"{name}: {error}")
            return None
        console.print(
            f"{name:>10}  lr {learning_rate:<7g} seed {seed}  held-out loss "
            f"{result.valid_loss:.4f}  {result.tokens_per_second:,.0f} tokens/s",
            highlight=False,
        )
        return result

    best, grid, results = best_of_grid(
        name, config.learning_rates, config.seeds, one, lambda result: result.valid_loss
    )
    return Measured(
        name=name,
        model=model,
        best_learning_rate=best,
        grid={rate: r.valid_loss if r else math.inf for rate, r in grid.items()},
        results=results,
        seq_len=config.seq_len,
        tokens_per_step=config.batch_size * config.seq_len,
    )


def measure_reference(
    config: Ablation, measured: list[Measured], corpus: Corpus, console: Console
) -> list[Measured]:
    """The dense family at several sizes, the one of the comparison among them."""
    if not config.reference_widths:
        return []
    family = [m for m in measured if m.name == "dense"]
    widths = {*config.reference_widths, config.width} - {m.model.d_model for m in family}
    for width in sorted(widths):
        dense_model = ARCHITECTURES["dense"](width, config.layers, 1.0)
        model = fitted(config, dense_model, corpus.tokenizer.vocab_size)
        family.append(measure(config, f"dense-d{width}", model, corpus, console))
    return family


def main(config: Ablation) -> None:
    """Runs the ablation and writes its report."""
    console = Console()
    corpus = open_data(config.data)
    bigram = bigram_loss(corpus)
    built = models(config, corpus.tokenizer.vocab_size)
    for name, model in built.items():
        sizes = summary(model, config.seq_len)
        console.print(
            f"{name:>10}  width {model.d_model:>3} x {model.n_layers} layers  {sizes.total:,} "
            f"parameters  {sizes.training_flops / 1e6:.2f} MFLOP a token",
            highlight=False,
        )
    measured = [measure(config, name, model, corpus, console) for name, model in built.items()]
    reference = measure_reference(config, measured, corpus, console)
    if distributed.is_first():
        write_report(
            config.out,
            measured,
            reference=reference,
            bytes_per_token=corpus.bytes_per_token,
            bigram=bigram,
            console=console,
            title=f"{corpus.name}: architectures at equal {config.match}",
            command="python experiments/ablate_architectures.py",
        )


if __name__ == "__main__":
    sys.exit(cli.run(main, Ablation, description=__doc__))
