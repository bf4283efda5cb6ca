"""`slm scaling fit`: a law fitted to a table of runs, with intervals and how it was fitted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slm_jax.cli.scaling.table import Table, check, print_markdown
from slm_jax.cli.script import parse
from slm_jax.cli.show import console
from slm_jax.errors import UserError
from slm_jax.scaling.fit import fit
from slm_jax.scaling.intervals import bootstrap
from slm_jax.scaling.laws import LAWS


@dataclass(frozen=True)
class FitOptions(Table):
    """Fits a law to a table of runs."""

    law: str = "Chinchilla"
    """Which; an unknown name lists them."""
    method: Literal["vpnls", "lse"] | None = None
    """vpnls (variable projection, the default where a law allows it) or lse (a search from a grid
    of starts, as the Chinchilla paper did)."""
    objective: Literal["mse", "log_huber", "asymmetric"] | None = None
    """Default mse for vpnls, log_huber for lse."""
    out: Path | None = None
    """Also save the fit as JSON here."""


def command(args: Sequence[str]) -> None:
    """Prints the fit card; refuses a design that cannot carry the law."""
    options = parse(FitOptions, args=args, prog="slm scaling fit")
    if options.law not in LAWS:
        raise UserError(f"law={options.law!r} is unknown: choose from {', '.join(LAWS)}")
    law = LAWS[options.law]
    rows = options.read(needed=(*law.inputs, law.target))
    if {"N", "D"} <= set(law.inputs):
        check(rows)
    found = fit(law, rows, method=options.method, objective=options.objective)
    boot = bootstrap(found, rows, n=options.draws, seed=options.seed)
    card = found.card({name: boot.interval(name) for name in found.free})
    print_markdown(f"{card}\n90 % intervals: {boot.summary()}.\n")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(found.to_json())
        console().print(f"saved as {options.out}", highlight=False)
