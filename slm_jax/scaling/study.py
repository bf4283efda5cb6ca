"""From a table of runs to all that is said of it: checks, curves, fit, held-out prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from slm_jax.errors import UserError
from slm_jax.scaling.design import Finding, check_design, require_design
from slm_jax.scaling.fit import Fit, fit
from slm_jax.scaling.intervals import Bootstrap, bootstrap
from slm_jax.scaling.isoflop import (
    ExponentDraws,
    IsoFLOP,
    exponent_draws,
    group_budgets,
    isoflop,
)
from slm_jax.scaling.laws import Chinchilla
from slm_jax.scaling.rows import Rows

Size = Literal["parameters", "flops"]


@dataclass(frozen=True)
class HeldOut:
    """A prediction made without the runs it is about.

    Attributes:
        above: rows with more FLOPs than this were held out.
        fit: of the others.
        rows: the held-out rows.
        predicted: [n], nats a token.
        low: [n], lower ends of the 90 % intervals, noise of the new runs included.
        high: [n], upper ends.
    """

    above: float
    fit: Fit
    rows: Rows
    predicted: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Measured minus predicted, [n] nats a token."""
        return self.rows["loss"] - self.predicted

    @property
    def rmse(self) -> float:
        """Root mean square error, nats a token."""
        return float(np.sqrt(np.mean(self.errors**2)))

    @property
    def worst(self) -> float:
        """Largest |error| over the measured loss."""
        return float(np.max(np.abs(self.errors) / self.rows["loss"]))

    @property
    def covered(self) -> float:
        """Share of the measured losses inside their intervals."""
        inside = (self.low <= self.rows["loss"]) & (self.rows["loss"] <= self.high)
        return float(np.mean(inside))


def hold_out(rows: Rows, above: float, *, draws: int = 200, seed: int = 0) -> HeldOut:
    """Fits the cheaper runs and predicts the others.

    Args:
        rows: with N, D, C and loss.
        above: FLOPs; rows with more are predicted.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Raises:
        UserError: if no row is above, or those below cannot be fitted.
    """
    small, large = rows.take(rows["C"] <= above), rows.take(rows["C"] > above)
    if not len(large):
        raise UserError(f"hold_out={above:g}: no run has more FLOPs: choose a smaller one")
    if not len(small):
        raise UserError(f"hold_out={above:g}: no run has fewer FLOPs: choose a larger one")
    require_design(check_design(small))
    found = fit(Chinchilla, small)
    boot = bootstrap(found, small, n=draws, seed=seed)
    paths = np.stack([law.predict(large.columns) for law in boot.laws])
    rng = np.random.default_rng(seed)
    # A fit's residuals are smaller than the noise: it has bent towards them.
    spread = np.sqrt(found.n / max(1, found.n - len(found.free)))
    noise = spread * rng.choice(np.asarray(found.residuals), paths.shape)
    low, high = np.percentile(paths * np.exp(noise), [5, 95], axis=0)
    return HeldOut(above, found, large, found.law.predict(large.columns), low, high)


@dataclass(frozen=True)
class Study:
    """What one family's runs say.

    Attributes:
        rows: as fitted; N is what `size` says.
        size: what N is.
        findings: doubts about the design.
        fit: of all rows.
        boot: its bootstrap.
        curves: isoFLOP minima; `None` if fewer than two budgets have three sizes.
        exponents: their intervals; `None` without a noise level.
        held_out: prediction of the largest budget; `None` without curves.
    """

    rows: Rows
    size: Size
    findings: tuple[Finding, ...]
    fit: Fit
    boot: Bootstrap
    curves: IsoFLOP | None
    exponents: ExponentDraws | None
    held_out: HeldOut | None

    @property
    def law(self) -> Chinchilla:
        """The fitted law."""
        assert isinstance(self.fit.law, Chinchilla)
        return self.fit.law

    @property
    def draws(self) -> tuple[Chinchilla, ...]:
        """The law of every bootstrap draw."""
        return tuple(law for law in self.boot.laws if isinstance(law, Chinchilla))


def study(
    rows: Rows,
    *,
    size: Size = "parameters",
    noise: float | None = None,
    nearest: int | None = None,
    draws: int = 200,
    tolerance: float = 0.1,
    seed: int = 0,
) -> Study:
    """Checks, fits (variable projection), bootstraps, and predicts the largest budget.

    Args:
        rows: with N, D, C and loss, inadmissible runs already left out (`rows.admissible`).
        size: "parameters" takes N as it is; "flops" sets N = C / (6 D), the size whose 6 N D
            counts attention and head too, so that compute-optimal formulas hold for small models.
        noise: standard deviation of log loss between seeds, for the interval of the isoFLOP
            exponent; `None` for none.
        nearest: see `isoflop.isoflop`.
        draws: bootstrap draws.
        tolerance: of a budget, see `isoflop.group_budgets`.
        seed: of the bootstrap.

    Raises:
        UserError: if the design cannot carry the law (`design.check_design`), or a fit fails.
    """
    if size == "flops":
        rows = rows.with_columns(N=rows["C"] / (6 * rows["D"]))
    findings = check_design(rows)
    require_design(findings)
    found = fit(Chinchilla, rows)
    boot = bootstrap(found, rows, n=draws, seed=seed)
    curves = isoflop(rows, tolerance=tolerance, nearest=nearest)
    if sum(m.points >= 3 for m in curves.minima) < 2:
        return Study(rows, size, findings, found, boot, None, None, None)
    exponents = None
    if noise is not None and len(curves.interior) >= 2:
        exponents = exponent_draws(
            rows, noise, seed=seed, tolerance=tolerance, nearest=nearest, draws=draws
        )
    budgets = np.unique(group_budgets(rows["C"], tolerance=tolerance))
    held = None
    if len(budgets) >= 3:
        held = hold_out(rows, float(np.sqrt(budgets[-1] * budgets[-2])), draws=draws, seed=seed)
    return Study(rows, size, findings, found, boot, curves, exponents, held)


def seed_noise(rows: Rows, by: Sequence[str] = ("N", "D")) -> float:
    """Standard deviation of log loss between runs that differ in their seed only.

    Args:
        rows: several seeds of some cells.
        by: columns that are equal within a cell.

    Raises:
        UserError: if no cell has two runs.
    """
    keys = np.stack([rows[name] for name in by], axis=1)
    _, cell = np.unique(keys, axis=0, return_inverse=True)
    logs = np.log(rows["loss"])
    count = np.bincount(cell)
    squares = (logs - (np.bincount(cell, logs) / count)[cell]) ** 2
    freedom = int(np.sum(count - 1))
    if freedom < 1:
        raise UserError(f"seeds=1 in all {len(count)} cells: repeat a run with another seed")
    return float(np.sqrt(squares.sum() / freedom))
