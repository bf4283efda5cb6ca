"""`slm scaling plan`: the runs of a ladder, nothing trained."""

from collections.abc import Sequence

import numpy as np

from slm_jax.cli.scaling.table import print_findings, print_markdown
from slm_jax.cli.script import parse
from slm_jax.cli.show import console, count
from slm_jax.data import load_tokenizer
from slm_jax.scaling.design import check_design
from slm_jax.scaling.report import table
from slm_jax.scaling.rows import Rows
from slm_jax.train.plan import Ladder, plan


def command(args: Sequence[str]) -> None:
    """Prints every size at every budget, and what is wrong with the grid."""
    ladder = parse(Ladder, description=__doc__, args=args, prog="slm scaling plan")
    rungs = plan(ladder, load_tokenizer(ladder.data.tokenizer).vocab_size)
    cells = [(r, c, d, steps) for r in rungs for c, d, steps in zip(
        r.budgets, r.tokens, r.steps, strict=True)]  # fmt: skip
    print_markdown(
        table(
            ("run", "N", "layers", "FLOPs/token", "lr", "batch", "C", "D", "steps", "D/N"),
            [
                (r.name, f"{r.size.total:,}", r.model.n_layers, count(r.flops_per_token),
                 f"{r.learning_rate:.3g}", f"{r.batch_tokens:,}", f"{c:.3g}", f"{d:,}",
                 f"{steps:,}", f"{d / r.size.total:.1f}")
                for r, c, d, steps in cells
            ],
        )
    )  # fmt: skip
    # No loss is known yet; the other checks need none.
    n, c, d = (np.array(x, float) for x in zip(*((r.size.total, c, d) for r, c, d, _ in cells),
                                               strict=True))  # fmt: skip
    print_findings(
        check_design(Rows({"N": n, "D": d, "C": c, "loss": np.ones_like(n)}), budgets=False)
    )
    total = sum(r.budgets[-1] for r in rungs)
    console().print(f"{len(rungs)} runs, {count(total)}FLOP in all", highlight=False)
