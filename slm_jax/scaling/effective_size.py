"""Effective size: how large a model of a reference family matches a loss, and when none does.

"Ten times its parameter count" is no property of a model: it depends on the reference family, the
tokens, the budget, and near the family's asymptote on the third digit of the loss
(d ln N_eff / d loss = -1 / (alpha (loss - E - B D^-beta))). Four readings, each with an interval,
and "outside the reference family's reach" where the family has no such model:

    iso-data          N_eff = (A / (loss - E - B D^-beta))^(1/alpha)   same tokens
    compute-optimal   C_eff with L*(C_eff) = loss, N_eff* = N*(C_eff), gain C_eff / C
    iso-size          q = (B / (loss - E - A N^-alpha))^(1/beta) / D   one token is worth q
    lower bound       N_inf = (A / (loss - E))^(1/alpha)               endless data
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slm_jax.errors import UserError
from slm_jax.scaling.fit import fit
from slm_jax.scaling.intervals import refit
from slm_jax.scaling.isoflop import group_budgets
from slm_jax.scaling.laws import Chinchilla
from slm_jax.scaling.optimum import compute_optimal, loss_to_compute
from slm_jax.scaling.rows import Rows

REACH = 0.05
"""Share of draws without a solution above which no number is given."""


@dataclass(frozen=True)
class Target:
    """The model to be placed; losses on the text that the reference family was measured on.

    Attributes:
        loss: nats a token (or bits a byte, if the family's are).
        N: parameters (of an MoE: state active and total apart).
        D: tokens.
        C: FLOPs; default 6 N D.
        loss_error: standard error of `loss`.
    """

    loss: float
    N: float
    D: float
    C: float | None = None
    loss_error: float = 0.0

    @property
    def flops(self) -> float:
        """C, or 6 N D."""
        return 6 * self.N * self.D if self.C is None else self.C


@dataclass(frozen=True)
class Reading:
    """One number with its interval.

    Attributes:
        median: over the draws, those without a solution counted as infinite.
        low: lower end of the interval.
        high: upper end; infinite if more draws than that tail have no solution.
        unreachable: share of draws in which the family has no such model.
    """

    median: float
    low: float
    high: float
    unreachable: float

    @property
    def reached(self) -> bool:
        """Whether a number may be given."""
        return self.unreachable <= REACH

    def __str__(self) -> str:
        if not self.reached:
            share = 100 * self.unreachable
            return f"outside the reference family's reach ({share:.0f} % of draws)"
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def reading(values: np.ndarray, *, level: float = 0.9) -> Reading:
    """Median and percentile interval of draws in which infinity (or NaN) is "no such model"."""
    values = np.where(np.isfinite(values), values, np.inf)
    tails = (1 - level) / 2
    # Nearest rank: no interpolation towards infinity.
    low, median, high = np.quantile(values, [tails, 0.5, 1 - tails], method="inverted_cdf")
    return Reading(float(median), float(low), float(high), float(np.mean(np.isinf(values))))


def iso_data(law: Chinchilla, target: Target) -> float:
    """Parameters of the family's model that has this loss after the same tokens, or infinity."""
    return _solve(law.A, target.loss - law.E - law.B * target.D**-law.beta, law.alpha)


def lower_bound(law: Chinchilla, target: Target) -> float:
    """Parameters of the family's model that has this loss after endless tokens, or infinity."""
    return _solve(law.A, target.loss - law.E, law.alpha)


def data_multiplier(law: Chinchilla, target: Target) -> float:
    """Tokens that the family needs at this size, over the target's tokens, or infinity."""
    left = target.loss - law.E - law.A * target.N**-law.alpha
    return _solve(law.B, left, law.beta) / target.D


def optimal_compute(law: Chinchilla, target: Target) -> float:
    """FLOPs at which the family's best model has this loss, or infinity."""
    if target.loss <= law.E or law.A == 0 or law.B == 0:
        return np.inf
    return loss_to_compute(law, target.loss)


def optimal_size(law: Chinchilla, target: Target) -> float:
    """Parameters of the family's compute-optimal model of this loss, or infinity."""
    compute = optimal_compute(law, target)
    return compute_optimal(law, compute).N if np.isfinite(compute) else np.inf


def _solve(scale: float, left: float, power: float) -> float:
    """The x with scale x^-power = left; infinite if none is finite."""
    return (scale / left) ** (1 / power) if left > 0 else np.inf


READINGS: Mapping[str, Callable[[Chinchilla, Target], float]] = {
    "iso-data size": iso_data,
    "compute-optimal size": optimal_size,
    "compute gain": lambda law, target: optimal_compute(law, target) / target.flops,
    "data multiplier": data_multiplier,
    "size at endless data": lower_bound,
}


def effective_size(
    draws: Sequence[Chinchilla],
    target: Target,
    *,
    readings: Sequence[str] = tuple(READINGS),
    level: float = 0.9,
    seed: int = 0,
) -> dict[str, Reading]:
    """Places a model on the scale of a reference family.

    Args:
        draws: the family's law, once a bootstrap draw (`intervals.bootstrap`).
        target: the model.
        readings: which; see `READINGS`.
        level: of the intervals.
        seed: of the target's measurement error.

    Returns:
        A `Reading` a name.

    Raises:
        UserError: if there are no draws or a reading is unknown.
    """
    if not draws:
        raise UserError("draws=() is empty: bootstrap the reference family's fit first")
    unknown = [name for name in readings if name not in READINGS]
    if unknown:
        raise UserError(f"readings={unknown} are unknown: choose from {', '.join(READINGS)}")
    rng = np.random.default_rng(seed)
    losses = target.loss + target.loss_error * rng.standard_normal(len(draws))
    targets = [
        Target(float(loss), target.N, target.D, target.flops, target.loss_error) for loss in losses
    ]
    return {
        name: reading(
            np.array([READINGS[name](d, t) for d, t in zip(draws, targets, strict=True)]),
            level=level,
        )
        for name in readings
    }


def draws_at_one_length(
    rows: Rows, noise: float, *, draws: int = 200, seed: int = 0
) -> list[Chinchilla]:
    """Laws of a reference family that was measured at one number of tokens, E + A / N^alpha.

    Its sizes are few and chosen, so the losses are drawn anew and not the runs: each draw adds the
    noise of a seed to every loss and fits again. Only the iso-data reading means anything of such
    laws.

    Args:
        rows: with N, D (all equal) and loss, of three sizes or more.
        noise: standard deviation of log loss between seeds.
        draws: how many.
        seed: of the noise.

    Raises:
        UserError: if the tokens differ, or there are fewer than three sizes.
    """
    if len(np.unique(rows["D"])) > 1:
        raise UserError(f"D={np.unique(rows['D'])} differ: fit a law of N and D instead")
    if len(np.unique(rows["N"])) < 3:
        raise UserError(f"sizes={len(np.unique(rows['N']))}: a curve over N needs 3 or more")
    rng = np.random.default_rng(seed)
    base = fit(Chinchilla, rows, fixed={"B": 0.0, "beta": 1.0})
    problem = base.problem(rows)
    found = []
    for _ in range(draws):
        shaken = rows["loss"] * np.exp(noise * rng.standard_normal(len(rows)))
        law = refit(replace(problem, target=shaken), base.law, base.method)
        assert isinstance(law, Chinchilla)
        found.append(law)
    return found


def best_of_budgets(rows: Rows, *, tolerance: float = 0.1, loss_error: float = 0.0) -> list[Target]:
    """The run of lowest loss of every budget, as targets, by rising budget.

    Args:
        rows: of one family, with N, D, C and loss.
        tolerance: of a budget, see `isoflop.group_budgets`.
        loss_error: standard error of the losses.
    """
    label = group_budgets(rows["C"], tolerance=tolerance)
    found = []
    for budget in np.unique(label):
        of = np.flatnonzero(label == budget)
        i = int(of[np.argmin(rows["loss"][of])])
        n, d, c, loss = (float(rows[k][i]) for k in ("N", "D", "C", "loss"))
        found.append(Target(loss, n, d, c, loss_error))
    return found


def place(
    draws: Sequence[Chinchilla], rows: Rows, *, tolerance: float = 0.1, loss_error: float = 0.0
) -> list[tuple[Target, dict[str, Reading]]]:
    """The best run of every budget of a family on the scale of a reference family.

    Args:
        draws: the reference's law, once a bootstrap draw.
        rows: of the family, with N, D, C and loss.
        tolerance: of a budget, see `isoflop.group_budgets`.
        loss_error: standard error of the losses.
    """
    targets = best_of_budgets(rows, tolerance=tolerance, loss_error=loss_error)
    return [(target, effective_size(draws, target)) for target in targets]
