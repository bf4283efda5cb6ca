"""`Linear` over named axes and `Embedding`, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.nn.linear import Embedding, Linear
from tests.nn.tiny import randomised

SIZES = {"embed": 6, "heads": 2, "head_dim": 4, "mlp": 10, "expert": 3}
RNG = np.random.default_rng(0)


def linear(axes: str, **kwargs) -> Linear:
    make = lambda key: Linear(axes, SIZES, key=key, **kwargs)  # noqa: E731
    return randomised(jax.eval_shape(make, jax.random.key(0)))


@pytest.mark.parametrize(
    ("axes", "x_shape", "subscripts", "bias_shape"),
    [
        ("embed -> mlp", (5, 6), "td,dm->tm", (10,)),
        ("embed -> heads head_dim", (2, 5, 6), "btd,dhk->bthk", (2, 4)),
        ("heads head_dim -> embed", (2, 5, 2, 4), "bthk,hkd->btd", (6,)),
        ("expert: embed -> mlp", (3, 7, 6), "etd,edm->etm", (3, 1, 10)),
        ("expert heads: embed -> head_dim", (3, 2, 6), "ehd,ehdk->ehk", (3, 2, 4)),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_product_is_numpys(axes, x_shape, subscripts, bias_shape, bias: bool) -> None:
    layer = linear(axes, bias=bias)
    x = RNG.normal(size=x_shape).astype(np.float32)
    want = np.einsum(subscripts, x, layer.w[...])
    if bias:
        want = want + np.reshape(layer.b[...], bias_shape)
    y = layer(x)
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert y.dtype == jnp.float32
    named = tuple(axes.replace(":", "").replace("->", "").split())
    assert layer.w.get_metadata()["axes"] == layer.weight_axes == named
    if bias:
        assert layer.b.get_metadata()["axes"] == layer.batch_axes + layer.out_axes
        assert layer.b.get_metadata()["decay"] is False


def test_output_dtype_is_that_of_the_input_or_the_one_asked_for() -> None:
    layer = linear("embed -> mlp")
    x = jnp.asarray(RNG.normal(size=(5, 6)), jnp.bfloat16)
    exact = np.float64(x) @ np.float64(layer.w[...].astype(jnp.bfloat16))
    low, high = layer(x), layer(x, out_dtype=jnp.float32)
    assert (low.dtype, high.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(high, exact, atol=1e-6)  # accumulated and kept in float32
    assert np.abs(np.float64(low) - exact).max() > 1e-4


def test_grouped_is_one_product_an_expert() -> None:
    layer = linear("expert: embed -> mlp")
    x = RNG.normal(size=(8, 6)).astype(np.float32)
    y = layer.grouped(jnp.asarray(x), jnp.array([2, 0, 5]))
    want = np.concatenate([x[:2] @ layer.w[0], x[2:7] @ layer.w[2], np.zeros((1, 10))])
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_initial_deviation_is_fan_in_or_as_asked() -> None:
    sizes = {"heads": 4, "head_dim": 16, "embed": 300}
    key = jax.random.key(0)
    w = np.asarray(Linear("heads head_dim -> embed", sizes, key=key).w[...])
    assert w.std() == pytest.approx(1 / 8, rel=0.02)
    assert np.abs(w).max() < 2.3 / 8  # cut at two standard deviations of the uncut normal
    w = np.asarray(Linear("heads head_dim -> embed", sizes, key=key, std=0.02).w[...])
    assert w.std() == pytest.approx(0.02, rel=0.02)
    assert not np.any(Linear("heads head_dim -> embed", sizes, key=key, std=0).w[...])


def test_embedding_reads_rows_and_multiplies_by_them() -> None:
    make = lambda key: Embedding(7, 4, key=key, std=1.0)  # noqa: E731
    table = randomised(jax.eval_shape(make, jax.random.key(0)))
    w = np.asarray(table.w[...])
    ids = np.array([[0, 6, 3]])
    np.testing.assert_array_equal(table(ids, jnp.float32), w[ids])
    x = jnp.asarray(RNG.normal(size=(1, 2, 4)), jnp.bfloat16)
    logits = table.attend(x)
    assert logits.dtype == jnp.float32
    rounded = np.float32(jnp.asarray(w, jnp.bfloat16))
    np.testing.assert_allclose(logits, np.float32(x) @ rounded.T, atol=1e-5)
