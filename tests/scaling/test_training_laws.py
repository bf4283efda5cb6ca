import numpy as np
import pytest

from slm_jax.scaling.laws.training import TRAINING_RULES
from tests.scaling.tables import check_recovery

LEARNING_LAWS = [
    law for rule in TRAINING_RULES.values() for law in (rule.learning_rate, rule.batch)
]


@pytest.mark.parametrize("law", LEARNING_LAWS, ids=lambda law: type(law).__name__)
def test_planted_parameters_are_recovered(law):
    random = np.random.default_rng(0)
    table = {"N": 10 ** random.uniform(7, 9.5, 40), "D": 10 ** random.uniform(9, 11.5, 40)}
    table["C"] = 6 * table["N"] * table["D"]
    check_recovery(law, table)


def test_rules_give_rates_and_batches_of_the_papers():
    n, d = 1e9, 1e11
    rate, batch = TRAINING_RULES["step_law"](n, d)
    assert rate == pytest.approx(1.79 * n**-0.713 * d**0.307)
    assert batch == pytest.approx(0.58 * d**0.571)
    rate, batch = TRAINING_RULES["deepseek"](n, d)
    assert rate == pytest.approx(0.3118 * (6 * n * d) ** -0.125)
    assert batch == pytest.approx(0.2920 * (6 * n * d) ** 0.3271)
    rate, batch = TRAINING_RULES["porian"](108e6, d)
    assert (rate, batch) == pytest.approx((0.0047, 2048 * 160))
    rate, batch = TRAINING_RULES["porian"](8 * 108e6, d)
    assert (rate, batch) == pytest.approx((0.0047 / 2, 4 * 2048 * 160))


def test_rules_agree_within_an_order_of_magnitude():
    for n, d in ((1e8, 2e9), (1e9, 2e10), (3e9, 1e11)):
        rates, batches = zip(*(rule(n, d) for rule in TRAINING_RULES.values()), strict=True)
        assert max(rates) < 10 * min(rates)
        assert max(batches) < 10 * min(batches)
        assert all(1e-4 < rate < 1e-2 for rate in rates)
