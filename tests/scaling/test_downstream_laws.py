import numpy as np
import pytest

from slm_jax.scaling.fit import fit
from slm_jax.scaling.laws.downstream import ExponentialError, SigmoidAccuracy
from slm_jax.scaling.rows import Rows
from tests.scaling.tables import check_recovery

SIGMOID = SigmoidAccuracy(floor=0.25, top=0.97, middle=0.75, steepness=6.0)


@pytest.mark.parametrize(
    "law", [SIGMOID, ExponentialError(0.85, 2.1, 0.75)], ids=lambda law: type(law).__name__
)
def test_planted_parameters_are_recovered(law):
    low, high = (0.3, 1.6) if law is SIGMOID else (2.0, 4.5)
    table = {law.inputs[0]: np.random.default_rng(0).uniform(low, high, 60)}
    check_recovery(law, table)


def test_sigmoid_runs_from_top_to_floor():
    assert SIGMOID(task_loss=0.75) == pytest.approx((0.25 + 0.97) / 2)
    assert SIGMOID(task_loss=-1e6) == pytest.approx(0.97)
    assert SIGMOID(task_loss=1e6) == pytest.approx(0.25)
    x = 0.3
    paper = (0.25 - 0.97) / (1 + np.exp(-6.0 * (x - 0.75))) + 0.97
    assert SIGMOID(task_loss=x) == pytest.approx(paper, rel=1e-14)


def test_top_can_be_held_at_one():
    x = np.linspace(0.5, 1.5, 50)
    true = SigmoidAccuracy(0.2, 1.1, 0.6, 3.0)
    rows = Rows({"task_loss": x, "accuracy": true.predict({"task_loss": x})})
    assert fit(SigmoidAccuracy, rows).law.values["top"] == pytest.approx(1.1)
    held = fit(SigmoidAccuracy, rows, fixed={"top": 1.0})
    assert held.law.values["top"] == 1.0
    assert held.value > 0


def test_error_falls_with_loss_from_epsilon():
    law = ExponentialError.from_published("c4")
    assert law(loss=100.0) == pytest.approx(law.epsilon)
    assert law(loss=2.5) == pytest.approx(0.8497 - 2.0789 * np.exp(-0.7561 * 2.5), rel=1e-14)
