"""A study finds what was planted, and its report says it."""

from pathlib import Path

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.scaling.optimum import compute_optimal
from slm_jax.scaling.report import plot_study, study_markdown, table
from slm_jax.scaling.rows import Rows
from slm_jax.scaling.study import hold_out, seed_noise, study
from tests.scaling.tables import BUDGETS, LAW, isoflop_table


@pytest.fixture(scope="module")
def planted() -> Rows:
    return isoflop_table()


def test_a_study_recovers_the_law_and_predicts_the_largest_budget(planted: Rows) -> None:
    found = study(planted, noise=0.004, draws=100)
    best = compute_optimal(LAW, 1e18)
    assert compute_optimal(found.law, 1e18).loss == pytest.approx(best.loss, rel=0.005)
    assert found.curves is not None
    assert found.exponents is not None
    assert len(found.curves.interior) == len(BUDGETS)
    low, high = found.exponents.interval("N")
    assert low < 0.42 / 0.87 < high
    assert found.held_out is not None
    assert set(found.held_out.rows["C"]) == {BUDGETS[-1]}
    assert found.held_out.rmse < 0.02


def test_intervals_of_held_out_losses_cover_most_of_them() -> None:
    above = 1.2 * float(BUDGETS[-2])
    covered = [hold_out(isoflop_table(seed=s), above, draws=40).covered for s in range(12)]
    assert 0.7 < np.mean(covered) <= 1.0  # 0.84 over 25 tables; 0.9 is what they aim at


def test_a_prediction_does_not_depend_on_what_it_predicts(planted: Rows) -> None:
    above = float(BUDGETS[-2])
    wrong = planted.with_columns(loss=np.where(planted["C"] > above, 99.0, planted["loss"]))
    right, other = (hold_out(rows, above, draws=20) for rows in (planted, wrong))
    assert np.array_equal(right.predicted, other.predicted)
    assert np.array_equal(right.low, other.low)
    assert other.rmse > 90
    with pytest.raises(UserError, match="hold_out"):
        hold_out(planted, 1e30)
    with pytest.raises(UserError, match="hold_out"):
        hold_out(planted, 1.0)


def test_size_in_flops_makes_six_n_d_the_compute(planted: Rows) -> None:
    # Attention makes a token dearer than 6 N.
    dearer = planted.with_columns(C=planted["C"] * (1 + 1e6 / planted["N"]))
    found = study(dearer, size="flops", draws=20, tolerance=0.5)
    assert np.allclose(6 * found.rows["N"] * found.rows["D"], dearer["C"])


def test_noise_between_seeds_is_measured() -> None:
    rng = np.random.default_rng(0)
    n = np.repeat(np.geomspace(1e6, 1e8, 40), 3)
    loss = LAW(N=n, D=20 * n) * np.exp(0.02 * rng.standard_normal(len(n)))
    rows = Rows({"N": n, "D": 20 * n, "C": 120 * n * n, "loss": loss})
    assert seed_noise(rows) == pytest.approx(0.02, rel=0.15)
    with pytest.raises(UserError, match="another seed"):
        seed_noise(rows.take(np.arange(0, len(n), 3)))


def test_the_report_states_prediction_checks_and_card(planted: Rows, tmp_path: Path) -> None:
    found = study(planted, noise=0.004, draws=30)
    text = study_markdown(found, "dense")
    for part in ("the design is sound", "were not seen", "N* = ", "How this was fitted", "falls"):
        assert part in text
    assert text.index("predicted (90 %)") < text.index("measured - predicted")
    plot_study({"dense": found, "again": found}, tmp_path / "report.png", "test")
    assert (tmp_path / "report.png").stat().st_size > 20_000


def test_tables_are_markdown() -> None:
    assert table(("a", "b"), [(1, "x")]) == "| a | b |\n| --- | --- |\n| 1 | x |\n"


def test_a_ray_is_not_studied() -> None:
    n = np.geomspace(1e6, 1e8, 9)
    rows = Rows({"N": n, "D": 20 * n, "C": 120 * n * n, "loss": LAW(N=n, D=20 * n)})
    with pytest.raises(UserError, match="one ray"):
        study(rows)
