"""Effective size: planted multiples come back, and what cannot be reached has no number."""

from dataclasses import replace

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.scaling import bootstrap, fit
from slm_jax.scaling.effective_size import (
    READINGS,
    Target,
    draws_at_one_length,
    effective_size,
    optimal_compute,
    place,
    reading,
)
from slm_jax.scaling.laws import Chinchilla
from slm_jax.scaling.rows import Rows
from tests.scaling import tables

LAW = Chinchilla(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37)
N, D = 3e8, 2e10


def one(law: Chinchilla, target: Target, name: str) -> float:
    return READINGS[name](law, target)


def optimum(c: float) -> tuple[float, float]:
    """N* and D* at C, found by search, not by formula."""
    n = np.geomspace(1e6, 1e12, 200_001)
    best = n[np.argmin(LAW(N=n, D=c / (6 * n)))]
    return float(best), float(c / (6 * best))


def test_a_member_of_the_family_has_its_own_size() -> None:
    target = Target(LAW(N=N, D=D), N, D)
    assert one(LAW, target, "iso-data size") == pytest.approx(N)
    assert one(LAW, target, "data multiplier") == pytest.approx(1.0)
    assert one(LAW, target, "size at endless data") < N
    n, d = optimum(3e21)
    target = Target(LAW(N=n, D=d), n, d)
    assert one(LAW, target, "compute gain") == pytest.approx(1.0, rel=1e-6)
    assert one(LAW, target, "compute-optimal size") == pytest.approx(n, rel=1e-3)
    assert optimal_compute(LAW, target) == pytest.approx(6 * n * d, rel=1e-6)


@pytest.mark.parametrize("factor", [0.3, 2.0, 7.0])
def test_planted_multiples_come_back(factor: float) -> None:
    better = replace(LAW, A=LAW.A * factor**-LAW.alpha)
    target = Target(better(N=N, D=D), N, D)
    assert one(LAW, target, "iso-data size") == pytest.approx(factor * N)
    richer = replace(LAW, B=LAW.B * factor**-LAW.beta)
    target = Target(richer(N=N, D=D), N, D)
    assert one(LAW, target, "data multiplier") == pytest.approx(factor)


def test_below_the_asymptote_there_is_no_number() -> None:
    for loss in (1.8, 1.5):
        got = effective_size([LAW] * 10, Target(loss, N, D))
        assert all(not r.reached and np.isinf(r.median) for r in got.values())
        assert "outside the reference family's reach (100 % of draws)" in str(got["compute gain"])
    # Reachable with endless data, not with these tokens.
    loss = LAW.E + 0.9 * LAW.B * D**-LAW.beta
    got = effective_size([LAW] * 10, Target(loss, N, D))
    assert not got["iso-data size"].reached
    assert got["size at endless data"].reached


def test_the_interval_grows_towards_the_asymptote() -> None:
    """d ln N_eff / d loss = -1 / (alpha (loss - E - B D^-beta))."""
    for n in (1e8, 1e9, 1e10):
        loss, error = LAW(N=n, D=D), 0.002
        got = effective_size([LAW] * 4000, Target(loss, n, D, loss_error=error))["iso-data size"]
        left = loss - LAW.E - LAW.B * D**-LAW.beta
        expected = 2 * 1.645 * error / (LAW.alpha * left)
        assert np.log(got.high / got.low) == pytest.approx(expected, rel=0.1)


def test_draws_without_a_solution_count() -> None:
    some = reading(np.array([1.0] * 97 + [np.inf] * 3))
    assert some.reached
    assert some.unreachable == pytest.approx(0.03)
    many = reading(np.array([1.0] * 90 + [np.nan] * 10))
    assert not many.reached
    assert np.isinf(many.high)


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="draws"):
        effective_size([], Target(2.0, N, D))
    with pytest.raises(UserError, match="unknown"):
        effective_size([LAW], Target(2.0, N, D), readings=("size",))


def test_a_family_measured_at_one_length_has_its_own_sizes() -> None:
    n = np.repeat(np.geomspace(1e5, 1e6, 4), 2)
    truth = Chinchilla(E=1.5, A=30.0, B=0.0, alpha=0.3, beta=1.0)
    rows = Rows({"N": n, "D": np.full(8, 1e5), "C": 6e5 * n, "loss": truth(N=n, D=1e5)})
    laws = draws_at_one_length(rows, 0.003, draws=60)
    for size in (1e5, 3e5, 1e6):
        target = Target(truth(N=size, D=1e5), size, 1e5, loss_error=0.003)
        got = effective_size(laws, target, readings=("iso-data size",))["iso-data size"]
        assert got.low < size < got.high
        assert got.high < 1.5 * got.low
    with pytest.raises(UserError, match="differ"):
        draws_at_one_length(rows.with_columns(D=n), 0.01)
    with pytest.raises(UserError, match="sizes=2"):
        draws_at_one_length(rows.take(np.arange(4)), 0.01)


def test_each_budget_is_placed_by_its_best_run() -> None:
    rows = tables.isoflop_table(noise=0.0)
    placed = place([tables.LAW], rows)
    assert [t.flops for t, _ in placed] == pytest.approx(list(tables.BUDGETS))
    for target, readings in placed:
        same = np.isclose(rows["C"], target.flops)
        assert target.loss == rows["loss"][same].min()
        assert readings["iso-data size"].median == pytest.approx(target.N)
        assert readings["compute gain"].median == pytest.approx(1.0, abs=0.05)
        assert readings["compute gain"].median <= 1 + 1e-9  # a grid is not the optimum


@pytest.mark.slow
def test_nine_intervals_of_ten_cover_the_effective_size() -> None:
    """200 simulated studies of the reference family, and a target measured with the same noise."""
    noise, model = 0.004, Target(float(tables.LAW(N=6e7, D=4e9)), 3e7, 4e9)
    names = ("iso-data size", "compute-optimal size", "compute gain", "data multiplier")
    covered: dict[str, list[bool]] = {name: [] for name in names}
    for seed in range(200):
        rows = Rows(tables.isoflop_table(noise=noise, seed=seed).columns)
        boot = bootstrap(fit(Chinchilla, rows), rows, n=100, seed=seed)
        error = noise * model.loss
        z = np.random.default_rng([7, seed]).standard_normal()
        target = replace(model, loss=model.loss + error * z, loss_error=error)
        laws = [law for law in boot.laws if isinstance(law, Chinchilla)]
        got = effective_size(laws, target, readings=names, seed=seed)
        for name in names:
            true = READINGS[name](tables.LAW, model)
            covered[name].append(got[name].low <= true <= got[name].high)
    shares = {name: float(np.mean(hits)) for name, hits in covered.items()}
    assert all(0.85 <= share <= 0.95 for share in shares.values()), shares
