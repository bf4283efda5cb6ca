"""`Linear`, the one weight class, and `Embedding`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from slm_kernels.experts import grouped_matmul

from slm_jax.nn.module import parameter
from slm_jax.parallel.rules import gather, has_mesh, lead_spec, spec

Sizes = dict[str, int]


def truncated_normal(key: jax.Array, shape: tuple[int, ...], std: float) -> jax.Array:
    """Normal cut at two sigma and rescaled, so that the standard deviation is exactly `std`."""
    return jax.nn.initializers.truncated_normal(std / 0.87962566103423978)(key, shape, jnp.float32)


class Linear(nnx.Module):
    """A matrix with named axes: `Linear("embed -> heads head_dim", sizes, key=key)`.

    The last axes of the input are contracted with the axes left of the arrow. With a leading
    `"expert: ..."` there is one matrix an expert. Weights are float32 masters and are cast to the
    input's dtype at use. Quantised, masked and adapted weights replace this class in the tree.

    Attributes:
        w: `[*batch, *in, *out]`.
        b: `[*batch, *out]`, or `None`.
    """

    def __init__(
        self,
        axes: str,
        sizes: Sizes,
        *,
        key: jax.Array,
        bias: bool = False,
        std: float | None = None,
    ) -> None:
        """Initialises with a truncated normal of standard deviation `std`.

        Args:
            axes: `"in axes -> out axes"`, optionally after `"batch axes:"`; logical axis names.
            sizes: the size of every axis named.
            key: PRNG key.
            bias: adds a zero-initialised bias over the out axes, without weight decay.
            std: standard deviation of the weights; `None` is 1/sqrt(fan-in), 0 is zeros.
        """
        batch, _, contraction = axes.rpartition(":")
        inputs, _, outputs = contraction.partition("->")
        self.batch_axes = tuple(batch.split())
        self.in_axes = tuple(inputs.split())
        self.out_axes = tuple(outputs.split())
        shape = tuple(sizes[a] for a in self.weight_axes)
        fan_in = math.prod(sizes[a] for a in self.in_axes)
        std = fan_in**-0.5 if std is None else std
        w = truncated_normal(key, shape, std) if std else jnp.zeros(shape, jnp.float32)
        matrix = (len(self.in_axes), len(self.out_axes))
        self.w = parameter(w, self.weight_axes, matrix=matrix)
        bias_axes = self.batch_axes + self.out_axes
        self.b = (
            parameter(jnp.zeros([sizes[a] for a in bias_axes]), bias_axes, decay=False)
            if bias
            else None
        )

    @property
    def weight_axes(self) -> tuple[str, ...]:
        """Logical names of the dimensions of `w`."""
        return self.batch_axes + self.in_axes + self.out_axes

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Sizes of the out axes."""
        return tuple(self.w.shape[self.w.ndim - len(self.out_axes) :])

    def __call__(self, x: jax.Array, *, out_dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """Contracts the last axes of `x`.

        Args:
            x: `[..., *in]`, or `[*batch, ..., *in]` if the weight has batch axes.
            out_dtype: dtype the product is accumulated in and returned as; default `x.dtype`.

        Returns:
            `[..., *out]` (`[*batch, ..., *out]`), split as `x` and the out axes are.
        """
        lead = lead_spec(x, x.ndim - len(self.in_axes))
        contract = self._contract_batched if self.batch_axes else self._contract
        return self.add_bias(contract(x, lead, out_dtype))

    def weight(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The matrix as it is multiplied: `[*batch, *in, *out]`, gathered over `fsdp`."""
        return gather(self.w[...].astype(dtype), self.weight_axes)

    def matrix(self, dtype: jax.typing.DTypeLike, lead: tuple[Any, ...]) -> jax.Array:
        """`weight` as one `[K, N]` over all in and all out axes, for tokens split as `lead` says.

        Reshaped and cast first: the gather then moves what is multiplied.
        """
        axes = (self.in_axes[0], self.out_axes[0])
        k = math.prod(self.w.shape[: len(self.in_axes)])
        w = jnp.reshape(self.w[...], (k, -1), out_sharding=result_split(*spec(axes)))
        return gather(w.astype(dtype), axes, lead)

    def add_bias(self, y: jax.Array) -> jax.Array:
        """Adds the bias, if there is one, to `[*batch, ..., *out]`."""
        if self.b is None:
            return y
        n_batch = len(self.batch_axes)
        ones = (1,) * (y.ndim - n_batch - len(self.out_axes))
        bias = self.b[...].reshape(*self.b.shape[:n_batch], *ones, *self.b.shape[n_batch:])
        return y + bias.astype(y.dtype)

    def _contract_batched(
        self, x: jax.Array, lead: tuple[Any, ...], dtype: jax.typing.DTypeLike | None
    ) -> jax.Array:
        """One einsum over all axes as they are, batch axes included."""
        n_batch, n_in = len(self.batch_axes), len(self.in_axes)
        batch = list(range(n_batch))
        inner = [n_batch + i for i in range(n_in)]
        outer = [n_batch + n_in + i for i in range(len(self.out_axes))]
        free = [100 + i for i in range(x.ndim - n_batch - n_in)]
        return jnp.einsum(
            x,
            batch + free + inner,
            self.weight(x.dtype),
            batch + inner + outer,
            batch + free + outer,
            preferred_element_type=dtype,
            out_sharding=result_split(*lead, *spec(self.out_axes, gathered=True)),
        )

    def _contract(
        self, x: jax.Array, lead: tuple[Any, ...], dtype: jax.typing.DTypeLike | None
    ) -> jax.Array:
        """A product of two matrices, of more only where an axis after the first of `x` is split.

        XLA:CPU transposes the operands of a product over several axes, and fuses the transposes
        into the elementwise code around it: a train step takes 1.4 times as long.
        """
        w = self.matrix(x.dtype, lead)
        rows = x.shape[: len(lead)]
        ins, out = spec(self.in_axes, gathered=True), spec(self.out_axes, gathered=True)
        flat, places = rows, lead
        if lead and not any(lead[1:]):
            flat, places = (math.prod(rows),), lead[:1]
        y = jnp.einsum(
            "...k,kj->...j",
            jnp.reshape(x, (*flat, w.shape[0]), out_sharding=result_split(*places, ins[0])),
            w,
            preferred_element_type=dtype,
            out_sharding=result_split(*places, out[0]),
        )
        return jnp.reshape(y, (*rows, *self.out_shape), out_sharding=result_split(*lead, *out))

    def grouped(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Rows sorted by expert times each expert's own matrix (no capacity, nothing dropped).

        Args:
            x: `[rows, in]`, the rows of expert 0 first.
            group_sizes: `[experts]` int32, rows of each expert; rows beyond their sum give zero.

        Returns:
            `[rows, out]` in the dtype of `x`.
        """
        return grouped_matmul(x, self.weight(x.dtype), group_sizes)


class Embedding(nnx.Module):
    """A table of token vectors, read by row and, when tied, as the output matrix.

    Attributes:
        w: `[vocab, embed]`.
    """

    def __init__(self, vocab_size: int, d_model: int, *, key: jax.Array, std: float) -> None:
        self.w = parameter(truncated_normal(key, (vocab_size, d_model), std), ("vocab", "embed"))

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Looks tokens up: `[B, S]` int32 to `[B, S, embed]` in `dtype`."""
        return look_up(self.w[...].astype(dtype), tokens)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits of a tied head: `[B, S, embed]` to `[B, S, vocab]` in float32."""
        lead, (vocab,) = lead_spec(x, x.ndim - 1), spec(("vocab",), gathered=True)
        w = gather(self.w[...].astype(x.dtype), ("vocab", "embed"), lead)
        rows = x
        if lead and not any(lead[1:]):  # as in `Linear._contract_flat`
            rows = jnp.reshape(x, (-1, x.shape[-1]), out_sharding=result_split(lead[0], None))
        y = jnp.einsum(
            "...d,vd->...v",
            rows,
            w,
            preferred_element_type=jnp.float32,
            out_sharding=result_split(*lead[: rows.ndim - 1], vocab),
        )
        return jnp.reshape(y, (*x.shape[:-1], w.shape[0]), out_sharding=result_split(*lead, vocab))


def look_up(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of a table: `[n, embed]` and `[...]` int32 to `[..., embed]`, split as `rows` is."""
    if not has_mesh():
        return table[rows]
    # Gathered first: the backward of a lookup in a split table makes XLA replicate it.
    lead, (_, columns) = lead_spec(rows, rows.ndim), lead_spec(table, 2)
    table = jax.reshard(table, P(None, columns))
    if columns is not None:
        table = gather(table, (None, "embed"), lead)
    return table.at[rows].get(out_sharding=P(*lead, None))


def result_split(*entries: Any) -> P | None:
    """How a result is to be split: said on an Explicit mesh only."""
    return P(*entries) if has_mesh() else None
