import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.scaling.fit import fit
from slm_jax.scaling.laws import LAWS
from slm_jax.scaling.laws.training import (
    TRAINING_RULES,
    LossCurve,
    MultiPower,
    fit_multi_power,
)
from slm_jax.scaling.rows import Rows

RATES = {
    "constant": np.concatenate([np.linspace(0, 3e-4, 100), np.full(2900, 3e-4)]),
    "cosine": np.concatenate(
        [
            np.linspace(0, 3e-4, 100),
            3e-5 + 2.7e-4 * (1 + np.cos(np.pi * np.arange(2900) / 2900)) / 2,
        ]
    ),
    "steps": np.concatenate(
        [np.linspace(0, 3e-4, 100), np.full(1400, 3e-4), np.full(800, 9e-5), np.full(700, 3e-5)]
    ),
}
AT = np.arange(150, 3000, 25)
LAW = MultiPower(2.9, 0.5, 0.45, 400.0, 2.0, 0.6, 0.6)


def curve(name, law=LAW, *, block=1, noise=0.0, seed=0):
    empty = LossCurve(RATES[name], AT, np.ones(len(AT)))
    loss = law.predict(empty, block=block)
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(AT)))
    return LossCurve(RATES[name], AT, loss)


LEARNING_LAWS = [
    law for rule in TRAINING_RULES.values() for law in (rule.learning_rate, rule.batch)
]


@pytest.mark.parametrize("law", LEARNING_LAWS, ids=lambda law: type(law).__name__)
def test_planted_parameters_are_recovered(law):
    random = np.random.default_rng(0)
    table = {"N": 10 ** random.uniform(7, 9.5, 40), "D": 10 ** random.uniform(9, 11.5, 40)}
    table["C"] = 6 * table["N"] * table["D"]
    rows = Rows({k: table[k] for k in law.inputs} | {law.target: law.predict(table)})
    found = fit(type(law), rows)
    for name, value in law.values.items():
        assert found.law.values[name] == pytest.approx(value, rel=1e-6), name
    assert LAWS[type(law).__name__] is type(law)


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


def test_curve_is_the_formula_summed_term_by_term():
    rates, at = RATES["steps"], [160, 1600, 2999]
    given = LAW.predict(LossCurve(rates, np.array(at), np.ones(3)))
    for t, value in zip(at, given, strict=True):
        total = rates[: t + 1].sum()
        decay = sum(
            (rates[k - 1] - rates[k])
            * (1 - (LAW.C * rates[k] ** -LAW.gamma * rates[k : t + 1].sum() + 1) ** -LAW.beta)
            for k in range(1, t + 1)
        )
        expected = LAW.L0 + LAW.A * total**-LAW.alpha - LAW.B * decay
        assert value == pytest.approx(expected, rel=1e-12)


def test_blocks_change_little():
    for name in RATES:
        exact, blocked = curve(name), curve(name, block=16)
        np.testing.assert_allclose(blocked.loss, exact.loss, atol=2e-3)
    exact, blocked = curve("cosine"), curve("cosine", block=8)
    np.testing.assert_allclose(blocked.loss, exact.loss, atol=5e-4)


def test_a_fall_of_the_rate_lowers_the_loss_at_first():
    flat, steps = curve("constant").loss, curve("steps").loss
    before, after = AT < 1500, (AT >= 1525) & (AT < 1900)
    np.testing.assert_allclose(steps[before], flat[before], rtol=1e-12)
    assert np.all(steps[after] < flat[after])
    assert steps[-1] > flat[-1]  # and then it learns more slowly


def test_planted_curve_is_recovered():
    found = fit_multi_power([curve(name) for name in RATES], block=1)
    for name, value in vars(LAW).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6), name


def test_parameters_can_be_held():
    held = {"C": LAW.C, "beta": LAW.beta, "gamma": LAW.gamma}
    train = [curve("constant", noise=1e-3), curve("cosine", noise=1e-3, seed=1)]
    found = fit_multi_power(train, fixed=held, block=1)
    assert {k: getattr(found, k) for k in held} == held
    target = curve("steps")
    assert np.abs(found.predict(target) - target.loss).max() < 0.01


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(UserError, match="no learning rate falls"):
        fit_multi_power([curve("constant")])
    with pytest.raises(UserError, match="delta"):
        fit_multi_power([curve("cosine")], fixed={"delta": 1.0})
    with pytest.raises(UserError, match="outside the schedule of 3000 steps"):
        LossCurve(RATES["cosine"], np.array([3000]), np.ones(1))
    with pytest.raises(UserError, match="differ in length"):
        LossCurve(RATES["cosine"], np.array([3]), np.ones(2))
    with pytest.raises(UserError, match=r"'400M' .* 25M, 100M"):
        MultiPower.from_published("400M")
