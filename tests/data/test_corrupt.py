"""Planted noise: as much as asked for, only in the training text."""

import numpy as np
import pytest

from slm_jax.data import DataConfig, open_data
from slm_jax.data.corrupt import corrupt
from slm_jax.errors import UserError


def test_the_asked_share_is_replaced_and_the_rest_stays() -> None:
    clean = open_data(DataConfig())
    noisy = corrupt(clean, 0.3)
    before, after = (c.train[0].tokens for c in (clean, noisy))
    share = np.bincount(before, minlength=257) / len(before)
    # A draw gives the same token again as often as two draws agree.
    expected = 0.3 * (1 - float(np.sum(share**2)))
    assert np.mean(before != after) == pytest.approx(expected, rel=0.01)
    frequencies = np.bincount(after, minlength=257) / len(after)
    assert np.abs(frequencies - share).max() < 1e-3
    ends = np.append(clean.train[0].starts[1:], len(before)) - 1
    assert (after[ends] == before[ends]).all()
    assert noisy.valid is clean.valid
    assert noisy.fingerprint != clean.fingerprint


def test_noise_is_a_function_of_text_probability_and_seed() -> None:
    clean = open_data(DataConfig())
    assert corrupt(clean, 0.1).fingerprint == corrupt(clean, 0.1).fingerprint
    others = {corrupt(clean, p, seed=s).fingerprint for p, s in ((0.1, 0), (0.2, 0), (0.1, 1))}
    assert len(others) == 3
    assert corrupt(clean, 0.0) is clean


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(probability: float) -> None:
    with pytest.raises(UserError, match="probability"):
        corrupt(open_data(DataConfig()), probability)
