import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.scaling.laws.loss_curve import LossCurve, MultiPower, fit_multi_power

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
