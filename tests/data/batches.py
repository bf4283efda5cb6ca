"""Batches side by side."""

import itertools

import numpy as np


def take(batches, n: int) -> list[dict[str, np.ndarray]]:
    """The next `n`."""
    return list(itertools.islice(batches, n))


def assert_same(got, want) -> None:
    """All arrays of all batches are equal, name by name."""
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
