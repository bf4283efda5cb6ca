"""Which parameters of the law differ between families, judged by AIC and by held-out budgets."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slm_jax.errors import UserError
from slm_jax.scaling.fit import Fit, fit
from slm_jax.scaling.intervals import bootstrap
from slm_jax.scaling.isoflop import group_budgets
from slm_jax.scaling.laws.base import Law
from slm_jax.scaling.laws.quality import QualityNest, quality_nest
from slm_jax.scaling.rows import Rows

FORMS = ("", "E", "A", "B", "EB", "EA", "EAB")
"""Letters that differ between families: nothing; the asymptote; a multiple of N; a multiple of D
(the surveys' Q); and combinations."""


@dataclass(frozen=True)
class NestedFit:
    """One hypothesis, fitted.

    Attributes:
        separate: letters with one value a family, "" for one law of all.
        fit: parameters and provenance.
        aicc: n log(RSS / n) + 2 k + the small-sample term, k counting the noise; lower is better.
        held_out: rmse in nats on each budget, predicted from the others; NaN if there are fewer
            than three budgets.
    """

    separate: str
    fit: Fit
    aicc: float
    held_out: float

    @property
    def law(self) -> QualityNest:
        """The fitted law."""
        assert isinstance(self.fit.law, QualityNest)
        return self.fit.law

    def multipliers(self) -> dict[str, list[float]]:
        """What each family's own letters amount to, against family 0.

        `E`: difference in nats. `A`: its parameters are worth so many of family 0's,
        (A_0/A_j)^(1/alpha). `B`: its tokens are (Q), (B_0/B_j)^(1/beta).
        """
        return {
            letter: [_multiplier(self.law, letter, j) for j in range(self.law.groups)]
            for letter in self.law.separate
        }


@dataclass(frozen=True)
class Comparison:
    """All hypotheses on one table.

    Attributes:
        families: names, in the order of the `group` column; the first is the reference.
        fits: one a form, best (lowest AICc) first.
        rows: as fitted, with that column.
    """

    families: tuple[str, ...]
    fits: tuple[NestedFit, ...]
    rows: Rows

    @property
    def best(self) -> NestedFit:
        """The lowest AICc."""
        return self.fits[0]

    def of(self, separate: str) -> NestedFit:
        """The hypothesis with these letters."""
        return next(f for f in self.fits if f.separate == separate)

    def intervals(
        self, separate: str, *, draws: int = 200, level: float = 0.9, seed: int = 0
    ) -> dict[str, list[tuple[float, float]]]:
        """Percentile intervals of `NestedFit.multipliers`, by a bootstrap over runs.

        Right if the hypothesis is: an interval of a hypothesis that lost is narrow all the same.

        Args:
            separate: letters of the hypothesis.
            draws: bootstrap draws.
            level: of the intervals.
            seed: of the draws.
        """
        nested = self.of(separate)
        letters, groups = nested.law.separate, range(nested.law.groups)
        boot = bootstrap(nested.fit, self.rows, n=draws, seed=seed)
        tails = [(1 - level) / 2, (1 + level) / 2]

        def interval(letter: str, j: int) -> tuple[float, float]:
            values = [_multiplier(law, letter, j) for law in boot.laws]
            low, high = np.quantile(values, tails, method="nearest")
            return float(low), float(high)

        return {letter: [interval(letter, j) for j in groups] for letter in letters}


def grouped(rows: Rows, by: str, reference: str | None = None) -> tuple[Rows, tuple[str, ...]]:
    """The table with the column `group`, and the families' names, the reference first.

    Raises:
        UserError: if there are fewer than two families, or no such reference.
    """
    names = sorted(set(rows[by]))
    if len(names) < 2:
        raise UserError(f"{by}={names}: a comparison needs two families or more")
    if reference is not None:
        if reference not in names:
            raise UserError(f"reference={reference!r} is no {by}: choose {', '.join(names)}")
        names = [reference, *(n for n in names if n != reference)]
    group = np.array([names.index(n) for n in rows[by]], np.float64)
    return rows.with_columns(group=group), tuple(names)


def compare_families(
    rows: Rows,
    *,
    by: str = "family",
    reference: str | None = None,
    forms: Sequence[str] = FORMS,
    tolerance: float = 0.1,
) -> Comparison:
    """Fits every hypothesis by variable projection and ranks them.

    Args:
        rows: with N, D, C, loss and the label `by`.
        by: the label that tells families apart.
        reference: the family that multiples refer to; default the first by name.
        forms: hypotheses, see `FORMS`.
        tolerance: of the budgets that are held out in turn, see `isoflop.group_budgets`.

    Raises:
        UserError: on fewer than two families, or too few rows.
    """
    rows, names = grouped(rows, by, reference)
    fits = []
    for separate in forms:
        law = quality_nest(separate, len(names))
        n, k = len(rows), len(law.names()) + 1
        if n <= k + 1:
            raise UserError(f"rows={n}: {law.formula} of {len(names)} families needs {k + 2}")
        found = fit(law, rows)
        aicc = 2 * n * np.log(max(found.rmse, 1e-12)) + 2 * k * n / (n - k - 1)
        held_out = _leave_one_budget_out(law, rows, tolerance)
        fits.append(NestedFit(separate, found, float(aicc), held_out))
    return Comparison(names, tuple(sorted(fits, key=lambda f: f.aicc)), rows)


def _leave_one_budget_out(law: type[QualityNest], rows: Rows, tolerance: float) -> float:
    label = group_budgets(rows["C"], tolerance=tolerance)
    budgets = np.unique(label)
    if len(budgets) < 3:
        return float("nan")
    errors = []
    for budget in budgets:
        rest, out = rows.take(label != budget), rows.take(label == budget)
        # A family that has runs at this budget only has no law without it.
        out = out.take(np.isin(out["group"], rest["group"]))
        if len(out) and len(set(rest["group"])) == law.groups:
            errors.append(fit(law, rest).law.predict(out.columns) - out["loss"])
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2))) if errors else float("nan")


def _multiplier(law: Law, letter: str, j: int) -> float:
    """What the letter of family j amounts to; infinite where the family has no such term at all."""
    assert isinstance(law, QualityNest)
    reference, own = law.of_group(0), law.of_group(j)
    if letter == "E":
        return own.E - reference.E
    power = {"A": law.alpha, "B": law.beta}[letter]
    ours, theirs = getattr(own, letter), getattr(reference, letter)
    return float((theirs / ours) ** (1 / power)) if ours > 0 else float("inf")
