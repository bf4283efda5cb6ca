"""`slm scaling`: plan and train a ladder of runs, fit its law, predict, compare, report."""

from collections.abc import Sequence
from importlib import import_module

from slm_jax.errors import UserError

DESCRIPTION = """slm scaling COMMAND [options]

    plan       the runs of a ladder: sizes, tokens, learning rates; nothing is trained
    run        trains them, or goes on, and writes rows.csv
    fit        fits a law to a table of runs, with intervals and how it was fitted
    predict    the loss of a model, the best model of a budget, or held-out budgets
    compare    what differs between families: asymptote, worth of parameters, worth of tokens
    report     checks, isoFLOP curves, held-out prediction, fit card and a plot

A table is a CSV file with a line a run. Name its columns where they are not N (parameters), D
(training tokens), C (FLOPs), loss, run and family: --columns N=params D=tokens loss=val_loss. Of N,
D and C two are enough (C = 6 N D).

`slm scaling COMMAND --help` lists the options of a command."""

# A module of this package each, with `command(args)`.
COMMANDS = ("plan", "run", "fit", "predict", "compare", "report")


def command(args: Sequence[str]) -> None:
    """Runs the command that `args` begins with."""
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        print(DESCRIPTION)
    elif name in COMMANDS:
        import_module(f"slm_jax.cli.scaling.{name}").command(args[1:])
    else:
        raise UserError(f"command={name!r} does not exist: choose from {', '.join(COMMANDS)}")
