"""Filters and draws against numpy, and the independence of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.infer.sampling import Sampling, candidates, penalised, probabilities, sample

KEY = jax.random.key(0)


def keys(n: int) -> jax.Array:
    return jax.random.split(KEY, n)


draw = jax.jit(sample, static_argnums=1)


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What should be drawn from `[V]`, in float64, one token considered after another."""
    p = np.exp(logits.astype(np.float64) / sampling.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: sampling.top_k]
    p = p / p[order].sum()
    kept, mass = [], 0.0
    for i in order:
        if sampling.top_p is not None and mass >= sampling.top_p:
            break
        kept.append(i)
        mass += p[i]
    if sampling.min_p is not None:
        kept = [i for i in kept if p[i] >= sampling.min_p * p[kept].max()]
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(top_k=1),
    Sampling(top_k=5),
    Sampling(top_k=1000),
    Sampling(top_p=0.3),
    Sampling(top_p=0.9),
    Sampling(top_p=1.0),
    Sampling(temperature=2.0, top_k=7, top_p=0.6),
    Sampling(top_p=1e-6),
    Sampling(min_p=0.2),
    Sampling(min_p=1.0),
    Sampling(temperature=0.7, min_p=0.05),
    Sampling(top_k=12, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_candidates_are_those_of_numpy(sampling: Sampling) -> None:
    logits = np.random.default_rng(1).normal(0, 2, (4, 20)).astype(np.float32)
    logits[3, 10:] = logits[3, 0]  # ties go to the lower id
    scores, ids = candidates(jnp.asarray(logits), sampling)
    probs = np.zeros_like(logits)
    np.put_along_axis(probs, np.asarray(ids), np.asarray(jax.nn.softmax(scores)), axis=1)
    expected = np.stack([distribution(row, sampling) for row in logits])
    np.testing.assert_array_equal(probs > 0, expected > 0)
    np.testing.assert_allclose(probs, expected, rtol=2e-5)
    np.testing.assert_allclose(probabilities(jnp.asarray(logits), sampling), expected, rtol=2e-5)


def test_greedy_is_a_distribution_too() -> None:
    logits = jnp.array([[[0.0, 3.0, 3.0], [5.0, 1.0, 5.0]]])
    got = probabilities(logits, Sampling(temperature=0))
    np.testing.assert_array_equal(got, [[[0, 1, 0], [1, 0, 0]]])


def test_repetition_penalty_is_that_of_transformers() -> None:
    """As its documentation defines it: seen logits below 0 times the penalty, others over it."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 2, (3, 20)).astype(np.float32)
    had = [[3, 3, 7], [], list(range(20))]
    want, seen = logits.copy(), np.zeros((3, 20), bool)
    for row, tokens in enumerate(had):
        for token in set(tokens):
            value = logits[row, token]
            want[row, token] = value * 1.3 if value < 0 else value / 1.3
            seen[row, token] = True
    got = penalised(jnp.asarray(logits), jnp.asarray(seen), Sampling(repetition_penalty=1.3))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert penalised(logits, None, Sampling()) is logits


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(top_k=4, top_p=0.8)], ids=str)
def test_draws_have_the_frequencies(sampling: Sampling) -> None:
    logits = np.array([0.5, 2.0, -1.0, 1.4, 0.1, 1.3], np.float32)
    n = 20_000
    drawn = draw(jnp.tile(logits, (n, 1)), sampling, keys(n), np.zeros(n, np.int32))
    counts = np.bincount(np.asarray(drawn), minlength=6)
    p = distribution(logits, sampling)
    assert not counts[p == 0].any()
    sigma = np.sqrt(n * p * (1 - p))
    assert np.all(np.abs(counts - n * p) <= 4 * sigma)


def test_greedy_is_the_first_of_the_largest() -> None:
    logits = jnp.array([[0.0, 3.0, 3.0], [5.0, 1.0, 5.0]])
    none = np.zeros(2, np.int32)
    np.testing.assert_array_equal(sample(logits, Sampling(temperature=0), keys(2), none), [1, 0])


def test_a_row_does_not_see_its_neighbours_and_every_step_is_new() -> None:
    logits, drawn = jax.random.normal(KEY, (8, 500)), np.arange(8, dtype=np.int32)
    one = np.asarray(draw(logits, Sampling(), keys(8), drawn))
    other = np.asarray(draw(logits.at[:4].set(0).at[6:].set(9), Sampling(), keys(8), drawn))
    np.testing.assert_array_equal(one[4:6], other[4:6])
    np.testing.assert_array_equal(one[3:6], draw(logits[3:6], Sampling(), keys(8)[3:6], drawn[3:6]))
    flat = jnp.zeros((8, 500))
    steps = np.stack([draw(flat, Sampling(), keys(8), np.full(8, i)) for i in range(3)])
    assert len(np.unique(steps)) > 20  # 24 draws of 500: neither rows nor steps repeat


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(temperature=-0.1), "temperature=-0.1 is negative"),
        (dict(top_k=0), "top_k=0 must be at least 1"),
        (dict(top_p=0.0), r"top_p=0.0 is not in \(0, 1\]"),
        (dict(top_p=1.5), r"top_p=1.5 is not in \(0, 1\]"),
        (dict(min_p=0.0), r"min_p=0.0 is not in \(0, 1\]"),
        (dict(repetition_penalty=0), "repetition_penalty=0 must be above 0"),
    ],
)
def test_errors_name_field_value_and_remedy(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**wrong)
