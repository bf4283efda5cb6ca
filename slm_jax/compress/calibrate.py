"""What enters every `Linear` of a language model, gathered layer by layer.

Only one layer's statistics exist at a time, and of the activations only the residual stream of the
calibration batches, so a model whose statistics would not fit together can be done all the same.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.compress.quantise import is_matrix, path_name
from slm_jax.errors import UserError
from slm_jax.models.lm import LM, default_positions
from slm_jax.nn.block import Block
from slm_jax.nn.linear import Linear

Tell = Callable[[str, jax.Array, jax.Array | None], Any]


class Inputs(NamedTuple):
    """Inputs of one `Linear`; the batch axes are those of its weight (experts).

    Attributes:
        rows: number seen, `[*batch]` float32.
        largest: largest magnitude of each input, `[*batch, K]`.
        squares: sum of the squares of each input, `[*batch, K]`.
        gram: sum of x xᵀ over the rows, `[*batch, K, K]`; `[*batch, 0, 0]` if not asked for.
    """

    rows: jax.Array
    largest: jax.Array
    squares: jax.Array
    gram: jax.Array

    def merged(self, other: "Inputs") -> "Inputs":
        """Statistics of the rows of both."""
        largest = jnp.maximum(self.largest, other.largest)
        return Inputs(
            self.rows + other.rows, largest, self.squares + other.squares, self.gram + other.gram
        )


class Squares(NamedTuple):
    """Sum of the squared error of a `Linear`'s output, and of the squared output, `[]` each."""

    error: jax.Array
    output: jax.Array

    def merged(self, other: "Squares") -> "Squares":
        """Sums over the rows of both."""
        return Squares(self.error + other.error, self.output + other.output)


class Stream(NamedTuple):
    """The residual stream of one calibration batch, and where its tokens stand.

    Attributes:
        x: `[B, S, embed]`.
        positions: `[B or 1, S]` int32.
        segments: `[B, S]` int32 or `None`.
    """

    x: jax.Array
    positions: jax.Array
    segments: jax.Array | None


class _Watched:
    """Stands in for a `Linear` while a layer is traced, and tells what goes into it."""

    def __init__(self, path: str, linear: Linear, tell: Tell) -> None:
        self._path, self._linear, self._tell = path, linear, tell

    def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
        self._tell(self._path, x, None)
        return self._linear(x, **kwargs)

    def grouped(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        self._tell(self._path, x, group_sizes)
        return self._linear.grouped(x, group_sizes)


def matrices(module: Any) -> dict[str, Any]:
    """Every `Linear` and `Embedding` of a module by path, as `mixer.q`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=is_matrix)
    return {path_name(path): leaf for path, leaf in flat if is_matrix(leaf)}


def get_layer(model: LM, i: int) -> Block:
    """Layer `i` as a `Block` of its own."""
    repeat, position = divmod(i, len(model.config.pattern))
    if repeat == model.config.n_layers // len(model.config.pattern):
        tail: Block = model.tail[position]
        return tail
    block: Block = jax.tree.map(lambda leaf: leaf[repeat], model.blocks[position])
    return block


def with_layers(model: LM, layers: list[Block]) -> LM:
    """The model with other layers, each of the shapes that `get_layer` gives."""
    period = len(model.config.pattern)
    stacked = model.config.n_layers // period * period
    copy = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))
    copy.blocks = nnx.List(
        [
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers[p:stacked:period])
            for p in range(period)
            if stacked
        ]
    )
    copy.tail = nnx.List(layers[stacked:])
    return copy


def walk[T](
    model: LM,
    batches: Iterable[Mapping[str, Any]],
    visit: Callable[[int, Block, list[Stream]], tuple[Block, T]],
) -> Iterator[T]:
    """Goes through the layers in order, with what enters each.

    Args:
        model: of float weights.
        batches: `tokens` `[B, S]` int32, and optionally `segments` and `positions`.
        visit: (index, layer, streams that enter it) to the layer whose outputs the next one sees,
            and a result.

    Yields:
        The results, one a layer.

    Raises:
        UserError: if there is no batch, or layers of the model repeat.
    """
    if model.config.recursion is not None:
        raise UserError(
            "recursion: layers that repeat see other inputs in every run, which calibration does "
            "not follow: choose method=rtn, or to prune method=magnitude"
        )
    names = ("tokens", "segments", "positions")
    streams = [_enter(model, {k: b[k] for k in names if k in b}) for b in batches]
    if not streams:
        raise UserError("calibration: there is no batch: give at least one")
    dtype = jnp.dtype(model.config.dtype)
    for i in range(model.config.n_layers):
        block, result = visit(i, get_layer(model, i), streams)
        streams = [s._replace(x=_run(block, s, dtype)) for s in streams]
        yield result


def inputs_of(block: Block, streams: list[Stream], dtype: Any, *, gram: bool) -> dict[str, Inputs]:
    """Statistics of what enters every `Linear` of a layer, over all streams."""
    return _summed(_observe(block, s, dtype, gram) for s in streams)


def layer_errors(model: LM, other: LM, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How far the output of every `Linear` is off: |y' - y| / |y| on the same inputs.

    Args:
        model: the float model, whose own activations are the inputs. For a model that was smoothed
            before it was rounded: the smoothed one.
        other: the same model with other `Linear`s.
        batches: see `walk`.

    Returns:
        By layer and path, as `3.mixer.q`.

    Raises:
        UserError: as `walk`.
    """
    dtype = jnp.dtype(model.config.dtype)

    def visit(i: int, block: Block, streams: list[Stream]) -> tuple[Block, dict[str, float]]:
        there = get_layer(other, i)
        sums = _summed(_compare(block, there, s, dtype) for s in streams)
        errors = {k: (v.error / jnp.maximum(v.output, 1e-30)) ** 0.5 for k, v in sums.items()}
        return block, {f"{i}.{k}": float(v) for k, v in errors.items()}

    return {k: v for one in walk(model, batches, visit) for k, v in one.items()}


def block_errors(model: LM, other: LM, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How far what every layer adds to the residual stream is off: |y' - y| / |y| on the same x.

    Args:
        model: the float model, whose own activations are the inputs.
        other: a model of the same layers, of whatever inner sizes.
        batches: see `walk`.

    Returns:
        By layer, as `3`.

    Raises:
        UserError: as `walk`.
    """
    dtype = jnp.dtype(model.config.dtype)

    def visit(i: int, block: Block, streams: list[Stream]) -> tuple[Block, float]:
        there = get_layer(other, i)
        sums = _summed({"": _compare_blocks(block, there, s, dtype)} for s in streams)[""]
        return block, float((sums.error / jnp.maximum(sums.output, 1e-30)) ** 0.5)

    return {str(i): error for i, error in enumerate(walk(model, batches, visit))}


def _summed(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for part in parts:
        total = {k: total[k].merged(v) if total else v for k, v in part.items()}
    return total


@jax.jit
def _enter(model: LM, batch: Mapping[str, jax.Array]) -> Stream:
    config = model.config
    tokens, segments = batch["tokens"], batch.get("segments")
    positions = batch.get("positions")
    if positions is None:
        positions = default_positions(tokens.shape[1], segments)
    x = model.embed(tokens, jnp.dtype(config.residual_dtype or config.dtype))
    if config.embedding_scale is not None:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    return Stream(x, positions, segments)


def _forward(block: Any, s: Stream, dtype: Any) -> jax.Array:
    y: jax.Array = block(s.x, positions=s.positions, segments=s.segments, dtype=dtype)[0]
    return y


_run = jax.jit(_forward, static_argnames="dtype")


@partial(jax.jit, static_argnames=("dtype", "gram"))
def _observe(block: Block, s: Stream, dtype: Any, gram: bool) -> dict[str, Inputs]:
    linears, told = matrices(block), {}

    def tell(path: str, x: jax.Array, sizes: jax.Array | None) -> None:
        told[path] = _statistics(linears[path], x, sizes, gram)

    _forward(_watched(block, tell), s, dtype)
    return told


@partial(jax.jit, static_argnames="dtype")
def _compare(block: Block, other: Block, s: Stream, dtype: Any) -> dict[str, Squares]:
    before, after, told = matrices(block), matrices(other), {}

    def tell(path: str, x: jax.Array, sizes: jax.Array | None) -> None:
        two = (before[path], after[path])
        y, z = (m(x) if sizes is None else m.grouped(x, sizes) for m in two)
        y, z = y.astype(jnp.float32), z.astype(jnp.float32)
        told[path] = Squares(jnp.sum(jnp.square(z - y)), jnp.sum(jnp.square(y)))

    _forward(_watched(block, tell), s, dtype)
    return told


@partial(jax.jit, static_argnames="dtype")
def _compare_blocks(block: Block, other: Block, s: Stream, dtype: Any) -> Squares:
    y, z = (_forward(b, s, dtype).astype(jnp.float32) for b in (block, other))
    return Squares(jnp.sum(jnp.square(z - y)), jnp.sum(jnp.square(y - s.x.astype(jnp.float32))))


def _watched(block: Block, tell: Tell) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _Watched(path_name(path), leaf, tell) if is_matrix(leaf) else leaf,
        block,
        is_leaf=is_matrix,
    )


def _statistics(linear: Linear, x: jax.Array, sizes: jax.Array | None, gram: bool) -> Inputs:
    """Of rows that one call of a `Linear` sees; `sizes` as in `Linear.grouped`."""
    x = x.astype(jnp.float32)
    if sizes is None:
        n_batch = len(linear.batch_axes)
        inputs = x.shape[x.ndim - len(linear.in_axes) :]
        x = x.reshape(*x.shape[:n_batch], -1, math.prod(inputs))
        # Slots of an expert that nothing was sent to are zeros and change no sum but the count.
        count = jnp.full(x.shape[:n_batch], x.shape[-2], jnp.float32)
        products = jnp.einsum("...rk,...rl->...kl", x, x) if gram else None
        squares = jnp.sum(jnp.square(x), axis=-2)
        largest = jnp.max(jnp.abs(x), axis=-2)
    else:
        ends, rows = jnp.cumsum(sizes), jnp.arange(x.shape[0])
        member = (rows < ends[:, None]) & (rows >= (ends - sizes)[:, None])
        count = sizes.astype(jnp.float32)
        sends = member.astype(x.dtype)
        products = jnp.einsum("er,rk,rl->ekl", sends, x, x) if gram else None
        squares = sends @ jnp.square(x)
        largest = jnp.max(jnp.where(member[..., None], jnp.abs(x), 0), axis=1)
    none = jnp.zeros((*count.shape, 0, 0))
    return Inputs(count, largest, squares, none if products is None else products)
