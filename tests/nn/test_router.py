"""Routing: selection bias and sparsemixer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.nn.moe import balanced_bias
from slm_jax.nn.router import route

RNG = np.random.default_rng(0)


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(np.float64(x) - np.max(x, axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def test_bias_changes_the_choice_and_not_the_weights() -> None:
    logits = jnp.asarray(RNG.normal(size=(50, 6)), jnp.float32)
    bias = jnp.array([0.3, 0, 0, 0, 0, -0.3])
    for routing in ("renormalised", "softmax"):
        _, free, _ = route(logits, 2, routing)
        weights, experts, probs = route(logits, 2, routing, bias=bias)
        assert (np.sort(experts) != np.sort(free)).any()
        p = softmax(np.asarray(logits))
        np.testing.assert_array_equal(experts, np.argsort(-(p + np.asarray(bias)))[:, :2])
        want = np.take_along_axis(p, np.asarray(experts), axis=-1)
        if routing == "renormalised":
            want = want / want.sum(-1, keepdims=True)
        np.testing.assert_allclose(weights, want, rtol=1e-5)
        np.testing.assert_allclose(probs, p, rtol=1e-5)
        slope = jax.grad(lambda b, r=routing: jnp.sum(route(logits, 2, r, bias=b)[0] ** 2))(bias)
        assert not np.any(slope)


def test_balancing_evens_out_a_skewed_router() -> None:
    logits = jnp.asarray(RNG.normal(size=(2000, 8)) + np.linspace(0, 2, 8), jnp.float32)

    def step(bias, _):
        _, experts, _ = route(logits, 2, "renormalised", bias=bias)
        load = jnp.mean((experts[..., None] == jnp.arange(8)).astype(jnp.float32), axis=(0, 1))
        return balanced_bias(bias, load, 2e-3), load

    loads = np.asarray(jax.jit(lambda b: jax.lax.scan(step, b, length=200)[1])(jnp.zeros(8)))
    assert loads[0].max() * 8 > 2  # the busiest expert begins with twice its share
    assert loads[-1].max() * 8 < 1.15
    assert loads[-1].min() * 8 > 0.85


def test_sparsemixer_has_the_published_means() -> None:
    logits = RNG.normal(size=(100_000, 16)).astype(np.float32)
    weights, experts, _ = route(jnp.asarray(logits), 2, "sparsemixer")
    np.testing.assert_array_equal(experts, np.argsort(-logits)[:, :2])
    first, second = np.asarray(weights).mean(axis=0)
    assert first == pytest.approx(0.976, abs=2e-3)
    assert second == pytest.approx(0.969, abs=2e-3)
    assert first + second == pytest.approx(1.945, abs=3e-3)


# Three close competitors, one far behind: 2 x eps = 2 % below the best is the limit.
CLOSE = np.array([2.0, 1.98, 1.97, 1.0], np.float32)


def test_sparsemixer_weighs_close_competitors_only() -> None:
    weights, experts, _ = route(jnp.asarray(CLOSE), 2, "sparsemixer")
    np.testing.assert_array_equal(experts, [0, 1])
    want = [softmax(CLOSE[:3])[0], softmax(CLOSE[1:3])[0]]
    np.testing.assert_allclose(weights, want, rtol=1e-5)


def test_sparsemixer_draws_by_probability_and_scales_what_misses_the_best() -> None:
    n = 40_000
    weights, experts, _ = route(jnp.tile(CLOSE, (n, 1)), 2, "sparsemixer", key=jax.random.key(0))
    weights, experts = np.asarray(weights), np.asarray(experts)
    p = softmax(CLOSE[:3])
    share = np.bincount(experts[:, 0], minlength=4) / n
    np.testing.assert_allclose(share, [*p, 0], atol=4 * np.sqrt(0.25 / n))
    assert (experts[:, 0] != experts[:, 1]).all()
    # After expert 0 the second choice is between 1 and 2; the better of them is 1.
    after = experts[:, 0] == 0
    share = (experts[after, 1] == 1).mean()
    assert share == pytest.approx(softmax(CLOSE[1:3])[0], abs=4 * np.sqrt(0.25 / after.sum()))
    for choice in range(3):
        factor = weights[experts[:, 0] == choice, 0] / p[choice]
        if choice == 0:
            np.testing.assert_allclose(factor, 1, rtol=1e-5)
        else:  # a quarter whole, the rest a third: one half on average
            whole = np.isclose(factor, 1, rtol=1e-4)
            assert np.isclose(factor[~whole], 1 / 3, rtol=1e-4).all()
            assert whole.mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.19 / len(factor)))


def test_sparsemixer_gradient_is_that_of_the_plain_weight() -> None:
    logits = jnp.tile(CLOSE, (64, 1))
    key, pull = jax.random.key(1), np.float32(RNG.normal(size=(64, 2)))

    def total(logits):
        weights, experts, _ = route(logits, 2, "sparsemixer", key=key)
        return jnp.sum(weights * pull), experts

    got, experts = jax.grad(total, has_aux=True)(logits)
    want = np.zeros((64, 4))
    for row, (first, second) in enumerate(np.asarray(experts)):
        for chosen, seen, g in (
            (first, [0, 1, 2], pull[row, 0]),
            (second, [e for e in range(3) if e != first], pull[row, 1]),
        ):
            p = softmax(CLOSE[seen])
            w = p[seen.index(chosen)]
            want[row, chosen] += g * w  # g w (onehot - softmax)
            want[row, seen] -= g * w * p
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert len(np.unique(experts[:, 0])) == 3
