"""IsoFLOP minima: exact where the parabola is exact, biased as published where it is not."""

from collections.abc import Callable

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.scaling.isoflop import exponent_draws, group_budgets, isoflop, power_law
from slm_jax.scaling.laws import Chinchilla
from slm_jax.scaling.rows import Rows

BUDGETS = 10.0 ** np.arange(17, 22)


def curves(
    alpha: float, beta: float, factor: float, shift: Callable[[float], float] = lambda c: 1.0
) -> tuple[Rows, Callable[[float], float]]:
    """Noise-free isoFLOP curves of 15 sizes within `factor` of the optimum, and the true D*(C)."""
    law = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=alpha, beta=beta)
    g = (alpha * law.A / (beta * law.B)) ** (1 / (alpha + beta))
    sizes, budgets = [], []
    for c in BUDGETS:
        best = g * (c / 6) ** (beta / (alpha + beta)) * shift(c)
        sizes.append(best * np.exp(np.linspace(-np.log(factor), np.log(factor), 15)))
        budgets.append(np.full(15, c))
    n, c = np.concatenate(sizes), np.concatenate(budgets)
    d = c / (6 * n)
    rows = Rows({"N": n, "D": d, "C": c, "loss": law(N=n, D=d)})
    return rows, lambda c: (c / 6) ** (alpha / (alpha + beta)) / g


@pytest.mark.parametrize(
    ("alpha", "beta", "published"),
    [
        (0.34, 0.28, (-0.33, -1.30, -2.90, -5.10)),
        (0.465, 0.155, (-1.67, -6.50, -13.91, -23.12)),
        (0.31, 0.31, (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_the_parabola_has_the_published_bias(
    alpha: float, beta: float, published: tuple[float, ...]
) -> None:
    """Relative error of D* extrapolated to 1e24 FLOPs, in percent (Czech 2026)."""
    for factor, expected in zip((2, 4, 8, 16), published, strict=True):
        rows, true = curves(alpha, beta, factor)
        found = isoflop(rows).growth("D")(1e24)
        assert 100 * (found / true(1e24) - 1) == pytest.approx(expected, abs=0.02)


def test_grids_off_their_centre_bias_it_even_where_alpha_is_beta() -> None:
    """Percent, as published; the vertices lie outside the narrow grids."""
    for factor, expected in zip((2, 4, 8, 16), (3.97, 3.47, 2.65, 1.51), strict=True):
        rows, true = curves(0.31, 0.31, factor, lambda c: 1 / 3)
        found = isoflop(rows).growth("D", interior_only=False)(1e24)
        assert 100 * (found / true(1e24) - 1) == pytest.approx(expected, abs=0.02)
    narrow, _ = curves(0.31, 0.31, 2, lambda c: 1 / 3)
    assert not isoflop(narrow).interior


def test_akima_finds_the_minimum_between_sizes() -> None:
    rows, true = curves(0.34, 0.28, 4)
    found = isoflop(rows, method="akima")
    assert len(found.interior) == len(BUDGETS)
    for m in found.minima:
        assert abs(np.log(m.D / true(m.C))) < 0.02


def test_several_seeds_are_averaged_and_nearest_uses_part_of_the_curve() -> None:
    rows, _ = curves(0.34, 0.28, 8)
    above, below = (rows.with_columns(loss=rows["loss"] + s) for s in (0.1, -0.1))
    both = Rows({k: np.concatenate([above[k], below[k]]) for k in rows.columns})
    for a, b in zip(isoflop(both).minima, isoflop(rows).minima, strict=True):
        assert abs(np.log(a.N / b.N)) < 1e-6
    # Five points around the minimum are nearly free of the bias of a wide curve.
    (_, true), wide, near = curves(0.34, 0.28, 8), *(isoflop(rows, nearest=k) for k in (None, 5))
    for a, b in zip(wide.minima, near.minima, strict=True):
        assert abs(np.log(b.D / true(b.C))) < 0.2 * abs(np.log(a.D / true(a.C)))


def test_a_curve_without_a_minimum_says_so() -> None:
    rows, _ = curves(0.34, 0.28, 4)
    lower = rows.take(rows["N"] < np.repeat([m.N for m in isoflop(rows).minima], 15) * 0.7)
    assert all("largest size" in m.problem for m in isoflop(lower).minima)
    few = rows.take(np.arange(len(rows)) % 15 < 2)
    assert all("2 sizes" in m.problem for m in isoflop(few).minima)
    with pytest.raises(UserError, match="two different"):
        isoflop(lower).growth("N")


def test_budgets_are_grouped_by_nearness_or_by_name() -> None:
    c = np.array([1e18, 1.05e18, 3e18, 0.97e18, 2e19])
    label = group_budgets(c)
    assert len(set(label)) == 3
    assert label[0] == label[1] == label[3]
    named = group_budgets(c, [1e18, 3e18])
    assert list(named[:4]) == [1e18, 1e18, 3e18, 1e18]
    assert np.isnan(named[4])


def test_noise_gives_an_interval_that_holds_the_exponent() -> None:
    rows, _ = curves(0.31, 0.31, 6)
    draws = exponent_draws(rows, 0.002, draws=60)
    low, high = draws.interval("N")
    assert low < 0.5 < high
    assert high - low < 0.2
    assert draws.failed == 0
    with pytest.raises(UserError, match="noise=0"):
        exponent_draws(rows, 0.0)


def test_a_power_law_is_recovered() -> None:
    x = np.array([1.0, 10.0, 1e3])
    found = power_law(x, 3 * x**0.7)
    assert found.exponent == pytest.approx(0.7)
    assert found(50.0) == pytest.approx(3 * 50**0.7)
