"""The grouped product against one numpy product a group; the TPU kernel interpreted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slm_kernels.experts import IMPLEMENTATIONS, grouped_matmul, tpu
from slm_kernels.pallas import interpreted

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


@pytest.fixture(scope="module", autouse=True)
def _interpreted():
    with interpreted():
        yield


@pytest.fixture(autouse=True)
def _short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu, "_TILE", 16)  # three tiles, the last a part


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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_integers_are_summed_in_the_dtype_asked_for(implementation: str) -> None:
    rng = np.random.default_rng(1)
    x, w = (rng.integers(-127, 128, a.shape, np.int8) for a in arrays()[:2])
    sizes = np.array(SIZES["ragged"], np.int32)
    y = grouped_matmul(x, w, sizes, out_dtype=jnp.int32, implementation=implementation)
    assert y.dtype == jnp.int32
    want, _, _ = oracle(x, w, np.zeros((ROWS, N)), sizes)
    np.testing.assert_array_equal(y, want)
    assert np.abs(want).max() > 127  # int8 could not hold it


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["ragged", "rows beyond the sum", "nothing"])
def test_int8_weights_and_the_gradient_through_them(case: str, implementation: str) -> None:
    x, _, g = arrays()
    rng = np.random.default_rng(2)
    w = rng.integers(-127, 128, (GROUPS, K, N), np.int8)
    scale = rng.uniform(0.01, 0.1, (GROUPS, N)).astype(np.float32)
    sizes = np.array(SIZES[case], np.int32)
    run = jax.jit(
        lambda x: grouped_matmul(x, w, sizes, w_scale=scale, implementation=implementation)
    )
    y, pull = jax.vjp(run, x)
    want, dx, _ = oracle(x, w * scale[:, None], g, sizes)
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_allclose(pull(g)[0], dx, atol=1e-5)


def test_columns_may_be_split_over_devices() -> None:
    x, w, _ = arrays()
    sizes = np.array(SIZES["ragged"], np.int32)
    want, _, _ = oracle(x, w, np.zeros((ROWS, N)), sizes)
    mesh = jax.make_mesh((2,), ("tensor",), (jax.sharding.AxisType.Explicit,))
    run = jax.jit(lambda x, w: grouped_matmul(x, w, sizes, implementation="tpu"))
    with jax.set_mesh(mesh), interpreted(True):
        got = run(x, jax.device_put(w, jax.NamedSharding(mesh, jax.P(None, None, "tensor"))))
        split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("tensor")))
        with pytest.raises(ValueError, match="works on whole rows of one device"):
            run(split, w)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_kernel_visits_each_pair_of_a_tile_and_a_group_once() -> None:
    tiles = -(-ROWS // 16)
    visits = tiles + GROUPS
    for sizes in SIZES.values():
        table = tpu._schedule(jnp.array(sizes), ROWS, 16, tiles, visits)
        begins = np.r_[0, np.cumsum(sizes)]
        bounds = [*itertools.pairwise(begins), (begins[-1], ROWS)]
        want = [
            (t, g, max(b, 16 * t), min(e, 16 * t + 16))
            for g, (b, e) in enumerate(bounds)
            for t in range(tiles)
            if max(b, 16 * t) < min(e, 16 * t + 16)
        ]
        for i in range(visits):
            at = tpu._visit(table, i, tiles=tiles, groups=GROUPS, visits=visits)
            t, g, begin, end = want[min(i, len(want) - 1)]
            assert tuple(map(int, at)) == (t, min(g, GROUPS - 1))
            assert bool(table[5, i]) == (g == GROUPS or i >= len(want))
            assert bool(table[4, i]) == (i > 0 and want[min(i, len(want)) - 1][0] == t)
            rows = np.arange(16 * t, min(16 * t + 16, ROWS))
            mine = (rows - 16 * t >= table[2, i]) & (rows - 16 * t < table[3, i])
            np.testing.assert_array_equal(mine, (rows >= begin) & (rows < end))


def test_errors_name_what_does_not_fit() -> None:
    x, w, _ = arrays()
    with pytest.raises(ValueError, match="w_scale is missing, x is float32, w int8"):
        grouped_matmul(x, w.astype(np.int8), np.zeros(GROUPS, np.int32))
    with pytest.raises(ValueError, match=r"w_scale\(4, 5\): want \(4, 6\)"):
        grouped_matmul(
            x, w.astype(np.int8), np.zeros(GROUPS, np.int32), w_scale=np.ones((GROUPS, K))
        )
    with pytest.raises(ValueError, match="K is 16384 at most"):
        grouped_matmul(
            np.ones((1, 20000)), np.ones((1, 20000, 1)), np.ones(1, int), implementation="tpu"
        )
    with pytest.raises(ValueError, match=r"want x\[rows, K\] and w\[groups, K, N\]"):
        grouped_matmul(x[:, :4], w, np.zeros(GROUPS, np.int32))
    with pytest.raises(ValueError, match="want one size for 4 groups"):
        grouped_matmul(x, w, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="implementation='megablox' does not exist"):
        grouped_matmul(x, w, np.zeros(GROUPS, np.int32), implementation="megablox")
