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

    def __call__(self, x: jax.Array, *, out_dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """Contracts the last axes of `x`.

        Args:
            x: `[..., *in]`, or `[*batch, ..., *in]` if the weight has batch axes.
            out_dtype: dtype the product is accumulated in and returned as; default `x.dtype`.

        Returns:
            `[..., *out]` (`[*batch, ..., *out]`), split as `x` and the out axes are.
        """
        w = self.weight(x.dtype)
        lead = lead_spec(x, x.ndim - len(self.in_axes))
        if self.batch_axes or not lead or any(lead[1:]):
            return self.add_bias(self._contract(x, w, lead, out_dtype))
        return self.add_bias(self._contract_flat(x, w, lead, out_dtype))

    def weight(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The matrix as it is multiplied: `[*batch, *in, *out]`, gathered over `fsdp`."""
        return gather(self.w[...], self.weight_axes).astype(dtype)

    def add_bias(self, y: jax.Array) -> jax.Array:
        """Adds the bias, if there is one, to `[*batch, ..., *out]`."""
        if self.b is None:
            return y
        n_batch = len(self.batch_axes)
        ones = (1,) * (y.ndim - n_batch - len(self.out_axes))
        bias = self.b[...].reshape(*self.b.shape[:n_batch], *ones, *self.b.shape[n_batch:])
        return y + bias.astype(y.dtype)

    def _contract(
        self, x: jax.Array, w: jax.Array, lead: tuple[Any, ...], dtype: jax.typing.DTypeLike | None
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
            w,
            batch + inner + outer,
            batch + free + outer,
            preferred_element_type=dtype,
            out_sharding=result_split(*lead, *spec(self.out_axes, gathered=True)),
        )

    def _contract_flat(
        self, x: jax.Array, w: jax.Array, lead: tuple[Any, ...], dtype: jax.typing.DTypeLike | None
    ) -> jax.Array:
        """The same as a product of two matrices, where no axis but the first of `x` is split.

        XLA:CPU transposes the operands of a product over several axes, and fuses the transposes
        into the elementwise code around it: a train step takes 1.4 times as long.
        """
        n_in = len(self.in_axes)
        rows, outs = x.shape[: x.ndim - n_in], w.shape[n_in:]
        k = math.prod(w.shape[:n_in])
        ins, out = spec(self.in_axes, gathered=True), spec(self.out_axes, gathered=True)
        y = jnp.einsum(
            "ik,kj->ij",
            jnp.reshape(x, (math.prod(rows), k), out_sharding=result_split(lead[0], ins[0])),
            jnp.reshape(w, (k, math.prod(outs)), out_sharding=result_split(ins[0], out[0])),
            preferred_element_type=dtype,
            out_sharding=result_split(lead[0], out[0]),
        )
        return jnp.reshape(y, (*rows, *outs), out_sharding=result_split(*lead, *out))

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
        w = gather(self.w[...], ("vocab", "embed")).astype(x.dtype)
        lead, (vocab,) = lead_spec(x, x.ndim - 1), spec(("vocab",), gathered=True)
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
    # Fully gathered first: the backward of a lookup in a split table makes XLA replicate it.
    table = jax.reshard(table, P(None, None))
    return table.at[rows].get(out_sharding=P(*lead_spec(rows, rows.ndim), None))


def result_split(*entries: Any) -> P | None:
    """How a result is to be split: said on an Explicit mesh only."""
    return P(*entries) if has_mesh() else None
