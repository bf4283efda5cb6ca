"""Runs the shared span of a recursive model: in training, with decode states, until it settles.

What it computes is in `slm_jax.models.recursion`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.errors import UserError
from slm_jax.models.recursion import Injection, RecursionConfig, distribution, draw
from slm_jax.nn.kv_cache import KVCache, slots_of

# Sets the draw of r apart from the layers' own noise, `fold_in(key, i)` for a small i.
_DRAW = 1 << 31

Layers = Callable[[jax.Array, Any, Any, Any], tuple[jax.Array, Any, Any]]
"""Runs stacked periods: (x, blocks, states, keys) -> (x, aux terms, states)."""


def run_recursive(
    config: RecursionConfig,
    inject: Injection,
    layers: Layers,
    x: jax.Array,
    blocks: list[Any],
    states: Any,
    keys: jax.Array | None,
    *,
    positions: jax.Array,
    segments: jax.Array | None,
    key: jax.Array | None,
    dtype: jnp.dtype,
) -> tuple[jax.Array, Any, Any, jax.Array]:
    """Runs all stacked periods of a model: those before the span, the span repeatedly, the rest.

    Args:
        config: which layers, how often.
        inject: the weights between the runs.
        layers: runs some periods once.
        x: `[B, S, embed]`, the embedded tokens.
        blocks: one stacked `Block` a position of the pattern, `[periods, ...]`.
        states: of the unrolled model, `[periods of prelude + repeats x span + coda, ...]`, or a
            `None` a position.
        keys: `[periods, period]` for the layers' noise, or `None`.
        positions: `[B or 1, S]` int32, where the tokens stand.
        segments: `[B, S]` int32 or `None`: padding does not keep the others from stopping.
        key: draws the runs, in training; `None` takes `repeats`, or what the tolerance asks for.
        dtype: compute dtype.

    Returns:
        The residual stream; aux terms `[periods, ...]` a position, those of the span averaged over
        its runs with gradient; the new states; the mean runs a token, `[]` float32.

    Raises:
        UserError: if the states are of another depth.
    """
    periods, period = len(jax.tree.leaves(blocks)[0]), len(blocks)
    first, end = config.first // period, (config.last + 1) // period
    # The span's states end here among those of the unrolled model.
    high = first + config.repeats * (end - first)
    depth = high + periods - end
    held = {len(leaf) for leaf in jax.tree.leaves(states)}
    if held - {depth}:
        raise UserError(
            f"state holds {max(held)} periods, with repeats={config.repeats} it is {depth}: begin "
            "with init_state of the model at this depth"
        )

    def once(x: jax.Array, low: int, high: int, state: int) -> Any:
        """Runs some periods outside the span, whose states begin at `state`."""
        if low == high:
            return x, None, None
        old = _cut(states, state, state + high - low)
        return layers(x, _cut(blocks, low, high), old, _cut(keys, low, high))

    x, prelude_aux, prelude_states = once(x, 0, first, 0)
    span = _Span(config, inject, layers, _cut(blocks, first, end), _cut(keys, first, end), x, dtype)
    old = jax.tree.map(
        lambda a: a[first:high].reshape(config.repeats, end - first, *a.shape[1:]), states
    )
    if key is None and config.tolerance is not None:
        real = jnp.ones_like(x[..., 0], bool) if segments is None else segments > 0
        x, aux, new, runs = _until_settled(span, old, real, positions)
    elif jax.tree.leaves(states):
        x, aux, new, runs = _with_states(span, old)
    else:
        x, aux, new, runs = _differentiable(span, key)
    new = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), new)
    x, coda_aux, coda_states = once(x, end, periods, high)
    aux, states = _join(prelude_aux, aux, coda_aux), _join(prelude_states, new, coda_states)
    return x, aux, states, runs


class _Span(NamedTuple):
    """The shared layers and all that a run of them reads, but the state."""

    config: RecursionConfig
    inject: Injection
    layers: Layers
    blocks: Any
    keys: jax.Array | None
    e: jax.Array
    dtype: jnp.dtype

    @property
    def start(self) -> jax.Array:
        return self.inject.start(self.e)

    @property
    def no_states(self) -> tuple[None, ...]:
        return (None,) * len(self.blocks)

    def run(self, s: jax.Array, i: Any, states: Any) -> tuple[jax.Array, Any, Any]:
        """Run `i` (from 0): state -> new state, aux terms, new decode states."""
        keys = self.keys
        if keys is not None:  # every run has noise of its own
            keys = jax.vmap(jax.vmap(lambda k: jax.random.fold_in(k, i)))(keys)
        x = self.inject.enter(s, self.e, self.dtype)
        x, aux, states = self.layers(x, self.blocks, states, keys)
        return self.inject.leave(x), aux, states

    def no_aux(self, states: Any) -> Any:
        """Zeros in the place of aux terms."""
        shapes = jax.eval_shape(lambda s: self.run(s, 0, states)[1], self.start)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def without_gradient(self) -> "_Span":
        """The same, its arrays constants to differentiation."""
        arrays = jax.lax.stop_gradient((self.inject, self.blocks, self.e))
        return self._replace(inject=arrays[0], blocks=arrays[1], e=arrays[2])


def _differentiable(span: _Span, key: jax.Array | None) -> tuple[jax.Array, Any, Any, jax.Array]:
    """All runs without decode states, the last of them with gradient.

    Those before are a loop of as many turns as were drawn. Those with gradient are a scan of fixed
    length, which leaves out turns when fewer were drawn.
    """
    config = span.config
    drawn = key is not None and config.sampling != "fixed"
    most = len(distribution(config)) if drawn else config.repeats
    with_gradient = min(config.backward or most, most)
    runs: Any = config.repeats
    if drawn:
        assert key is not None
        runs = draw(config, jax.random.fold_in(key, _DRAW))
    before: Any = 0
    s = span.start
    if with_gradient < most:
        constant = span.without_gradient()
        before = jnp.maximum(runs - with_gradient, 0) if drawn else runs - with_gradient
        s = jax.lax.fori_loop(
            0, before, lambda i, s: constant.run(s, i, span.no_states)[0], constant.start
        )

    def turn(s: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
        def run(s: jax.Array) -> tuple[jax.Array, Any]:
            return span.run(s, i, span.no_states)[:2]

        if not drawn:
            return run(s)
        return jax.lax.cond(i < runs, run, lambda s: (s, span.no_aux(span.no_states)), s)

    s, auxes = jax.lax.scan(turn, s, before + jnp.arange(with_gradient))
    aux = jax.tree.map(lambda a: jnp.sum(a, 0) / (runs - before), auxes)
    return s, aux, span.no_states, jnp.asarray(runs, jnp.float32)


def _with_states(span: _Span, states: Any) -> tuple[jax.Array, Any, Any, jax.Array]:
    """Exactly `repeats` runs, each with decode states of its own: `[repeats, ...]`."""

    def turn(s: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        s, aux, new = span.run(s, *xs)
        return s, (aux, new)

    repeats = span.config.repeats
    s, (auxes, new) = jax.lax.scan(turn, span.start, (jnp.arange(repeats), states))
    return s, jax.tree.map(lambda a: jnp.mean(a, 0), auxes), new, jnp.float32(repeats)


def _until_settled(
    span: _Span, states: Any, real: jax.Array, positions: jax.Array
) -> tuple[jax.Array, Any, Any, jax.Array]:
    """Runs until every token has stopped, `repeats` times at most.

    A token stops after run i if |s_i - s_{i-1}| <= tolerance |s_i|; its state stays s_i. It stops
    by itself: what a row gives depends neither on later tokens nor on other rows. Tokens of this
    call that go on see it as the span reads s_i; those of later calls see its last run (`_lend`).
    The loop cannot be differentiated.

    Args:
        span: the layers.
        states: `[repeats, ...]`, or a `None` a position.
        real: `[B, S]` bool, false for padding, which never starts.
        positions: `[B or 1, S]` int32, where the tokens stand.

    Returns:
        As `run_recursive`, but the aux terms and states of the span alone.
    """
    tolerance, repeats = span.config.tolerance, span.config.repeats
    assert tolerance is not None

    def unsettled(carry: Any) -> jax.Array:
        i, _, _, _, going, _ = carry
        return (i == 0) | (i < repeats) & jnp.any(going)

    def turn(carry: Any) -> Any:
        i, s, aux, states, going, counts = carry
        old = jax.tree.map(lambda a: a[i], states)
        new, more, written = span.run(s, i, old)
        change = jnp.sum(jnp.square((new - s).astype(jnp.float32)), -1)
        size = jnp.sum(jnp.square(new.astype(jnp.float32)), -1)
        s = jnp.where(going[..., None], new, s)
        states = jax.tree.map(lambda a, b: a.at[i].set(b), states, written)
        counts = counts + going
        going = going & (change > tolerance**2 * size)
        return i + 1, s, jax.tree.map(jnp.add, aux, more), states, going, counts

    no_aux = span.no_aux(jax.tree.map(lambda a: a[0], states))
    carry = 0, span.start, no_aux, states, real, jnp.zeros_like(real, jnp.int32)
    turns, s, aux, states, _, counts = jax.lax.while_loop(unsettled, turn, carry)
    aux = jax.tree.map(lambda a: a / turns, aux)
    if jax.tree.leaves(states):
        places = jnp.where(real, positions, -1)
        states = tuple(_lend(cache, counts, places) for cache in states)
    mean = jnp.sum(counts) / jnp.maximum(jnp.sum(real), 1)
    return s, aux, states, mean.astype(jnp.float32)


def _lend(cache: KVCache, counts: jax.Array, positions: jax.Array) -> KVCache:
    """Gives the runs that a token of this call did not need the keys and values of its last one.

    Args:
        cache: `[repeats, periods, ...]`, the first run of this call written in any case.
        counts: `[B, S]` int32, the runs of every token.
        positions: `[B, S]` int32, where they stand; -1 for padding.
    """
    runs = jnp.arange(len(cache.k))[:, None]
    slots = slots_of(positions, cache.positions.shape[-1])

    def row(a: jax.Array, slots: jax.Array, counts: jax.Array) -> jax.Array:
        written = a[:, :, slots]  # [repeats, periods, S, ...]
        source = jnp.minimum(runs, jnp.maximum(counts - 1, 0))
        source = source[:, None].reshape(len(a), 1, -1, *(1,) * (a.ndim - 3))
        return a.at[:, :, slots].set(jnp.take_along_axis(written, source, axis=0), mode="drop")

    lent = jax.tree.map(lambda a: jax.vmap(row, (2, 0, 0), 2)(a, slots, counts), cache)
    first = jnp.broadcast_to(cache.positions[:1], cache.positions.shape)
    return lent._replace(positions=first)


def _cut(tree: Any, low: int | None, high: int | None) -> Any:
    return jax.tree.map(lambda a: a[low:high], tree)


def _join(*parts: Any) -> Any:
    """Trees of equal structure along their first axis; a part may be missing."""
    present = [part for part in parts if part is not None]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *present)
