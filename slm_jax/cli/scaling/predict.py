"""`slm scaling predict`: a loss, the best model of a budget, held-out budgets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slm_jax.cli.scaling.table import Table, check, print_markdown, spread
from slm_jax.cli.script import parse
from slm_jax.errors import UserError
from slm_jax.scaling.design import next_run
from slm_jax.scaling.fit import Fit, fit
from slm_jax.scaling.intervals import bootstrap
from slm_jax.scaling.laws import Chinchilla, Law
from slm_jax.scaling.optimum import compute_optimal, inference_aware, loss_to_compute
from slm_jax.scaling.report import held_out_markdown, table
from slm_jax.scaling.rows import Rows
from slm_jax.scaling.study import hold_out

Statistics = dict[str, Callable[[Law], float]]


@dataclass(frozen=True)
class PredictOptions(Table):
    """Predicts from a fit of Chinchilla's law: one of --model, --budget, --loss, --hold-out."""

    model: tuple[float, float] | None = None
    """N and D of a model whose loss is asked for."""
    budget: float | None = None
    """FLOPs whose best model is asked for."""
    loss: float | None = None
    """A loss whose cheapest model is asked for."""
    hold_out: float | None = None
    """FLOPs above which runs are not fitted but predicted, and then compared."""
    inference_tokens: float = 0.0
    """With --loss: also the model that is cheapest to train and to serve for so many tokens."""
    next_runs: int = 0
    """With --model: also propose this many runs that would narrow its interval most."""


def command(args: Sequence[str]) -> None:
    """Prints the prediction with its interval; for held-out budgets then what was measured."""
    options = parse(PredictOptions, args=args, prog="slm scaling predict")
    asked = [k for k in ("model", "budget", "loss", "hold_out") if getattr(options, k) is not None]
    if len(asked) != 1:
        raise UserError(
            f"predict={' and '.join(asked) or 'nothing'}: give one of --model N D, --budget C, "
            "--loss L, --hold-out C"
        )
    if options.next_runs and options.model is None:
        raise UserError(f"next_runs={options.next_runs} needs --model N D: what they are to narrow")
    rows = options.read()
    if options.hold_out is not None:
        held = hold_out(rows, options.hold_out, draws=options.draws, seed=options.seed)
        print_markdown(held_out_markdown(held))
        return
    check(rows)
    found = fit(Chinchilla, rows)
    text = _prediction(options, found, rows)
    if options.model is not None and options.next_runs:
        text += "\n" + _next_runs(found, rows, *options.model, options.next_runs)
    print_markdown(text)


def _statistics(options: PredictOptions) -> Statistics:
    """What is asked for, as functions of the law."""
    if options.model is not None:
        n, d = options.model
        return {f"loss of N={n:g}, D={d:g}": lambda law: float(law(N=n, D=d))}
    if options.budget is not None:
        c = options.budget
        return {
            "N*": lambda law: compute_optimal(law, c).N,
            "D*": lambda law: compute_optimal(law, c).D,
            "L*": lambda law: compute_optimal(law, c).loss,
        }
    assert options.loss is not None
    loss, served = options.loss, options.inference_tokens
    found: Statistics = {"training FLOPs": lambda law: loss_to_compute(law, loss)}
    if served:
        found |= {
            "N to serve": lambda law: inference_aware(law, loss, served).N,
            "D to serve": lambda law: inference_aware(law, loss, served).D,
            "all FLOPs over compute-optimal": lambda law: inference_aware(law, loss, served).ratio,
        }
    return found


def _prediction(options: PredictOptions, found: Fit, rows: Rows) -> str:
    statistics = _statistics(options)
    values = {name: f(found.law) for name, f in statistics.items()}  # refuses what is unreachable
    boot = bootstrap(found, rows, n=options.draws, seed=options.seed)

    def of_draw(f: Callable[[Law], float], law: Law) -> float:
        try:
            return f(law)
        except UserError:  # no such model under this draw's law
            return np.inf

    cells = [
        (name, f"{values[name]:.5g}", spread(np.array([of_draw(f, law) for law in boot.laws])))
        for name, f in statistics.items()
    ]
    text = table(("quantity", "value", "90 % interval"), cells)
    return f"{text}\n{found.law}\n\n{boot.summary()}.\n"


def _next_runs(found: Fit, rows: Rows, n: float, d: float, count: int) -> str:
    """The most useful of the runs that cost no more than the dearest so far."""
    sizes, tokens = (np.geomspace(rows[k].min() / 2, rows[k].max() * 2, 12) for k in ("N", "D"))
    grid = np.stack(np.meshgrid(sizes, tokens)).reshape(2, -1)
    grid = grid[:, 6 * grid[0] * grid[1] <= rows["C"].max()]
    best = next_run(
        found.law,
        rows,
        lambda law: float(law(N=n, D=d)),
        noise=float(np.std(found.residuals)),
        candidates=Rows({"N": grid[0], "D": grid[1]}),
    )[:count]
    cells = [
        (f"{r.N:.3g}", f"{r.D:.3g}", f"{r.C:.3g}", f"{r.half_width:.4f}", f"{r.before:.4f}")
        for r in best
    ]
    return (
        "Runs no dearer than the dearest so far that would narrow the interval most (linearised, "
        "noise of the residuals):\n\n"
        + table(("N", "D", "C", "half-width with it", "without"), cells)
    )
