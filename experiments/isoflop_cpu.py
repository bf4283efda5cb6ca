"""IsoFLOP curves trained on a CPU: what is the best size at each compute budget?

    python experiments/isoflop_cpu.py                                   # dense, minutes
    python experiments/isoflop_cpu.py --families dense mamba moe
    python experiments/isoflop_cpu.py --preset ci

Byte-level models of 4 k to 250 k parameters learn the source code of Python's standard library. As
arXiv 2203.15556 (figure 3, approach 2) does from 6e18 FLOPs on, here from 5e10: at each budget the
loss over the size is a valley; its bottom N*(C) and D*(C) grow as powers of the budget. The laws
fitted to the smaller budgets predict the largest one before its losses are looked at.

Expected: a valley inside the sizes at every budget, falling loss, N* ~ C^a with a of 0.4 to 0.65
(bytes of code and toy sizes: not the exponents of web text). Measured with the dense family: five
valleys of five, a = 0.58 (0.52 to 0.63); power laws through four of them gave the fifth's loss to
0.4 % and its size to 3 %, the law fitted to four budgets its loss to 3 %. It took 14 CPU minutes.
Families are compared at the end: by the nested laws, and by the size of the dense family that has
the same loss.

The learning rate is tuned first, at two widths; every run resumes where it stopped.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from isoflop_report import Trained, write_report
from rich.console import Console

from slm_jax import cli
from slm_jax.data import Corpus, open_data
from slm_jax.errors import UserError
from slm_jax.models.presets.family import FAMILIES
from slm_jax.parallel import MeshConfig, distributed
from slm_jax.train.ladder import Row, run_ladder, save_rows
from slm_jax.train.loop import DivergedError
from slm_jax.train.plan import Ladder, plan


@dataclass(frozen=True)
class Grid:
    """What is trained of one family.

    Attributes:
        budgets: FLOPs, ascending.
        widths: sizes.
        repeated: how many of the smallest budgets are trained with further seeds.
        tune: widths at which the learning rate is tuned.
        most: largest D / N: the left side of a valley needs no more.
        rates: learning rates at a width of 64 to choose from.
    """

    budgets: tuple[float, ...]
    widths: tuple[int, ...]
    repeated: int
    tune: tuple[int, ...]
    most: float = 500.0
    rates: tuple[float, ...] = (0.006, 0.012, 0.024)


_CI = Grid((2.5e10, 5e10), (8, 12, 16, 24), 1, (12,), rates=(0.006, 0.012))
_SMOKE = Grid((5e10, 1e11, 2e11, 4e11), (8, 12, 16, 24, 32, 48, 64), 1, (16, 48))
_FULL = Grid(
    budgets=(5e10, 1e11, 2e11, 4e11, 8e11),
    widths=(8, 12, 16, 20, 24, 32, 40, 48, 64, 80),
    repeated=2,
    tune=(16, 48),
    most=2000.0,
)
GRIDS: dict[str, dict[str, Grid]] = {
    "ci": dict.fromkeys(FAMILIES, _CI),
    "smoke": dict.fromkeys(FAMILIES, _SMOKE),
    # A selective scan takes four times as long a FLOP as attention here, an MoE layer twice.
    "full": {"dense": _FULL, "mamba": _SMOKE, "moe": _SMOKE},
}


@dataclass(frozen=True)
class IsoFLOPStudy:
    """Trains a grid of sizes and budgets and finds the best size at each budget."""

    families: tuple[str, ...] = ("dense",)
    """dense, mamba, moe; the first is the reference of the comparison."""
    preset: Literal["ci", "smoke", "full"] = "full"
    """Sizes and budgets: seconds, or minutes."""
    seeds: int = 3
    """Runs of each size at the smallest budgets, which says how large the noise is."""
    ladder: Ladder = Ladder(budgets=(1.0,), width_multiple=4, mesh=MeshConfig(data=-1, fsdp=1))
    """What all runs share; family, budgets, widths and learning rate come from the preset."""
    out: Path = Path("runs/isoflop_cpu")
    """Folder of the report, of rows.csv and of the runs."""

    def __post_init__(self) -> None:
        for family in self.families:
            if family not in FAMILIES:
                raise UserError(f"families={family!r} is unknown: choose {', '.join(FAMILIES)}")
        if not self.families or self.seeds < 1:
            raise UserError(f"families={self.families} and seeds={self.seeds} must not be empty")


def tune(
    config: IsoFLOPStudy, ladder: Ladder, grid: Grid, corpus: Corpus, console: Console
) -> dict[float, list[Row]]:
    """Trains the tuning widths at the middle budget with each base learning rate."""
    budget = grid.budgets[len(grid.budgets) // 2 - 1]
    found = {}
    for rate in grid.rates:
        one = replace(
            ladder,
            budgets=(budget,),
            widths=grid.tune,
            learning_rate=rate,
            out=config.out / "tune" / f"{ladder.family}-lr{rate:g}",
        )
        try:
            found[rate] = run_ladder(one, corpus, lambda line: console.print(line, highlight=False))
        except DivergedError as error:
            console.print(f"lr {rate:g}: {error}")
    complete = {rate: rows for rate, rows in found.items() if len(rows) == len(grid.tune)}
    if not complete:
        raise DivergedError(f"rates={grid.rates}: every one diverged: lower them")
    return complete


def best_rate(tuned: dict[float, list[Row]]) -> float:
    """The base learning rate with the lowest mean loss over the tuning widths."""
    return min(tuned, key=lambda rate: sum(row.loss for row in tuned[rate]) / len(tuned[rate]))


def train_family(
    config: IsoFLOPStudy, family: str, corpus: Corpus, console: Console
) -> tuple[list[Row], dict[float, list[Row]]]:
    """All rows of a family, and those of the tuning of its learning rate."""
    grid = GRIDS[config.preset][family]
    ladder = replace(config.ladder, family=family, max_tokens_per_parameter=grid.most)
    tuned = tune(config, ladder, grid, corpus, console)
    rate = best_rate(tuned)
    console.print(f"{family}: base learning rate {rate:g}", highlight=False)
    whole = replace(ladder, budgets=grid.budgets, widths=grid.widths, learning_rate=rate)
    rungs = plan(whole, corpus.tokenizer.vocab_size)
    rows = []
    for seed in range(config.seeds):
        budgets = grid.budgets[: grid.repeated] if seed else grid.budgets
        one = replace(
            whole,
            budgets=budgets,
            # The largest sizes have no small budget.
            widths=tuple(r.model.d_model for r in rungs if set(budgets) & set(r.budgets)),
            seed=ladder.seed + seed,
            out=config.out / family / f"seed{ladder.seed + seed}",
        )
        rows += run_ladder(one, corpus, lambda line: console.print(line, highlight=False))
    return rows, tuned


def main(config: IsoFLOPStudy) -> None:
    """Trains what is not trained yet and writes the report."""
    console = Console()
    corpus = open_data(config.ladder.data)
    console.print(
        f"{corpus.name}: {corpus.n_train_tokens:,} tokens to train on, {corpus.n_valid_tokens:,} "
        "held out",
        highlight=False,
    )
    rows: list[Row] = []
    tuned = {}
    for family in config.families:
        new, tuned[family] = train_family(config, family, corpus, console)
        rows += new
        save_rows(config.out / "rows.csv", rows)
    trained = Trained(
        rows=rows,
        budgets={family: GRIDS[config.preset][family].budgets for family in config.families},
        tuned=tuned,
        corpus=corpus.name,
        command=f"python experiments/isoflop_cpu.py --preset {config.preset} "
        f"--families {' '.join(config.families)}",
    )
    if distributed.is_first():
        write_report(config.out, trained, console)


if __name__ == "__main__":
    sys.exit(cli.run(main, IsoFLOPStudy, description=__doc__))
