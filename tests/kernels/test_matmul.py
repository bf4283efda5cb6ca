"""Products with int8 weights against NumPy's int64 and float64; the TPU kernel interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from slm_kernels.matmul import IMPLEMENTATIONS, int8_matmul, quantise_rows
from slm_kernels.matmul.tpu import blocks_of, int8_matmul_tpu
from slm_kernels.pallas import interpreted

F32 = np.float32


@pytest.fixture(scope="module", autouse=True)
def _interpreted():
    with interpreted():
        yield


def inputs(shape=(5, 256), columns=200, seed=0, low=-128):
    rng = np.random.default_rng(seed)
    x = rng.integers(low, 128, shape, dtype=np.int8)
    w = rng.integers(low, 128, (shape[-1], columns), dtype=np.int8)
    scales = rng.uniform(0.001, 0.1, shape[:-1]), rng.uniform(0.001, 0.1, columns)
    return x, w, *(np.asarray(s, F32) for s in scales)


def exact(x, w, x_scale, w_scale) -> np.ndarray:
    """The integer product in int64, then the scales one after the other in float32."""
    whole = np.einsum("...k,kn->...n", np.int64(x), np.int64(w))
    assert np.abs(whole).max() < 2**31
    return (whole.astype(F32) * x_scale[..., None]) * w_scale


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(5, 256), (2, 3, 40), (7,)])
def test_int8_product_is_that_of_int64(shape, implementation: str) -> None:
    x, w, x_scale, w_scale = inputs(shape)
    run = jax.jit(partial(int8_matmul, dtype=jnp.float32, implementation=implementation))
    one = run(x, w, x_scale=np.ones_like(x_scale), w_scale=np.ones_like(w_scale))
    np.testing.assert_array_equal(one, np.einsum("...k,kn->...n", np.int64(x), np.int64(w)))
    got = run(x, w, x_scale=x_scale, w_scale=w_scale)
    np.testing.assert_allclose(got, exact(x, w, x_scale, w_scale), rtol=3e-7)
    default = jax.eval_shape(partial(int8_matmul, x_scale=x_scale, w_scale=w_scale), x, w)
    assert default.dtype == jnp.bfloat16


def test_sums_that_float32_cannot_hold_are_exact() -> None:
    x, w = np.full((3, 2048), 127, np.int8), np.full((2048, 130), 127, np.int8)
    x[:, -1] = 1  # 2047 * 127**2 + 127 is odd and larger than 2**24
    blocks = (3, 128, 1024)
    acc = int8_matmul_tpu(
        x, w, w_scale=np.ones(130, F32), x_scale=np.ones(3, F32), dtype=jnp.dtype(jnp.float32),
        blocks=blocks,
    )  # fmt: skip
    np.testing.assert_array_equal(acc, F32(2047 * 127**2 + 127))


@pytest.mark.parametrize("blocks", [(8, 128, 128), (16, 256, 384)])
def test_blocks_that_stand_out_and_sums_over_blocks(blocks) -> None:
    x, w, x_scale, w_scale = inputs((19, 384), 300)
    got = int8_matmul_tpu(
        x, w, x_scale=x_scale, w_scale=w_scale, dtype=jnp.dtype(jnp.float32), blocks=blocks
    )
    np.testing.assert_allclose(got, exact(x, w, x_scale, w_scale), rtol=3e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_only(dtype, implementation: str) -> None:
    _, w, _, w_scale = inputs()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 256)), dtype)
    got = int8_matmul(x, w, w_scale=w_scale, implementation=implementation)
    assert got.dtype == dtype
    want = np.asarray(x, np.float64) @ (w * np.float64(w_scale))
    bar = 2**-8 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=bar * np.abs(want).max())


@settings(max_examples=3)
@given(rows=st.integers(1, 40), inner=st.integers(1, 300), columns=st.integers(1, 300))
def test_product_of_any_shape(rows, inner, columns) -> None:
    x, w, x_scale, w_scale = inputs((rows, inner), columns)
    got = int8_matmul(
        x, w, x_scale=x_scale, w_scale=w_scale, dtype=jnp.float32, implementation="tpu"
    )
    np.testing.assert_allclose(got, exact(x, w, x_scale, w_scale), rtol=3e-7)


@given(rows=st.integers(1, 4096), inner=st.integers(1, 20000), columns=st.integers(1, 20000))
def test_blocks_fit_and_divide(rows, inner, columns) -> None:
    bm, bn, bk = blocks_of(rows, inner, columns)
    assert bm <= rows
    assert bn == columns or bn % 128 == 0
    assert inner % bk == 0
    assert bk == inner or (bk % 128 == 0 and bk * bn <= 2**21)


def test_quantised_rows() -> None:
    x = np.array([[0.5, -1.5, 2.5, 127.0], [0, 0, 0, 0], [-254.0, 3, 1, 0], [1e-44, 0, 0, 0]], F32)
    q, scale = quantise_rows(jnp.asarray(x))
    assert (q.dtype, scale.dtype) == (jnp.int8, jnp.float32)
    np.testing.assert_array_equal(q[:3], [[0, -2, 2, 127], [0, 0, 0, 0], [-127, 2, 0, 0]])
    np.testing.assert_array_equal(scale[:3], [1, 0, 2])
    assert np.isfinite(scale).all()
    assert np.abs(q.astype(np.int32)).max() == 127
    with pytest.raises(ValueError, match="x is int8: want floating point"):
        quantise_rows(q)


def test_quantisation_errs_by_half_a_step() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 64)), jnp.bfloat16)
    q, scale = quantise_rows(x)
    assert (q.shape, scale.shape) == (x.shape, (3, 7))
    error = np.abs(np.float64(q) * np.float64(scale)[..., None] - np.asarray(x, np.float64))
    assert (error <= 0.5001 * np.asarray(scale)[..., None]).all()


def test_vmap_and_gradient() -> None:
    x, w, x_scale, w_scale = inputs((2, 3, 40), 30)

    def product(x, s, implementation):
        return int8_matmul(x, w, x_scale=s, w_scale=w_scale, implementation=implementation)

    with interpreted(True):  # the other interpreter knows no mapped grids
        got = jax.jit(jax.vmap(partial(product, implementation="tpu")))(x, x_scale)
    np.testing.assert_array_equal(got, product(x, x_scale, "xla"))

    def total(x, implementation):
        return int8_matmul(x, w, w_scale=w_scale, implementation=implementation).sum()

    floats = jnp.ones((3, 40))
    want = np.broadcast_to((w * w_scale).sum(1), (3, 40))
    np.testing.assert_allclose(jax.grad(total)(floats, "xla"), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="has no gradient: use implementation='xla'"):
        jax.grad(total)(floats, "tpu")


def test_rows_and_columns_may_be_split_over_devices() -> None:
    x, w, x_scale, w_scale = inputs((2, 3, 40), 30)
    want = int8_matmul(x, w, x_scale=x_scale, w_scale=w_scale, implementation="xla")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh), interpreted(True):
        rows = jax.device_put(x, NamedSharding(mesh, P("data")))
        split = jax.device_put(w, NamedSharding(mesh, P(None, "tensor")))
        run = jax.jit(partial(int8_matmul, implementation="tpu"))
        got = run(rows, split, x_scale=x_scale, w_scale=w_scale)
        assert jax.typeof(got).sharding.spec == P("data", None, "tensor")
        turned = jax.device_put(w, NamedSharding(mesh, P("tensor")))
        with pytest.raises(ValueError, match="K is split over tensor: gather it"):
            int8_matmul(x, turned, x_scale=x_scale, w_scale=w_scale, implementation="tpu")
    np.testing.assert_array_equal(got, want)


def test_errors_name_what_does_not_fit() -> None:
    x, w, x_scale, w_scale = inputs()
    with pytest.raises(ValueError, match=r"want x\[..., K\] and w\[K, N\]"):
        int8_matmul(x[:, 1:], w, w_scale=w_scale, x_scale=x_scale)
    with pytest.raises(ValueError, match="w is float32: want int8"):
        int8_matmul(x, w.astype(F32), w_scale=w_scale, x_scale=x_scale)
    with pytest.raises(ValueError, match="x_scale is missing and x is int8"):
        int8_matmul(x, w, w_scale=w_scale)
    with pytest.raises(ValueError, match=r"w_scale\(5,\): want \(200,\)"):
        int8_matmul(x, w, w_scale=x_scale, x_scale=x_scale)
    with pytest.raises(ValueError, match="x is float16: want int8, bfloat16 or float32"):
        int8_matmul(x.astype(np.float16), w, w_scale=w_scale)
    with pytest.raises(ValueError, match="int32 sums 131071 products at most"):
        int8_matmul(*inputs((1, 2**17), 1)[:2], w_scale=np.ones(1), x_scale=np.ones(1))
    with pytest.raises(ValueError, match="bk=100 does not divide K=256"):
        int8_matmul_tpu(
            x, w, w_scale=w_scale, x_scale=x_scale, dtype=jnp.dtype(F32), blocks=(8, 128, 100)
        )
