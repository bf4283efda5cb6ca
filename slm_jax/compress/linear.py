"""Quantised drop-ins for `Linear` and `Embedding`: the same calls, the same axes, fewer bytes."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from slm_kernels.experts import grouped_matmul

from slm_jax.compress.codes import Coded, decode, encode, round_tokens, unpack
from slm_jax.compress.spec import QuantSpec
from slm_jax.errors import UserError
from slm_jax.nn.linear import Embedding, Linear, look_up, result_split
from slm_jax.nn.module import Buffer
from slm_jax.parallel.rules import gather, has_mesh, lead_spec, spec

# Sums of products of int8 codes must fit int32.
_MOST_INPUTS = (2**31 - 1) // 127**2

# Rows of activations up to which a product takes the time of reading the weights.
_FEW_ROWS = 64


class QuantisedMatrix(nnx.Module):
    """The stored form of a matrix. Outputs come first: integer products contract the last axis.

    Attributes:
        codes: `[*batch, *out, columns]`, see `Coded`; the input axes are one axis.
        scales: `[*batch, *out, groups]`.
        spec: the format.
        in_shape: sizes of the input axes.
    """

    def __init__(
        self,
        coded: Coded,
        spec: QuantSpec,
        rows: tuple[str, ...],
        inputs: tuple[str, ...],
        in_shape: tuple[int, ...],
    ) -> None:
        """Takes over the arrays.

        Args:
            coded: the matrix, stacked layers first if there are any.
            spec: the format.
            rows: logical names of the batch and out axes.
            inputs: logical names of the input axes.
            in_shape: their sizes.

        Raises:
            UserError: if int32 cannot hold a sum of so many integer products.
        """
        if spec.activations == "int8" and math.prod(in_shape) > _MOST_INPUTS:
            raise UserError(
                f"{math.prod(in_shape)} inputs: the sum of so many int8 products may pass int32: "
                "quantise this matrix without a8"
            )
        # Groups must not be torn apart; one scale a row leaves the inputs free to be split.
        columns = inputs[0] if spec.group is None and spec.bits == 8 else None
        self.codes = Buffer(coded.codes, axes=(*rows, columns))
        self.scales = Buffer(coded.scales, axes=(*rows, None))
        self.spec = spec
        self.in_shape = in_shape

    @property
    def n_in(self) -> int:
        """Inputs of the matrix."""
        return math.prod(self.in_shape)

    @property
    def n_weights(self) -> int:
        """Weights that the codes stand for, stacked layers included."""
        return math.prod(self.codes.shape[:-1]) * self.n_in

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        arrays = (self.codes.get_value(), self.scales.get_value())
        return sum(a.size * jnp.dtype(a.dtype).itemsize for a in arrays)

    def gathered(self) -> Coded:
        """The arrays as they are used: not split over `fsdp`."""
        return Coded(*(gather(v[...], v.get_metadata()["axes"]) for v in (self.codes, self.scales)))

    def floats(self) -> jax.Array:
        """What the codes stand for: `[*batch, *out, K]` float32, not split over `fsdp`."""
        return decode(self.gathered(), self.spec, self.n_in)


class QuantisedLinear(Linear):
    """A `Linear` whose weight is stored in a few bits.

    With `spec.activations == "int8"` the product is one of integers, exact, and scaled afterwards:
    y = (codes of x) (codes of w) x scale of the token x scale of the output. Float activations
    meet integer codes in the same way on a CPU, where weights made floats again are written to
    memory in every call: each number of x is three codes there, a float32 to its last bits.

    Attributes:
        w: the matrix.
        b: `[*batch, *out]`, or `None`.
    """

    w: QuantisedMatrix  # type: ignore[assignment]

    def __init__(
        self,
        w: QuantisedMatrix,
        b: nnx.Param | None,
        *,
        batch_axes: tuple[str, ...] = (),
        in_axes: tuple[str, ...],
        out_axes: tuple[str, ...],
    ) -> None:
        self.batch_axes, self.in_axes, self.out_axes = batch_axes, in_axes, out_axes
        self.w = w
        self.b = b

    def weight(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The weight as floats, `[*batch, *in, *out]`."""
        w = self.w.floats().astype(dtype)
        n_batch, n_in = len(self.batch_axes), len(self.in_axes)
        rows = spec(self.batch_axes + self.out_axes, gathered=True)
        split = result_split(*rows, *spec(self.in_axes, gathered=True))
        w = jnp.reshape(w, (*w.shape[:-1], *self.w.in_shape), out_sharding=split)
        last = range(w.ndim - n_in, w.ndim)
        return jnp.moveaxis(w, tuple(last), tuple(range(n_batch, n_batch + n_in)))

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Sizes of the out axes."""
        return tuple(self.w.codes.shape[-1 - len(self.out_axes) : -1])

    def matrix(self, dtype: jax.typing.DTypeLike, lead: tuple[object, ...]) -> jax.Array:
        """As `Linear.matrix`."""
        rows = spec((self.in_axes[0], self.out_axes[0]), gathered=True)
        w = self.weight(dtype)
        return jnp.reshape(w, (self.w.n_in, -1), out_sharding=result_split(*rows))

    def __call__(self, x: jax.Array, *, out_dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """As `Linear`; with int8 activations whatever the dtype, by an integer product."""
        w = self.w.spec
        if w.activations == "float":
            by_floats = partial(super().__call__, out_dtype=out_dtype)
            as_integers = w.group is None and w.code != "nf4" and self.w.n_in <= _MOST_INPUTS
            if self.batch_axes or has_mesh() or not as_integers:
                return by_floats(x)
            by_digits = partial(self._product_of_digits, out_dtype=out_dtype)
            return jax.lax.platform_dependent(x, cpu=by_digits, default=by_floats)
        n_batch, n_in = len(self.batch_axes), len(self.in_axes)
        lead, inner = lead_spec(x, x.ndim - n_in), spec(self.in_axes, gathered=True)
        shape = (*x.shape[: x.ndim - n_in], self.w.n_in)
        tokens = jnp.reshape(x, shape, out_sharding=result_split(*lead, inner[0]))
        codes, scales = round_tokens(tokens)
        stored = self.w.gathered()
        y = self._integer_product(codes, unpack(stored.codes, self.w.spec, self.w.n_in), lead)
        ones = (1,) * len(self.out_axes)
        y = y.astype(jnp.float32) * scales.reshape(*scales.shape[:-1], *ones)
        free = (1,) * (y.ndim - n_batch - len(ones))
        rows = stored.scales[..., 0]
        y = y * rows.reshape(*rows.shape[:n_batch], *free, *rows.shape[n_batch:])
        return self.add_bias(y.astype(out_dtype or x.dtype))

    def _product_of_digits(self, x: jax.Array, out_dtype: jax.typing.DTypeLike | None) -> jax.Array:
        """The product with integer codes of one scale a row, float32 as it is, on one device."""
        rows = x.reshape(-1, self.w.n_in).astype(jnp.float32)
        codes = unpack(self.w.codes[...], self.w.spec, self.w.n_in)
        y = digit_product(rows, codes.reshape(-1, self.w.n_in)) * self.w.scales[...].reshape(-1)
        y = y.reshape(*x.shape[: x.ndim - len(self.in_axes)], *self.out_shape)
        return self.add_bias(y.astype(out_dtype or x.dtype))

    def _integer_product(self, x: jax.Array, w: jax.Array, lead: tuple[object, ...]) -> jax.Array:
        """int8 `[*batch, ..., K]` times int8 `[*batch, *out, K]`: int32 `[*batch, ..., *out]`."""
        n_batch, n_out = len(self.batch_axes), len(self.out_axes)
        if n_batch or has_mesh():
            batch, free = list(range(n_batch)), [100 + i for i in range(x.ndim - n_batch - 1)]
            outer, k = [n_batch + i for i in range(n_out)], n_batch + n_out
            return jnp.einsum(
                x, [*batch, *free, k], w, [*batch, *outer, k], batch + free + outer,
                preferred_element_type=jnp.int32,
                out_sharding=result_split(*lead, *spec(self.out_axes, gathered=True)),
            )  # fmt: skip
        # A product of two matrices, for the reason in `Linear._contract_flat`.
        y = integer_matmul(x.reshape(-1, x.shape[-1]), w.reshape(-1, w.shape[-1]))
        return y.reshape(*x.shape[:-1], *w.shape[:-1])

    def grouped(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """As `Linear.grouped`."""
        if self.w.spec.activations == "float":
            return super().grouped(x, group_sizes)
        codes, scales = round_tokens(x)
        stored = self.w.gathered()
        w = jnp.swapaxes(unpack(stored.codes, self.w.spec, self.w.n_in), 1, 2)
        y = grouped_matmul(codes, w, group_sizes, out_dtype=jnp.int32)
        ends = jnp.cumsum(group_sizes)
        expert = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right")
        rows = stored.scales[..., 0].at[expert].get(mode="clip")
        return (y.astype(jnp.float32) * scales * rows).astype(x.dtype)


def integer_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w.T` of int8 `[n, K]` and `[m, K]`, int32 `[n, m]`, on one device."""
    n = x.shape[0]
    n_padded = jax.core.max_dim(n, 2)  # a symbol in an exported program of any batch
    if n_padded != n:
        # XLA:CPU turns the product with one vector into float code, 3 times slower than two.
        x = jax.lax.optimization_barrier(jnp.pad(x, ((0, n_padded - n), (0, 0))))
    if not isinstance(n, int) or n > _FEW_ROWS:
        return jnp.einsum("ik,jk->ij", x, w, preferred_element_type=jnp.int32)[:n]
    # XLA:CPU reads w at the speed of memory if it stands on the left, else at 0.4 of it. Without
    # the barrier it would exchange the sides to save the transpose.
    y = jnp.einsum("jk,ik->ji", w, x, preferred_element_type=jnp.int32)
    return jax.lax.optimization_barrier(y).T[:n]


@jax.custom_jvp
def digit_product(x: jax.Array, codes: jax.Array) -> jax.Array:
    """Floats times integers by products of integers, as exact as one of floats.

    Each row of x is its largest magnitude times three digits to the base 254, which are rounded to
    nearest and so from -127 to 127: off by 1/254^3 of that magnitude at most, about half the
    distance of two float32 (the splitting of arXiv 2306.11975, for 8 bits).

    Args:
        x: `[n, K]` float32.
        codes: `[m, K]` int8.

    Returns:
        `x @ codes.T`, `[n, m]` float32.
    """
    top = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    rest = x * (127 / jnp.where(top > 0, top, 1))
    digits = []
    for _ in range(3):
        digits.append(jnp.round(rest))
        rest = (rest - digits[-1]) * 254
    # The barrier keeps the elementwise code out of the product, which would be no library's then.
    left = jax.lax.optimization_barrier(jnp.concatenate(digits).astype(jnp.int8))
    whole = integer_matmul(left, codes)
    first, second, third = whole.astype(jnp.float32).reshape(3, x.shape[0], -1)
    return (first + (second + third / 254) / 254) * (top / 127)


@digit_product.defjvp
def _(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]) -> Any:
    """Linear in x; rounding has no slope."""
    x, codes = primals
    return digit_product(x, codes), tangents[0] @ codes.astype(jnp.float32).T


class QuantisedEmbedding(Embedding):
    """An `Embedding` whose table is stored in a few bits, one row as one output of a matrix.

    Attributes:
        w: the table.
    """

    w: QuantisedMatrix  # type: ignore[assignment]

    def __init__(self, w: QuantisedMatrix) -> None:
        self.w = w

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Looks tokens up: `[B, S]` int32 to `[B, S, embed]`; reads only their rows."""
        rows = Coded(look_up(self.w.codes[...], tokens), look_up(self.w.scales[...], tokens))
        return decode(rows, self.w.spec, self.w.n_in).astype(dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits of a tied head: `[B, S, embed]` to `[B, S, vocab]` in float32."""
        head = QuantisedLinear(self.w, None, in_axes=("embed",), out_axes=("vocab",))
        return head(x, out_dtype=jnp.float32)


def matrix_of(linear: Linear) -> jax.Array:
    """The weight of a `Linear`, `[..., *batch, *out, K]`: outputs first, inputs as one axis."""
    w = linear.w[...]
    n_in, n_out = len(linear.in_axes), len(linear.out_axes)
    first = w.ndim - n_in - n_out
    w = jnp.moveaxis(w, tuple(range(first, first + n_in)), tuple(range(w.ndim - n_in, w.ndim)))
    return w.reshape(*w.shape[: w.ndim - n_in], -1)


def quantised_linear(linear: Linear, spec: QuantSpec, coded: Coded | None = None) -> Linear:
    """A `Linear`, stacked or not, in another format.

    Args:
        linear: of float weights.
        spec: the format.
        coded: `matrix_of(linear)` in that format; by default each weight is rounded to nearest.
    """
    w = linear.w.get_value()
    n_in, n_out = len(linear.in_axes), len(linear.out_axes)
    return QuantisedLinear(
        QuantisedMatrix(
            encode(matrix_of(linear), spec) if coded is None else coded,
            spec,
            linear.batch_axes + linear.out_axes,
            linear.in_axes,
            tuple(w.shape[w.ndim - n_in - n_out : w.ndim - n_out]),
        ),
        linear.b,
        batch_axes=linear.batch_axes,
        in_axes=linear.in_axes,
        out_axes=linear.out_axes,
    )


def quantised_embedding(table: Embedding, spec: QuantSpec, coded: Coded | None = None) -> Embedding:
    """An `Embedding` in another format; arguments as in `quantised_linear`."""
    w = table.w[...]
    coded = encode(w, spec) if coded is None else coded
    return QuantisedEmbedding(QuantisedMatrix(coded, spec, ("vocab",), ("embed",), w.shape[-1:]))
