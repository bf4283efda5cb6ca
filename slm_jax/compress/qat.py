"""Training for fewer bits: every matrix has step sizes, and the loss sees what its codes stand for.

A model in training has a `Rounded` in the place of every `Linear` and `Embedding` that is to be
quantised: its float weights and the step sizes of their codes, both trained. `rounded` makes an
ordinary model of it, of the numbers that codes stand for, and `learned` the quantised model with
these very codes: the same function, in fewer bytes.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.compress.codes import Coded, encode, largest_code
from slm_jax.compress.linear import matrix_of
from slm_jax.compress.lsq import Groups, first_step, groups_of, rounded_tokens, rounded_weight
from slm_jax.compress.quantise import (
    KEEP,
    format_of,
    is_matrix,
    is_wanted,
    path_name,
    quantise,
    vocab_spec,
)
from slm_jax.compress.spec import QuantSpec, parse_spec
from slm_jax.errors import UserError
from slm_jax.nn.linear import Embedding, Linear, result_split
from slm_jax.nn.module import StepSize, changed
from slm_jax.nn.parametrization import UpdateScale
from slm_jax.parallel.rules import lead_spec, spec

_MOST_BITS = 16  # float32 has 24 for the quotient that is rounded


@dataclass(frozen=True)
class QATConfig:
    """Quantisation-aware training. Without a `spec`: none, weights are floats."""

    spec: str | None = None
    """Format of `slm quantize` that is trained for: w8, w4 or w3; a8 after it rounds activations
    too (w8a8), gN gives every N inputs a step size of their own (w4g32). None: train floats."""
    vocab: str | None = None
    """Format of embedding and head; default that of `spec`, and w8 where that has fewer bits."""
    keep: tuple[str, ...] = KEEP
    """Modules that stay floats, by name: add embed and head to leave them out."""
    via: tuple[int, ...] = ()
    """Bits of the weights before those of the format, such as 8 6 4 for w3."""
    via_steps: int = 0
    """Optimiser steps at each of `via`."""
    step_rate: float = 1.0
    """How fast step sizes move: at 1 an update changes a step by about the share that it changes
    weights of standard deviation 1/sqrt(inputs) by."""

    def __post_init__(self) -> None:
        if self.spec is None:
            for name in ("vocab", "via", "via_steps"):
                if value := getattr(self, name):
                    raise UserError(f"{name}={value!r} without a spec: give one, such as w4")
            return
        for name in ("spec", "vocab"):
            value = getattr(self, name)
            if value is not None and parse_spec(value).code == "nf4":
                raise UserError(
                    f"{name}={value!r}: step sizes are learned for codes that are integers: choose "
                    "w8, w4 or w3, with a8 or gN"
                )
        bits = (*self.via, self.formats[0].bits)
        falling = all(a > b for a, b in itertools.pairwise(bits))
        if not falling or bits[0] > _MOST_BITS:
            raise UserError(
                f"via={self.via} before spec={self.spec!r}: bits must fall, from {_MOST_BITS} at "
                f"most to more than {bits[-1]}"
            )
        if self.via_steps < 0 or bool(self.via) != bool(self.via_steps):
            raise UserError(
                f"via={self.via} with via_steps={self.via_steps}: give both, the bits and the "
                "steps at each, or neither"
            )
        if not 0 < self.step_rate < math.inf:
            raise UserError(f"step_rate={self.step_rate} must be positive: 1 is usual")

    @property
    def on(self) -> bool:
        """Whether anything is rounded."""
        return self.spec is not None

    @property
    def formats(self) -> tuple[QuantSpec, QuantSpec]:
        """Of the layers, and of embedding and head."""
        assert self.spec is not None
        layers = parse_spec(self.spec)
        return layers, vocab_spec(layers) if self.vocab is None else parse_spec(self.vocab)

    @property
    def steps_before(self) -> int:
        """Optimiser steps before the format's own bits."""
        return len(self.via) * self.via_steps

    def tops(self, spec: QuantSpec) -> tuple[int, ...]:
        """The largest codes of a matrix of a format: at each of `via`, and in the end."""
        return tuple(2 ** (max(bits, spec.bits) - 1) - 1 for bits in (*self.via, spec.bits))


class Rounded(nnx.Module):
    """A matrix in training, and the step sizes of its codes. It cannot be called: `rounded` can.

    Attributes:
        matrix: of float weights.
        step: `[*batch, *out, groups]` float32, positive: at the format's own bits. More bits divide
            the same range by more.
        spec: the format.
    """

    def __init__(self, matrix: Linear | Embedding, spec: QuantSpec, *, step_rate: float) -> None:
        self.matrix = matrix
        self.spec = spec
        rows: tuple[str, ...] = ("vocab",)
        if isinstance(matrix, Linear):
            rows = matrix.batch_axes + matrix.out_axes
        first = first_step(self._weight, self.groups, largest_code(spec))
        # The paper's gain makes the ratio of update to value that of the weights (section 2.2); an
        # optimiser that divides by the size of gradients undoes it. Adam's updates of weights have
        # entries of size 1, Muon's, which embedding and head do not have, of 0.2.
        rate = step_rate * self.groups.n_in**0.5
        muon = rate if "vocab" in rows else 0.2 * rate
        self.step = StepSize(
            first,
            axes=(*rows, None),
            decay=False,
            matrix=(0, 0),
            update_scale=UpdateScale(adam=rate, muon=muon),
        )

    @property
    def _weight(self) -> jax.Array:
        """`[..., *in, *out]`."""
        w = self.matrix.w[...]
        return w.T if isinstance(self.matrix, Embedding) else w

    @property
    def groups(self) -> Groups:
        """Which weights share a step size."""
        n_in = n_out = 1
        if isinstance(self.matrix, Linear):
            n_in, n_out = len(self.matrix.in_axes), len(self.matrix.out_axes)
        return groups_of(self._weight.shape, n_in, n_out, self.spec)

    def plain(self, tops: tuple[int, ...], stage: jax.typing.ArrayLike = -1) -> Linear | Embedding:
        """The matrix of the numbers that codes stand for.

        Args:
            tops: `QATConfig.tops` of the format.
            stage: which of them is the largest code; by default the last.
        """
        top, step = jnp.asarray(tops, jnp.float32)[stage], self.step[...]
        if len(tops) > 1:
            step = step * jnp.asarray([tops[-1] / t for t in tops], jnp.float32)[stage]
        w = rounded_weight(self._weight, step, self.groups, self.spec, top)
        if isinstance(self.matrix, Embedding):
            table = changed(self.matrix, w=self.matrix.w.replace(w.T))
            return table if self.spec.activations == "float" else RoundedEmbedding(table)
        linear = changed(self.matrix, w=self.matrix.w.replace(w))
        return linear if self.spec.activations == "float" else RoundedLinear(linear)

    def coded(self) -> Coded:
        """Its codes at the format's own bits."""
        matrix = self.matrix
        w = matrix.w[...] if isinstance(matrix, Embedding) else matrix_of(matrix)
        return encode(w, self.spec, self.step[...])


class RoundedLinear(Linear):
    """A `Linear` whose inputs are rounded as those of integer products are."""

    def __init__(self, linear: Linear) -> None:
        self.batch_axes, self.in_axes = linear.batch_axes, linear.in_axes
        self.out_axes = linear.out_axes
        self.w, self.b = linear.w, linear.b

    def __call__(self, x: jax.Array, *, out_dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """As `Linear`."""
        lead, inner = lead_spec(x, x.ndim - len(self.in_axes)), spec(self.in_axes, gathered=True)
        shape = (*x.shape[: len(lead)], math.prod(x.shape[len(lead) :]))
        tokens = jnp.reshape(x, shape, out_sharding=result_split(*lead, inner[0]))
        rounded = jnp.reshape(
            rounded_tokens(tokens), x.shape, out_sharding=result_split(*lead, *inner)
        )
        return super().__call__(rounded, out_dtype=out_dtype)

    def grouped(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """As `Linear`."""
        return super().grouped(rounded_tokens(x), group_sizes)


class RoundedEmbedding(Embedding):
    """An `Embedding` that, as a head, rounds its inputs as those of integer products are."""

    def __init__(self, table: Embedding) -> None:
        self.w = table.w

    def attend(self, x: jax.Array) -> jax.Array:
        """As `Embedding`."""
        return super().attend(rounded_tokens(x))


def with_steps[M](model: M, config: QATConfig) -> M:
    """The model as it is trained: a `Rounded` for every matrix; itself if `config` is off.

    Pure and traceable. Which matrices, and in which format, is the choice of `quantise`.
    """
    if not config.on:
        return model
    layers, vocab = config.formats

    def one(path: Any, leaf: Any) -> Any:
        if not is_matrix(leaf) or not is_wanted(path_name(path), config.keep):
            return leaf
        return Rounded(leaf, format_of(leaf, layers, vocab), step_rate=config.step_rate)

    out: M = jax.tree_util.tree_map_with_path(one, model, is_leaf=is_matrix)
    return out


def rounded[M](model: M, config: QATConfig, step: jax.Array | None = None) -> M:
    """What the loss sees of a model of `with_steps`: an ordinary one, of rounded numbers.

    Differentiable, by the rules of `lsq`.

    Args:
        model: of `with_steps(..., config)`.
        config: how it is trained.
        step: `[]` int32, optimiser steps before this one: says the bits, where they change. None:
            the format's own, as in evaluation.
    """
    if not config.on:
        return model
    stage: Any = -1
    if step is not None and config.via:
        stage = jnp.minimum(step // config.via_steps, len(config.via))

    def one(leaf: Any) -> Any:
        return leaf.plain(config.tops(leaf.spec), stage) if isinstance(leaf, Rounded) else leaf

    out: M = jax.tree.map(one, model, is_leaf=is_rounded)
    return out


def floats[M](model: M) -> M:
    """The float weights of a model of `with_steps`, without step sizes."""
    out: M = jax.tree.map(
        lambda leaf: leaf.matrix if isinstance(leaf, Rounded) else leaf, model, is_leaf=is_rounded
    )
    return out


def learned[M](model: M, config: QATConfig) -> M:
    """The quantised model that a model of `with_steps` was trained to be."""
    flat, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_rounded)
    coded = {path_name(path): leaf.coded() for path, leaf in flat if is_rounded(leaf)}
    layers, vocab = config.formats
    return quantise(floats(model), layers, vocab=vocab, keep=config.keep, coded=coded)


def is_rounded(node: Any) -> bool:
    """Whether `node` is a matrix in training; for `is_leaf=`."""
    return isinstance(node, Rounded)
