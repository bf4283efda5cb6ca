import itertools
import math
from typing import Any

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.train.optimizer import ScheduleConfig


def curve(schedule: ScheduleConfig, steps: int = 100) -> list[float]:
    return [schedule(step, steps) for step in range(steps)]


@pytest.mark.parametrize("shape", ["cosine", "wsd", "constant"])
def test_warm_up_grows_in_a_line_to_the_peak(shape: Any) -> None:
    rates = curve(ScheduleConfig(2.0, shape, warmup_steps=10))
    np.testing.assert_allclose(rates[:11], 2.0 * np.arange(1, 12) / 11, rtol=1e-12)
    assert max(rates) == rates[10] == 2.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_cosine_corners() -> None:
    schedule = ScheduleConfig(2.0, "cosine", warmup_steps=20, final_fraction=0.1)
    assert schedule(20, 100) == 2.0
    assert schedule(60, 100) == pytest.approx((2.0 + 0.2) / 2)
    assert schedule(40, 100) == pytest.approx(0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2)
    assert schedule(100, 100) == pytest.approx(0.2)
    assert schedule(99, 100) < 0.201 * 1.01


def test_wsd_corners() -> None:
    schedule = ScheduleConfig(2.0, "wsd", 10, final_fraction=0.1, decay_fraction=0.2)
    assert {schedule(step, 100) for step in range(10, 81)} == {2.0}
    assert schedule(90, 100) == pytest.approx(1.1)
    assert schedule(100, 100) == pytest.approx(0.2)


def test_constant_stays() -> None:
    assert {ScheduleConfig(2.0, "constant", 10)(step, 100) for step in range(10, 100)} == {2.0}


def test_run_shorter_than_its_warm_up_only_grows() -> None:
    rates = curve(ScheduleConfig(1.0, "wsd", warmup_steps=50), steps=5)
    assert rates == sorted(rates)
    assert rates[-1] < 0.1


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"learning_rate": 0.0}, "learning_rate"), ({"warmup_steps": -1}, "warm")],
)
def test_impossible_schedules_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=field):
        ScheduleConfig(**changes)
