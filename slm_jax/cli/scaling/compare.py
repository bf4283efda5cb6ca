"""`slm scaling compare`: what differs between the families of a table, and their effective size."""

from collections.abc import Sequence
from dataclasses import dataclass

from slm_jax.cli.scaling.table import Table, print_markdown
from slm_jax.cli.script import parse
from slm_jax.scaling.compare import compare_families
from slm_jax.scaling.effective_size import place
from slm_jax.scaling.report import comparison_markdown, effective_size_markdown
from slm_jax.scaling.study import study


@dataclass(frozen=True)
class CompareOptions(Table):
    """Compares the families of one table."""

    by: str = "family"
    """Column that tells them apart."""
    reference: str | None = None
    """Family that multiples refer to; default the first by name."""


def command(args: Sequence[str]) -> None:
    """Prints the nested hypotheses, best first, and each family's effective size."""
    options = parse(CompareOptions, args=args, prog="slm scaling compare")
    rows = options.read(label=options.by)
    found = compare_families(rows, by=options.by, reference=options.reference)
    reference, *others = found.families
    base = study(rows.take(rows[options.by] == reference), draws=options.draws, seed=options.seed)
    placed = {name: place(base.draws, rows.take(rows[options.by] == name)) for name in others}
    text = comparison_markdown(found, draws=options.draws)
    print_markdown(f"{text}\n{effective_size_markdown(placed, reference)}")
