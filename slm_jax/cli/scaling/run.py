"""`slm scaling run`: trains a ladder, or goes on with it."""

from collections.abc import Sequence

from slm_jax.cli.host import keep_freed_memory
from slm_jax.cli.script import parse, together
from slm_jax.cli.show import console
from slm_jax.train.ladder import ROWS_FILE, run_ladder
from slm_jax.train.plan import Ladder


def command(args: Sequence[str]) -> None:
    """Runs the rungs of `--part` and writes rows.csv."""
    keep_freed_memory()
    ladder = parse(Ladder, description=__doc__, args=args, prog="slm scaling run")
    together(lambda: _run(ladder))


def _run(ladder: Ladder) -> None:
    out = console()
    rows = run_ladder(ladder, report=lambda line: out.print(line, highlight=False))
    out.print(f"{len(rows)} rows in {ladder.out / ROWS_FILE}", highlight=False)
