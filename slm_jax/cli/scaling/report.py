"""`slm scaling report`: everything a table of runs says, as Markdown and a plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_jax.cli.scaling.table import Table, print_markdown
from slm_jax.cli.script import parse
from slm_jax.cli.show import console
from slm_jax.scaling.report import plot_study, study_markdown
from slm_jax.scaling.study import study


@dataclass(frozen=True)
class ReportOptions(Table):
    """Writes report.md and report.png: one section a family, where there is a column of them."""

    noise: float | None = None
    """Standard deviation of log loss between seeds, for the interval of isoFLOP exponents."""
    nearest: int | None = None
    """Sizes around the lowest one that a parabola is fitted to; default all."""
    out: Path = Path("runs/scaling")
    """Folder of the report."""


def command(args: Sequence[str]) -> None:
    """Prints and writes the report."""
    options = parse(ReportOptions, args=args, prog="slm scaling report")
    rows = options.read()
    if "family" in rows:
        parts = {name: rows.take(rows["family"] == name) for name in sorted(set(rows["family"]))}
    else:
        parts = {options.rows.name: rows}
    studies = {
        name: study(
            part,
            noise=options.noise,
            nearest=options.nearest,
            draws=options.draws,
            seed=options.seed,
        )
        for name, part in parts.items()
    }
    text = f"# Scaling study of {options.rows.name}\n\n" + "\n".join(
        study_markdown(s, name) for name, s in studies.items()
    )
    options.out.mkdir(parents=True, exist_ok=True)
    plot_study(studies, options.out / "report.png", options.rows.name)
    (options.out / "report.md").write_text(text + "\n![curves](report.png)\n")
    print_markdown(text)
    console().print(f"report.md and report.png are in {options.out}", highlight=False)
