"""Quantised `Linear`s and `Embedding`s: drop-ins whose products NumPy agrees with."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.compress.codes import round_tokens
from slm_jax.compress.linear import digit_product, quantised_embedding, quantised_linear
from slm_jax.compress.spec import parse_spec
from slm_jax.errors import UserError
from slm_jax.nn.linear import Embedding, Linear
from tests.nn.tiny import randomised

SIZES = {"embed": 6, "heads": 2, "head_dim": 4, "mlp": 10, "expert": 3}
RNG = np.random.default_rng(0)
CASES = [
    ("embed -> mlp", (5, 6)),
    ("embed -> heads head_dim", (2, 5, 6)),
    ("heads head_dim -> embed", (2, 5, 2, 4)),
    ("expert: embed -> mlp", (3, 7, 6)),
    ("expert heads: embed -> head_dim", (3, 2, 6)),
]


def linear(axes: str, **kwargs) -> Linear:
    make = lambda key: Linear(axes, SIZES | kwargs, key=key, bias=True)  # noqa: E731
    return randomised(jax.eval_shape(make, jax.random.key(0)))


@partial(jax.jit, static_argnames="name")
def product(layer: Linear, x: jax.Array, name: str) -> tuple[jax.Array, ...]:
    """Output of the quantised layer, and what its codes stand for."""
    quantised = quantised_linear(layer, parse_spec(name))
    return quantised(x), quantised.w.floats()


def rows_and_columns(layer: Linear) -> np.ndarray:
    """The weight as `[*batch, *out, K]`."""
    n_batch, n_in = len(layer.batch_axes), len(layer.in_axes)
    w = np.asarray(layer.w[...])
    w = np.moveaxis(w, range(n_batch, n_batch + n_in), range(w.ndim - n_in, w.ndim))
    return w.reshape(*w.shape[: w.ndim - n_in], -1)


def numpy_product(layer: Linear, tokens: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`[*batch, ..., K]` times `[*batch, *out, K]`, without the bias."""
    batch = w.shape[: len(layer.batch_axes)]
    x = tokens.reshape(*batch, -1, tokens.shape[-1])
    y = np.einsum("...ik,...jk->...ij", x, w.reshape(*batch, -1, w.shape[-1]))
    return y.reshape(*tokens.shape[:-1], *w.shape[len(batch) : -1])


def with_bias(layer: Linear, y: np.ndarray) -> np.ndarray:
    b, n_batch = np.asarray(layer.b[...]), len(layer.batch_axes)
    return y + b.reshape(*b.shape[:n_batch], *(1,) * (y.ndim - b.ndim), *b.shape[n_batch:])


@pytest.mark.parametrize(
    ("axes", "shape", "name"),
    [*((*case, "w4g4") for case in CASES), (*CASES[2], "w8"), (*CASES[2], "nf4")],
)
def test_weight_only_is_a_product_with_the_rounded_weights(axes: str, shape, name: str) -> None:
    layer = linear(axes)
    x = RNG.normal(size=shape).astype(np.float32)
    got, w = (np.asarray(a) for a in product(layer, x, name))
    tokens = x.reshape(*shape[: x.ndim - len(layer.in_axes)], -1)
    want = with_bias(layer, numpy_product(layer, tokens, np.float64(w)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    full = rows_and_columns(layer)
    error = np.abs(w - full).max() / np.abs(full).max()
    assert 0 < error < {"w8": 1 / 200, "w4g4": 1 / 13, "nf4": 0.16}[name]


@pytest.mark.parametrize(
    ("axes", "shape", "name"),
    [
        *((*case, "w8a8") for case in CASES),
        ("embed -> mlp", (1, 1, 6), "w8a8"),
        ("heads head_dim -> embed", (2, 5, 2, 4), "w4a8"),
    ],
)
def test_integer_product_is_numpys(axes: str, shape, name: str) -> None:
    layer = linear(axes)
    x = RNG.normal(size=shape).astype(np.float32)
    got, _ = product(layer, x, name)

    def rounded(a: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        scale = np.abs(a).max(-1, keepdims=True) / np.float32(top)
        return np.rint(a / scale).astype(np.int64), np.float64(scale[..., 0])

    tokens = x.reshape(*shape[: x.ndim - len(layer.in_axes)], -1)
    x_codes, x_scale = rounded(tokens, 127)
    w_codes, w_scale = rounded(rows_and_columns(layer), 7 if name == "w4a8" else 127)
    sums = numpy_product(layer, x_codes, w_codes)
    scales = numpy_product(layer, x_scale[..., None], w_scale[..., None])
    np.testing.assert_allclose(got, with_bias(layer, sums * scales), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_sums_of_integers_are_exact(n_rows: int) -> None:
    """The first sum, 4099 x 127^2, is odd and over 2^24: float32 cannot hold it."""
    k = 4099
    quantised = jax.eval_shape(
        lambda layer: quantised_linear(layer, parse_spec("w8a8")), linear("embed -> mlp", embed=k)
    )
    x = RNG.choice(np.array([-127, 126, 127], np.int8), (n_rows, k))
    w = RNG.integers(-127, 128, (10, k)).astype(np.int8)
    w[0], x[0] = 127, 127
    got = jax.jit(lambda x, w: quantised._integer_product(x, w, ()))(x, w)
    want = x.astype(np.int64) @ w.T.astype(np.int64)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == jnp.int32
    assert int(np.float32(want[0, 0])) != want[0, 0]


@pytest.mark.parametrize("n_rows", [1, 16])
def test_compiled_product_is_one_of_integers(n_rows: int) -> None:
    layer = jax.eval_shape(
        lambda layer: quantised_linear(layer, parse_spec("w8a8")),
        linear("embed -> mlp", embed=64, mlp=96),
    )
    x = jax.ShapeDtypeStruct((n_rows, 64), jnp.float32)
    text = jax.jit(lambda layer, x: layer(x)).lower(layer, x).compile().as_text()
    dots = re.findall(r"= (\w+)\[[^\]]*\]\S* dot\((.*?)\), ", text)
    assert [result for result, _ in dots] == ["s32"], text
    names = [name.strip().split(" ")[-1] for name in dots[0][1].split(",")]
    operands = [n for n in names if n.startswith("%")]
    for operand in operands:
        assert re.search(rf"{re.escape(operand)} = s8\[", text), text


@pytest.mark.parametrize("name", ["w8", "w8a8", "w4g4"])
def test_grouped_rows_meet_their_own_expert(name: str) -> None:
    layer = linear("expert: embed -> mlp")
    layer.b = None
    x = RNG.normal(size=(9, 6)).astype(np.float32)

    @jax.jit
    def grouped(layer, x, sizes):
        quantised = quantised_linear(layer, parse_spec(name))
        # And the dense call: every expert on every row.
        return quantised.grouped(x, sizes), quantised(jnp.broadcast_to(x, (3, 9, 6)))

    got, every = grouped(layer, x, np.array([2, 0, 5], np.int32))
    want = np.concatenate([every[0, :2], every[2, 2:7], np.zeros((2, 10))])
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", ["w8", "w8a8", "w4g4", "nf4"])
def test_embedding_reads_rows_and_multiplies_by_them(name: str) -> None:
    make = lambda key: Embedding(7, 6, key=key, std=1.0)  # noqa: E731
    table = randomised(jax.eval_shape(make, jax.random.key(0)))
    ids, x = np.array([[0, 6, 3]]), RNG.normal(size=(1, 2, 6)).astype(np.float32)

    @jax.jit
    def use(table, ids, x):
        quantised = quantised_embedding(table, parse_spec(name))
        codes, scales = round_tokens(x)
        low = quantised(ids, jnp.bfloat16)
        return (
            quantised.w.floats(),
            quantised(ids, jnp.float32),
            quantised.attend(x),
            codes * scales,
            low,
        )

    w, rows, logits, rounded, low = use(table, ids, x)
    np.testing.assert_allclose(rows, w[ids], rtol=1e-6)
    assert (low.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    left = rounded if name == "w8a8" else x
    np.testing.assert_allclose(logits, left @ np.asarray(w).T, atol=1e-5)


def test_dtypes_are_those_of_a_linear() -> None:
    x = jax.ShapeDtypeStruct((5, 6), jnp.bfloat16)
    for name in ("w8", "w8a8"):
        for wanted in (None, jnp.float32):
            use = lambda m, x: quantised_linear(m, parse_spec(name))(x, out_dtype=wanted)  # noqa
            assert jax.eval_shape(use, linear("embed -> mlp"), x).dtype == (wanted or x.dtype)


def test_sums_that_int32_may_not_hold_are_refused() -> None:
    abstract = lambda: quantised_linear(  # noqa: E731
        Linear("embed -> mlp", {"embed": 133_153, "mlp": 2}, key=jax.random.key(0)),
        parse_spec("w8a8"),
    )
    with pytest.raises(UserError, match="133153 inputs: the sum of so many int8 products"):
        jax.eval_shape(abstract)


@pytest.mark.parametrize("n_rows", [1, 5, 70])
def test_products_of_digits_are_as_exact_as_float32(n_rows: int) -> None:
    """Rows of all magnitudes, one of zeros in the middle of them, one with an outlier."""
    k = 300
    x = RNG.normal(size=(n_rows, k)).astype(np.float32) * 10.0 ** RNG.integers(-30, 30, (n_rows, 1))
    x[n_rows // 2] *= n_rows == 1
    x[0, 7] *= 1000
    x = x.astype(np.float32)
    w = RNG.integers(-127, 128, (40, k)).astype(np.int8)
    got = np.asarray(jax.jit(digit_product)(x, w), np.float64)
    bound = 2e-7 * np.abs(x).max(1, keepdims=True) * np.abs(np.float64(w)).sum(1)
    assert np.all(np.abs(got - np.float64(x) @ np.float64(w).T) <= bound)


def test_weight_only_is_one_product_of_integers_on_a_cpu_and_has_a_gradient() -> None:
    layer = quantised_linear(linear("embed -> mlp", embed=64, mlp=96), parse_spec("w8"))
    x = RNG.normal(size=(3, 64)).astype(np.float32)
    text = jax.jit(lambda layer, x: layer(x)).lower(layer, x).compile().as_text()
    assert re.findall(r"= (\w+)\[[^\]]*\]\S* dot\(", text) == ["s32"], text
    got = jax.grad(lambda x: jnp.sum(layer(x) * jnp.arange(96.0)))(x)
    want = np.asarray(layer.w.floats()).T @ np.arange(96.0)
    np.testing.assert_allclose(got, np.broadcast_to(want, (3, 64)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("n_in", "integers"), [(64, True), (2**31 // 127**2 + 1, False)])
def test_sums_that_int32_may_not_hold_are_not_made_of_digits(n_in: int, integers: bool) -> None:
    layer = jax.eval_shape(
        lambda layer: quantised_linear(layer, parse_spec("w8")), linear("embed -> mlp", embed=n_in)
    )
    x = jax.ShapeDtypeStruct((2, n_in), jnp.float32)
    assert ("i32" in str(jax.make_jaxpr(lambda layer, x: layer(x))(layer, x))) == integers
