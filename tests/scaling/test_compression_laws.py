import numpy as np
import pytest

from slm_jax.scaling.laws import Chinchilla
from slm_jax.scaling.laws.compression import Distillation, Precision, Supervised
from tests.scaling.tables import check_recovery

SUPERVISED = Supervised(1.7, 400.0, 600.0, 0.33, 0.3, 0.9)
PRECISION = Precision(1.8, 480.0, 2100.0, 0.35, 0.37, 2.5)
DISTILLATION = Distillation(2.5, 40.0, 1.3, 0.09, 2200.0, 24000.0, 0.32, 0.63, 0.76)


def columns(n=100, seed=0):
    random = np.random.default_rng(seed)
    table = {
        "N": 10 ** random.uniform(7, 9.5, n),
        "D": 10 ** random.uniform(9, 11.5, n),
        "bits": random.choice([3.0, 4.0, 6.0, 8.0, 16.0], n),
        "teacher_loss": random.uniform(1.9, 3.0, n),
    }
    table["supervised_loss"] = SUPERVISED.predict(table)
    return table


@pytest.mark.parametrize(
    "law", [PRECISION, SUPERVISED, DISTILLATION], ids=lambda law: type(law).__name__
)
def test_planted_parameters_are_recovered(law):
    table = columns()
    check_recovery(law, table)


def test_many_bits_are_chinchillas_law():
    law = Chinchilla(*(PRECISION.values[k] for k in ("E", "A", "B", "alpha", "beta")))
    assert PRECISION(N=1e9, D=1e11, bits=100.0) == pytest.approx(law(N=1e9, D=1e11), rel=1e-12)
    small = PRECISION.effective_parameters(1e9, 4.0)
    assert small == pytest.approx(1e9 * (1 - np.exp(-4 / 2.5)))
    assert PRECISION(N=1e9, D=1e11, bits=4.0) == pytest.approx(law(N=small, D=1e11), rel=1e-12)
    assert np.all(np.diff(PRECISION(N=1e9, D=1e11, bits=np.arange(1.0, 17.0))) < 0)


def test_supervised_with_power_one_is_chinchillas_law():
    law = Supervised(1.7, 400.0, 600.0, 0.33, 0.3, 1.0)
    plain = Chinchilla(1.7, 400.0, 600.0, 0.33, 0.3)
    assert law(N=1e9, D=1e11) == pytest.approx(plain(N=1e9, D=1e11), rel=1e-14)


def test_a_student_does_not_beat_its_teacher_and_a_far_better_teacher_hurts():
    n, d = 3e8, 3e10
    alone = float(SUPERVISED(N=n, D=d))
    teachers = np.linspace(1.75, alone, 200)
    loss = DISTILLATION(N=n, D=d, teacher_loss=teachers, supervised_loss=alone)
    assert np.all(loss > teachers)
    best = int(np.argmin(loss))
    assert 0 < best < len(teachers) - 1  # the capacity gap: neither the best nor the worst


def test_distillation_does_not_overflow():
    loss = DISTILLATION(N=1e9, D=1e11, teacher_loss=np.array([0.5, 50.0]), supervised_loss=1.0)
    assert np.all(np.isfinite(loss))
    ratio = (2.4 / (2.6 * 1.3)) ** (1 / 0.09)
    plain = (
        2.4
        + 2.4**-2.5
        * (1 + ratio) ** (-40.0 * 0.09)
        * (2200.0 * 1e9**-0.32 + 24000.0 * 1e11**-0.63) ** 0.76
    )
    given = DISTILLATION(N=1e9, D=1e11, teacher_loss=2.4, supervised_loss=2.6)
    assert given == pytest.approx(plain, rel=1e-12)
