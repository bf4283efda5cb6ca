"""The grouped product against one numpy product a group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slm_kernels.experts import IMPLEMENTATIONS, grouped_matmul

ROWS, GROUPS, K, N = 40, 4, 5, 6
SIZES = {
    "balanced": (10, 10, 10, 10),
    "ragged": (1, 17, 9, 13),
    "empty groups": (0, 23, 0, 17),
    "one takes all": (0, 0, 40, 0),
    "rows beyond the sum": (3, 8, 0, 16),
    "whole blocks": (8, 16, 0, 8),
    "nothing": (0, 0, 0, 0),
}


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((ROWS, K), (GROUPS, K, N), (ROWS, N))
    x, w, g = (rng.normal(size=s).astype(np.float32) for s in shapes)
    return x, w, g


def oracle(x, w, g, sizes):
    """Product, and the gradients for the cotangent g, in float64."""
    x, w, g = (np.float64(a) for a in (x, w, g))
    y, dx, dw = np.zeros(g.shape), np.zeros(x.shape), np.zeros(w.shape)
    begin = 0
    for i, size in enumerate(sizes):
        rows = slice(begin, begin + size)
        y[rows] = x[rows] @ w[i]
        dx[rows] = g[rows] @ w[i].T
        dw[i] = x[rows].T @ g[rows]
        begin += size
    return y, dx, dw


def value_and_gradients(x, w, g, sizes, implementation):
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
    return y, *pull(g)


product_and_gradients = jax.jit(value_and_gradients, static_argnums=4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SIZES)
def test_product_and_gradients_are_those_of_numpy(case: str, implementation: str) -> None:
    x, w, g = arrays()
    sizes = np.array(SIZES[case], np.int32)
    got = product_and_gradients(x, w, g, sizes, implementation)
    for a, b in zip(got, oracle(x, w, g, sizes), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    beyond = sizes.sum()
    assert (np.asarray(got[0])[beyond:] == 0).all()
    assert (np.asarray(got[1])[beyond:] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_stays_bfloat16(implementation: str) -> None:
    x, w, _ = (jnp.asarray(a, jnp.bfloat16) for a in arrays())
    sizes = np.array(SIZES["ragged"], np.int32)
    y = grouped_matmul(x, w, sizes, implementation=implementation)
    assert y.dtype == jnp.bfloat16
    want, _, _ = oracle(*(np.asarray(a, np.float64) for a in (x, w)), np.zeros((ROWS, N)), sizes)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=2**-8 * np.abs(want).max())


def test_errors_name_what_does_not_fit() -> None:
    x, w, _ = arrays()
    with pytest.raises(ValueError, match=r"want x\[rows, K\] and w\[groups, K, N\]"):
        grouped_matmul(x[:, :4], w, np.zeros(GROUPS, np.int32))
    with pytest.raises(ValueError, match="want one size for 4 groups"):
        grouped_matmul(x, w, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="implementation='megablox' does not exist"):
        grouped_matmul(x, w, np.zeros(GROUPS, np.int32), implementation="megablox")
