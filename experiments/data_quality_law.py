"""Does better data multiply tokens, or lower the asymptote?

    python experiments/data_quality_law.py                                   # planted noise
    python experiments/data_quality_law.py --corpora raw=raw.jsonl.gz textbook=books.jsonl.gz

The surveys' law L = E + A N^-alpha + B (Q D)^-beta says that a token of better data is worth Q
tokens. Here the same ladder is trained on each quality level and judged on one held-out text, and
the hypotheses are compared: nothing differs, B (that is Q), A, E, and combinations, by AICc and by
budgets left out.

By default the levels are planted: training bytes of Python's standard library are replaced by
random ones with probability 0, 0.1 and 0.3 (`slm_jax.data.corrupt`), and all are judged on clean
text. With `--corpora` the levels are texts of your own, judged on the held-out parts of all.

Expected: E wins among the hypotheses with one letter (noise is mixed into every prediction, which
costs -log(1 - p) nats whatever the size: 0.105 and 0.357), and the Q that is forced on the data has
a narrow interval around a number that means nothing.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from slm_jax import cli
from slm_jax.data import Corpus, open_data
from slm_jax.data.corrupt import corrupt
from slm_jax.errors import UserError
from slm_jax.parallel import distributed
from slm_jax.scaling.compare import Comparison, compare_families
from slm_jax.scaling.report import comparison_markdown, plot_levels, table
from slm_jax.scaling.rows import Rows, admissible
from slm_jax.train.ladder import Row, run_ladder
from slm_jax.train.plan import Ladder


@dataclass(frozen=True)
class DataQuality:
    """Trains one ladder a quality level and compares the laws of the levels."""

    noise: tuple[float, ...] = (0.0, 0.1, 0.3)
    """Probabilities with which training tokens are replaced; the first level is the reference."""
    corpora: tuple[str, ...] = ()
    """NAME=SOURCE of texts to compare in place of noise; the first is the reference."""
    ladder: Ladder = Ladder(
        budgets=(5e10, 1e11, 2e11, 4e11), widths=(12, 16, 24, 32, 48), width_multiple=4
    )
    """Sizes, budgets and training of every level."""
    min_tokens: float = 3e5
    """Smaller runs are left out of the fits: their transient is no power law."""
    draws: int = 200
    """Bootstrap draws behind the intervals."""
    out: Path = Path("runs/data_quality_law")
    """Folder of the report and of one ladder a level."""

    def __post_init__(self) -> None:
        if not self.corpora and (len(self.noise) < 2 or len(set(self.noise)) < len(self.noise)):
            raise UserError(f"noise={self.noise}: give two different levels or more")
        names = [c.partition("=")[0] for c in self.corpora]
        if any(not all(c.partition("=")) for c in self.corpora):
            raise UserError(f"corpora={self.corpora}: each must be NAME=SOURCE")
        if self.corpora and (len(names) < 2 or len(set(names)) < len(names)):
            raise UserError(f"corpora={self.corpora}: give two or more of different names")


def levels(config: DataQuality) -> dict[str, Corpus]:
    """Training texts by name, all with the same held-out text."""
    data = config.ladder.data
    if not config.corpora:
        clean = open_data(data)
        return {f"noise {p:g}": corrupt(clean, p) for p in config.noise}
    pairs = [c.partition("=") for c in config.corpora]
    opened = {name: open_data(replace(data, source=source)) for name, _, source in pairs}
    held_out = tuple(stream for corpus in opened.values() for stream in corpus.valid)
    return {name: replace(corpus, valid=held_out) for name, corpus in opened.items()}


def as_table(rows: dict[str, list[Row]]) -> Rows:
    """One table of all levels; N is C / (6 D), so that attention and head count."""
    flat = [(name, row) for name, of in rows.items() for row in of]
    d, c, loss = (np.array([getattr(row, k) for _, row in flat], float) for k in ("D", "C", "loss"))
    return Rows(
        {"N": c / (6 * d), "D": d, "C": c, "loss": loss},
        {
            "corpus": np.array([name for name, _ in flat]),
            "run": np.array([f"{name} {row.run}" for name, row in flat]),
        },
    )


def verdict(comparison: Comparison, draws: int) -> str:
    """Which hypothesis wins, and what a forced Q would say."""
    single = [f for f in comparison.fits if len(f.separate) == 1]
    q, intervals = comparison.of("B"), comparison.intervals("B", draws=draws)["B"]
    forced = ", ".join(
        f"{name} {value:.2f} ({low:.2f} to {high:.2f})"
        for name, value, (low, high) in list(
            zip(comparison.families, q.multipliers()["B"], intervals, strict=True)
        )[1:]
    )
    return (
        f"- Best of all: {comparison.best.separate or 'nothing'} differs. Best single letter: "
        f"{single[0].separate}, ahead of the next by {single[1].aicc - single[0].aicc:.1f} AICc.\n"
        f"- Q, if it is forced on the data: {forced}; beta is then {q.law.beta:.2f}, under the "
        f"best hypothesis {comparison.best.law.beta:.2f}.\n"
    )


def write_report(config: DataQuality, found: dict[str, list[Row]], console: Console) -> None:
    """Compares the levels; prints and writes report.md and report.png."""
    rows = admissible(as_table(found), min_tokens=config.min_tokens)
    comparison = compare_families(rows, by="corpus", reference=next(iter(found)))
    dropped = [f"{len(d.rows)} left out: {d.reason}" for d in rows.dropped] or ["none left out"]
    text = (
        "# What does data quality change?\n\n`python experiments/data_quality_law.py`\n\n"
        f"{verdict(comparison, config.draws)}\n## Hypotheses\n\n{len(rows)} runs; "
        "N = FLOPs a token / 6; "
        f"{'; '.join(dropped)}.\n\n{comparison_markdown(comparison, draws=config.draws)}"
    )
    cells = [
        (name, f"{row.C:.3g}", f"{row.N:,}", f"{row.D:,}", f"{row.loss:.4f}")
        for name, of in found.items()
        for row in of
    ]
    runs = table(("level", "C", "N", "D", "loss"), cells)
    (config.out / "report.md").write_text(
        f"{text}\n![loss by level](report.png)\n\n## Runs\n\n{runs}"
    )
    plot_levels(comparison, config.out / "report.png", "Loss over size by data quality")
    console.print(Markdown(text))
    console.print(f"report.md and report.png are in {config.out}", highlight=False)


def main(config: DataQuality) -> None:
    """Trains what is not trained yet, and writes the report."""
    console = Console()
    found: dict[str, list[Row]] = {}
    for name, corpus in levels(config).items():
        console.print(f"{name}: {corpus.n_train_tokens:,} training tokens", highlight=False)
        ladder = replace(config.ladder, out=config.out / name.replace(" ", "-"))
        found[name] = run_ladder(ladder, corpus, lambda line: console.print(line, highlight=False))
    if distributed.is_first():
        write_report(config, found, console)


if __name__ == "__main__":
    sys.exit(cli.run(main, DataQuality, description=__doc__))
