"""Intervals: bootstrap and profile against theory, published errors and simulated studies."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from slm_jax.errors import UserError
from slm_jax.scaling import (
    Rows,
    bootstrap,
    compute_optimal,
    exponents,
    fit,
    profile,
    read_csv,
)
from slm_jax.scaling.intervals import leverage, refit
from slm_jax.scaling.laws import Chinchilla, DataConstrained, Envelope
from slm_jax.scaling.problem import NotConverged

FIGURE_4 = Path(__file__).parents[2] / "experiments/data/chinchilla_figure4.csv.gz"
TRUTH = Chinchilla.from_published("besiroglu")
STATISTICS = {
    "a": lambda law: exponents(law)[0],
    "loss at 1e22": lambda law: compute_optimal(law, 1e22).loss,
    "N at 1e22": lambda law: compute_optimal(law, 1e22).N,
}


def study(seed, noise=0.004, sizes=9):
    """A simulated isoFLOP study: 5 budgets, sizes about the optimum of each, noisy losses."""
    random = np.random.default_rng([2026, seed])
    n, c = [], []
    for budget in np.geomspace(1e18, 1e21, 5):
        n.append(compute_optimal(TRUTH, budget).N * np.geomspace(1 / 8, 8, sizes))
        c.append(np.full(sizes, budget))
    n, c = np.concatenate(n), np.concatenate(c)
    n = n * np.exp(random.normal(0, 0.05, n.size))
    d = c / (6 * n)
    loss = TRUTH(N=n, D=d) * np.exp(random.normal(0, noise, n.size))
    return Rows({"N": n, "D": d, "C": c, "loss": loss})


def line(noise=0.01, n=40, seed=0):
    """Rows of a law that is a straight line once its exponent is fixed."""
    c = np.geomspace(1e18, 1e22, n)
    loss = 2 + 20 * c**-0.1 + np.random.default_rng(seed).normal(0, noise, n)
    return Rows({"C": c, "loss": loss}), c**-0.1


def test_the_bootstrap_repeats_the_published_standard_errors():
    rows = read_csv(FIGURE_4)
    rows = rows.keep(rows["loss"] < np.sort(rows["loss"])[-5], "the five highest losses")
    found = fit(Chinchilla, rows, method="lse")
    draws = bootstrap(found, rows, n=200, statistics={"a": STATISTICS["a"]})
    assert draws.failed == 0
    # Besiroglu et al. 2024, table 1: 4,000 draws.
    errors = {"E": 0.0257, "alpha": 0.0154, "beta": 0.0206, "a": 0.020}
    for name, error in errors.items():
        assert draws.draws[name].std() == pytest.approx(error, rel=0.15), name
    low, high = draws.interval("alpha", 0.95)
    assert low == pytest.approx(0.317, abs=0.006)
    assert high == pytest.approx(0.373, abs=0.006)


def test_profiles_are_the_t_intervals_of_a_straight_line():
    rows, x = line()
    found = fit(Envelope, rows, fixed={"alpha": 0.1})
    theory = scipy.stats.linregress(x, rows["loss"])
    t = scipy.stats.t.ppf(0.95, len(rows) - 2)
    for name, centre, error in (
        ("A", theory.slope, theory.stderr),
        ("E", theory.intercept, theory.intercept_stderr),
    ):
        want = (centre - t * error, centre + t * error)
        assert profile(found, rows, name).interval(0.9) == pytest.approx(want, rel=1e-5)


def test_the_bootstrap_agrees_with_the_straight_line_too():
    rows, x = line(n=200)
    found = fit(Envelope, rows, fixed={"alpha": 0.1})
    theory = scipy.stats.linregress(x, rows["loss"])
    draws = bootstrap(found, rows, n=500)
    assert draws.draws["A"].std() == pytest.approx(theory.stderr, rel=0.15)
    assert draws.draws["alpha"] == pytest.approx(np.full(500, 0.1))
    assert draws.cluster is None
    assert draws.clusters == 200


def test_rows_of_one_run_are_drawn_together():
    rows, _ = line(n=40)
    one = Rows(rows.columns, {"run": np.arange(40).astype(str)})
    # Five copies of each run are no more evidence than one.
    five = one.take(np.repeat(np.arange(40), 5))
    spread = {}
    for name, table, cluster in (("one", one, "run"), ("five", five, "run"), ("rows", five, None)):
        found = fit(Envelope, table, fixed={"alpha": 0.1})
        draws = bootstrap(found, table, n=300, cluster=cluster)
        spread[name] = draws.draws["A"].std()
    assert spread["five"] == pytest.approx(spread["one"], rel=1e-6)
    assert spread["rows"] == pytest.approx(spread["one"] / np.sqrt(5), rel=0.15)


def test_draws_are_those_of_the_seed_and_estimates_those_of_the_fit():
    rows = study(0)
    found = fit(Chinchilla, rows)
    one, same, other = (
        bootstrap(found, rows, n=20, seed=seed, statistics=STATISTICS) for seed in (1, 1, 2)
    )
    for name in (*Chinchilla.names(), *STATISTICS):
        assert np.array_equal(one.draws[name], same.draws[name])
        assert not np.array_equal(one.draws[name], other.draws[name])
        low, high = one.interval(name)
        assert low < one.estimates[name] < high
    assert one.estimates["a"] == exponents(found.law)[0]
    assert len(one.laws) == one.n == 20
    assert "20 draws over 45 rows" in one.summary()


@pytest.mark.parametrize("method", ["vpnls", "lse"])
def test_a_weighted_refit_is_the_fit_of_repeated_rows(method):
    rows = study(1)
    found = fit(Chinchilla, rows, method=method)
    counts = np.random.default_rng(5).integers(0, 3, len(rows))
    law = refit(found.problem(rows).weighted(counts.astype(np.float64)), found.law, method)
    again = fit(Chinchilla, rows.take(np.repeat(np.arange(len(rows)), counts)), method=method)
    assert law.values == pytest.approx(again.law.values, rel=1e-4)


def test_leverage_is_that_of_linear_regression():
    rows, x = line()
    found = fit(Envelope, rows, fixed={"alpha": 0.1})
    h = leverage(found.problem(rows), found.law, np.arange(len(rows)))
    assert h == pytest.approx(1 / len(x) + (x - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2))
    pairs = leverage(found.problem(rows), found.law, np.arange(len(rows)) // 2)
    assert (pairs > np.maximum(h[::2], h[1::2])).all()
    assert (pairs <= h[::2] + h[1::2] + 1e-12).all()


def test_refits_that_fail_are_counted_and_too_many_are_refused(monkeypatch):
    rows, _ = line()
    found = fit(Envelope, rows, fixed={"alpha": 0.1})
    calls = []

    def sometimes(every):
        def counted(*arguments):
            calls.append(1)
            if len(calls) % every == 0:
                raise NotConverged("planted")
            return refit(*arguments)

        return counted

    monkeypatch.setattr("slm_jax.scaling.intervals.refit", sometimes(20))
    draws = bootstrap(found, rows, n=100)
    assert draws.failed == 5
    assert len(draws.laws) == len(draws.draws["A"]) == 95
    assert "5 refits did not converge" in draws.summary()
    monkeypatch.setattr("slm_jax.scaling.intervals.refit", sometimes(3))
    with pytest.raises(UserError, match="refits did not converge"):
        bootstrap(found, rows, n=100)


def test_a_statistic_that_is_often_undefined_has_no_interval():
    rows, _ = line()
    found = fit(Envelope, rows, fixed={"alpha": 0.1})
    middle = found.law.A

    def seldom(law):
        return np.nan if middle * 1.2 < law.A else law.A

    def often(law):
        return np.nan if middle < law.A else law.A

    def infinite(law):
        return np.inf if middle < law.A else law.A

    statistics = {"seldom": seldom, "often": often, "infinite": infinite}
    draws = bootstrap(found, rows, n=100, statistics=statistics)
    assert np.isfinite(draws.interval("seldom")).all()
    with pytest.raises(UserError, match="name='often' is not defined in"):
        draws.interval("often")
    low, high = draws.interval("infinite")
    assert low < middle
    assert high == np.inf


def test_the_profile_of_a_parameter_that_the_rows_do_not_bound_is_open():
    law = DataConstrained.from_published("c4")
    random = np.random.default_rng(0)
    n, u = np.meshgrid(np.geomspace(1e8, 1e9, 6), np.geomspace(1e9, 1e10, 6))
    n, u = n.ravel(), u.ravel()
    d = u * 1.5  # one and a half epochs say nothing of how fast value is lost
    loss = law(N=n, D=d, U=u) * np.exp(random.normal(0, 0.01, n.size))
    rows = Rows({"N": n, "D": d, "U": u, "loss": loss})
    fixed = {k: v for k, v in law.values.items() if k != "R_D"}
    found = fit(DataConstrained, rows, fixed=fixed, objective="mse")
    low, high = profile(found, rows, "R_D").interval(0.9)
    assert 0 < low < 5
    assert high == np.inf


def test_a_profile_is_lowest_at_the_fit_and_crosses_its_threshold_at_the_ends():
    rows = study(2)
    for method in ("vpnls", "lse"):
        found = fit(Chinchilla, rows, method=method)
        centre = found.law.beta
        curve = profile(found, rows, "beta", [centre * 0.9, centre, centre * 1.1])
        assert curve.objectives[1] == pytest.approx(found.value, rel=1e-6)
        assert min(curve.objectives[[0, 2]]) > found.value
        ends = curve.interval(0.9)
        rise = [(curve.at(end) - curve.lowest) * curve.scale for end in ends]
        assert rise == pytest.approx([scipy.stats.f.ppf(0.9, 1, 40)] * 2, rel=1e-3)
        held = fit(Chinchilla, rows, method=method, fixed={"beta": ends[0]})
        assert curve.at(ends[0]) == pytest.approx(held.value, rel=1e-6)


def test_questions_about_other_rows_or_parameters_are_refused():
    rows = study(3)
    found = fit(Chinchilla, rows, fixed={"E": 1.8})
    with pytest.raises(UserError, match="not the table of this fit"):
        bootstrap(found, study(4), n=2)
    with pytest.raises(UserError, match="parameter='E' was not fitted"):
        profile(found, rows, "E")
    with pytest.raises(UserError, match="n=0"):
        bootstrap(found, rows, n=0)
    with pytest.raises(UserError, match="names of parameters"):
        bootstrap(found, rows, n=2, statistics={"beta": lambda law: law.beta})
    labelled = Rows(rows.columns, {"run": np.arange(len(rows)) % 3})
    three_runs = fit(Chinchilla, labelled)
    with pytest.raises(UserError, match="cluster='run' has 3 values"):
        bootstrap(three_runs, labelled, n=2)
    draws = bootstrap(found, rows, n=10)
    with pytest.raises(UserError, match="name='a' was not drawn"):
        draws.interval("a")
    with pytest.raises(UserError, match="level=90"):
        draws.interval("beta", 90)
    low = fit(Chinchilla, rows, method="lse", objective="asymmetric")
    with pytest.raises(UserError, match="asymmetric"):
        profile(low, rows, "beta")
    three = rows.take([0, 20, 40])
    exact = fit(Chinchilla, three, fixed={"alpha": 0.35, "beta": 0.37})
    with pytest.raises(UserError, match="rows=3 leave none over"):
        profile(exact, three, "A")


@pytest.mark.slow
def test_nine_intervals_of_ten_cover_the_truth():
    """200 studies; the intervals that reports print."""
    names = (*Chinchilla.names(), *STATISTICS)
    truth = {**TRUTH.values, **{name: f(TRUTH) for name, f in STATISTICS.items()}}
    covered = {name: [] for name in names}
    for seed in range(200):
        rows = study(seed)
        found = fit(Chinchilla, rows)
        draws = bootstrap(found, rows, n=100, seed=seed, statistics=STATISTICS)
        for name in names:
            low, high = draws.interval(name, 0.9)
            covered[name].append(low <= truth[name] <= high)
    shares = {name: float(np.mean(hits)) for name, hits in covered.items()}
    assert all(0.85 <= share <= 0.95 for share in shares.values()), shares
