"""IsoFLOP curves: the best size at each budget, and how it grows (arXiv 2203.15556, section 3.2).

A parabola in log N is biased where alpha and beta differ, noise or not (its minimum is not that of
E + A/N^alpha + B/D^beta): it is here to reproduce papers and to draw; `fit` is the default.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from slm_jax.errors import UserError
from slm_jax.scaling.rows import Rows

Method = Literal["parabola", "akima"]

_AKIMA_POINTS = 25  # a gap, as in arXiv 2406.19146


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient x^exponent."""

    coefficient: float
    exponent: float

    def __call__(self, x: float | np.ndarray) -> float | np.ndarray:
        """The value at `x`."""
        return self.coefficient * x**self.exponent


def power_law(x: np.ndarray, y: np.ndarray) -> PowerLaw:
    """The least-squares line through the logarithms.

    Raises:
        UserError: if there are fewer than two different x.
    """
    if len(np.unique(x)) < 2:
        raise UserError(
            f"budgets={len(np.unique(x))}: a power law needs two different ones or more"
        )
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(float(np.exp(intercept)), float(slope))


@dataclass(frozen=True)
class Minimum:
    """The lowest point of the curve of one budget.

    Attributes:
        C: FLOPs.
        N: parameters there; of a parabola, its vertex wherever that is.
        D: tokens there.
        loss: nats a token there.
        problem: why this is no minimum to trust ("" if it is): too few sizes, not convex, at the
            smallest or largest size.
        points: sizes measured.
    """

    C: float
    N: float
    D: float
    loss: float
    problem: str
    points: int

    @property
    def interior(self) -> bool:
        """Whether it lies between measured sizes."""
        return not self.problem


@dataclass(frozen=True)
class IsoFLOP:
    """The minima of all budgets.

    Attributes:
        method: how they were found.
        minima: one a budget, in order.
    """

    method: str
    minima: tuple[Minimum, ...]

    @property
    def interior(self) -> tuple[Minimum, ...]:
        """The minima that lie between measured sizes; only these are fitted."""
        return tuple(m for m in self.minima if m.interior)

    def growth(self, of: Literal["N", "D", "loss"], *, interior_only: bool = True) -> PowerLaw:
        """The power law in C of the best size, the best number of tokens, or the lowest loss.

        Args:
            of: which.
            interior_only: leave out minima that are not between measured sizes. With false their
                extrapolation is used too, as some papers did.

        Raises:
            UserError: if fewer than two budgets are left.
        """
        good = self.interior if interior_only else self.minima
        return power_law(np.array([m.C for m in good]), np.array([getattr(m, of) for m in good]))


def group_budgets(
    C: np.ndarray, budgets: Sequence[float] | None = None, *, tolerance: float = 0.1
) -> np.ndarray:
    """The budget each run belongs to, `[n]`, NaN if none.

    Args:
        C: `[n]` FLOPs.
        budgets: nominal budgets; by default runs whose C follow each other within `tolerance` are
            of one budget, their geometric mean.
        tolerance: largest |log(C / budget)|, or gap between neighbours.
    """
    logs = np.log(C)
    if budgets is not None:
        nominal = np.sort(np.asarray(budgets, np.float64))
        nearest = nominal[np.argmin(np.abs(logs[:, None] - np.log(nominal)), axis=1)]
        return np.where(np.abs(logs - np.log(nearest)) <= tolerance, nearest, np.nan)
    order = np.argsort(logs)
    group = np.concatenate([[0], np.cumsum(np.diff(logs[order]) > tolerance)])
    out = np.empty(len(logs))
    for g in np.unique(group):
        members = order[group == g]
        out[members] = np.exp(logs[members].mean())
    return out


def isoflop(
    rows: Rows,
    *,
    method: Method = "parabola",
    budgets: Sequence[float] | None = None,
    tolerance: float = 0.1,
    nearest: int | None = None,
) -> IsoFLOP:
    """Finds the best size at every budget.

    Args:
        rows: with N, D, C and loss; several runs of one size and budget are averaged.
        method: "parabola" fits loss = quadratic in log N (Hoffmann et al.); "akima" interpolates
            log loss over log N and takes the lowest point (Porian et al., arXiv 2406.19146).
        budgets: see `group_budgets`.
        tolerance: see `group_budgets`.
        nearest: fit the parabola to this many sizes around the lowest one; default all.

    Raises:
        UserError: if no run belongs to a budget.
    """
    if method not in ("parabola", "akima"):
        raise UserError(f"method={method!r} is not known: choose parabola or akima")
    label = group_budgets(rows["C"], budgets, tolerance=tolerance)
    found = np.unique(label[~np.isnan(label)])
    if not len(found):
        raise UserError(f"budgets={budgets}: no run has a C within {tolerance:g} of one in log")
    return IsoFLOP(
        method, tuple(_minimum(float(c), rows.take(label == c), method, nearest) for c in found)
    )


def _minimum(budget: float, rows: Rows, method: str, nearest: int | None) -> Minimum:
    sizes, where = np.unique(rows["N"], return_inverse=True)
    count = np.bincount(where)
    loss = np.bincount(where, rows["loss"]) / count
    # At one budget D is a function of N, 6 N D = C or with attention counted: read off in logs.
    tokens = np.exp(np.bincount(where, np.log(rows["D"])) / count)
    x = np.log(sizes)
    low = int(np.argmin(loss))
    n = len(sizes)

    def at(log_n: float, value: float, problem: str = "") -> Minimum:
        log_d = _interpolate(log_n, x, np.log(tokens))
        return Minimum(budget, float(np.exp(log_n)), float(np.exp(log_d)), value, problem, n)

    if n < 3:
        return at(x[low], float(loss[low]), f"{n} sizes: a curve needs 3")
    problem = ""
    if low in (0, n - 1):
        which = "smallest" if low == 0 else "largest"
        problem = f"lowest at the {which} size: widen the sizes"
    if method == "akima":
        if problem:
            return at(x[low], float(loss[low]), problem)
        grid = np.interp(np.arange((n - 1) * _AKIMA_POINTS + 1) / _AKIMA_POINTS, np.arange(n), x)
        values = Akima1DInterpolator(x, np.log(loss))(grid)
        best = int(np.argmin(values))
        return at(float(grid[best]), float(np.exp(values[best])))
    part = slice(None)
    if nearest is not None and nearest < n:
        first = min(max(low - nearest // 2, 0), n - max(nearest, 3))
        part = slice(first, first + max(nearest, 3))
    centre = x[part].mean()
    a, b, c = np.polyfit(x[part] - centre, loss[part], 2)
    if a <= 0:
        return at(x[low], float(loss[low]), problem or "the parabola opens downwards")
    vertex = float(centre - b / (2 * a))
    if not x[0] < vertex < x[-1]:
        problem = problem or "the parabola's vertex is outside the sizes"
    return at(vertex, float(c - b * b / (4 * a)), problem)


def _interpolate(x: float, xs: np.ndarray, ys: np.ndarray) -> float:
    """Linear in the interval of `xs` that holds `x`."""
    if len(xs) == 1:
        return float(ys[0])
    i = int(np.clip(np.searchsorted(xs, x) - 1, 0, len(xs) - 2))
    return float(ys[i] + (ys[i + 1] - ys[i]) * (x - xs[i]) / (xs[i + 1] - xs[i]))


@dataclass(frozen=True)
class ExponentDraws:
    """What `exponent_draws` gives.

    Attributes:
        N: `[m]` exponents of N*(C).
        D: `[m]` exponents of D*(C).
        failed: draws in which fewer than two budgets had an interior minimum.
    """

    N: np.ndarray
    D: np.ndarray
    failed: int

    def interval(self, of: Literal["N", "D"], level: float = 0.9) -> tuple[float, float]:
        """Percentile interval."""
        tails = 50 * (1 - level), 50 * (1 + level)
        low, high = np.percentile(getattr(self, of), tails)
        return float(low), float(high)


def exponent_draws(
    rows: Rows,
    noise: float,
    *,
    draws: int = 1000,
    seed: int = 0,
    method: Method = "parabola",
    budgets: Sequence[float] | None = None,
    tolerance: float = 0.1,
    nearest: int | None = None,
) -> ExponentDraws:
    """The exponents again with noise added to every loss (arXiv 2406.19146, appendix).

    Args:
        rows: as in `isoflop`.
        noise: standard deviation of log loss between seeds: measure it with two runs or more.
        draws: how often.
        seed: of the noise.
        method: as in `isoflop`.
        budgets: as in `isoflop`.
        tolerance: as in `isoflop`.
        nearest: as in `isoflop`.

    Raises:
        UserError: if `noise` is not positive, or every draw failed.
    """
    if not noise > 0:
        raise UserError(f"noise={noise} must be positive: the spread of log loss between seeds")
    rng = np.random.default_rng(seed)
    found: list[tuple[float, float]] = []
    for _ in range(draws):
        shaken = rows["loss"] * np.exp(rng.normal(0.0, noise, len(rows)))
        curves = isoflop(
            rows.with_columns(loss=shaken),
            method=method,
            budgets=budgets,
            tolerance=tolerance,
            nearest=nearest,
        )
        if len(curves.interior) >= 2:
            found.append((curves.growth("N").exponent, curves.growth("D").exponent))
    if not found:
        raise UserError(f"noise={noise:g}: no draw has two interior minima: train more sizes")
    n, d = np.array(found).T
    return ExponentDraws(n, d, draws - len(found))
