"""Recurrent depth: a span of a language model's layers that runs again and again.

    prelude     e = layers before the span (token embeddings)
    repeats     s_i = norm(span(inject(s_{i-1}, e))),  s_0 = 0,  i = 1 ... r
    coda        layers after the span (s_r), final norm, head

as in arXiv 2502.05171 (section 3), whose adapter is `injection="concat"`. With `injection="none"`
it is s_0 = e, s_i = span(s_{i-1}): layers with tied weights (Universal Transformer, arXiv
1807.03819, without its time signal). The paper starts from random states; here s_0 = 0, so that a
model is a function of its tokens.

Training draws r anew in every microbatch (`distribution`), one number for all rows and devices,
and differentiates through the last `backward` repeats. Without a key, which is evaluation and
generation, r is `repeats`, whatever it was in training (`LM.at_depth`). With `tolerance` a token
stops as soon as one more repeat changes its state by little (`_until_settled`).

Every repeat has a decode state of its own, so that decoding step by step equals one pass over the
row: a model of r repeats has the state of the model unrolled. A token that stopped early lends the
keys and values of its last repeat to the deeper ones, where later tokens may look for them.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.errors import UserError
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.kv_cache import KVCache, slots_of
from slm_jax.nn.linear import Linear
from slm_jax.nn.norm import Norm, NormConfig

Layers = Callable[[jax.Array, Any, Any, Any], tuple[jax.Array, Any, Any]]
"""Runs stacked periods: (x, blocks, states, keys) -> (x, aux terms, states)."""

# Sets the draw of r apart from the layers' own noise, `fold_in(key, i)` for a small i.
_DRAW = 1 << 31

_SIGMA = 0.5  # of the log-normal rate, arXiv 2502.05171, section 3.3


@dataclass(frozen=True)
class RecursionConfig:
    """Which layers are run repeatedly, and how often. Layers are counted from 0."""

    first: int
    """First layer of the shared span: the beginning of a period of the pattern."""
    last: int
    """Last layer of the span, itself included: the end of a period."""
    repeats: int = 4
    """Runs of the span without a key (evaluation, generation); in training their mean."""
    sampling: Literal["fixed", "uniform", "poisson"] = "fixed"
    """How training draws the runs: always `repeats`; 1 to 2 repeats - 1; or log-normal Poisson, at
    most 4 repeats (`distribution`)."""
    backward: int | None = None
    """Last runs that the gradient passes through; `None` is all of them."""
    injection: Literal["none", "add", "concat"] = "concat"
    """How a run sees the span's input: not at all, added to the state, or by a matrix over both."""
    tolerance: float | None = None
    """Without a key a token stops when a run changes its state by less than this share of its
    length; `None` always takes all `repeats`."""

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise UserError(
                f"recursion.first={self.first} and last={self.last}: give 0 <= first <= last"
            )
        for name in ("repeats", "backward"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"recursion.{name}={value} must be at least 1")
        if self.tolerance is not None and not self.tolerance > 0:
            raise UserError(
                f"recursion.tolerance={self.tolerance} must be above 0, or None to never stop early"
            )
        if self.sampling != "fixed" and self.repeats == 1:
            raise UserError(
                f"recursion.sampling={self.sampling!r} with repeats=1 has nothing to draw: raise "
                "repeats or choose fixed"
            )
        if self.injection == "none" and self.backward is not None:
            raise UserError(
                f"recursion.backward={self.backward} with injection='none' would train nothing "
                "below the span: choose injection add or concat, or leave backward at None"
            )

    def check(self, n_layers: int, pattern: tuple[LayerConfig, ...]) -> None:
        """Checks the span against the layers of a model.

        Raises:
            UserError: if the span is not made of whole periods, or stops early over layers whose
                decode state is not a KV cache.
        """
        period = len(pattern)
        if self.last >= n_layers or self.first % period or (self.last + 1) % period:
            raise UserError(
                f"recursion.first={self.first}, last={self.last} must be whole periods of "
                f"{period} within n_layers={n_layers}: first and last + 1 are multiples of {period}"
            )
        if self.tolerance is not None:
            for mixer in (layer.mixer for layer in pattern):
                if not isinstance(mixer, AttentionConfig):
                    raise UserError(
                        f"recursion.tolerance={self.tolerance} over a {type(mixer).__name__}: only "
                        "attention can lend a token's state to deeper runs: leave it at None"
                    )

    def shares(self, layer: int) -> bool:
        """Whether a layer is one of the span."""
        return self.first <= layer <= self.last


@functools.cache
def distribution(config: RecursionConfig) -> np.ndarray:
    """Probabilities of 1, 2, ... runs in a training step, `[most]` float64.

    `uniform` has the mean `repeats` exactly. `poisson` is 1 + Poisson(rate), log rate normal with
    sigma 1/2 and E[rate] = repeats - 1 (arXiv 2502.05171, section 3.3, has E[rate] = repeats), cut
    at 4 repeats, which takes less than 1 % off the mean.
    """
    mean = config.repeats
    if config.sampling == "fixed":
        return np.eye(mean)[-1]
    if config.sampling == "uniform":
        return np.full(2 * mean - 1, 1 / (2 * mean - 1))
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)  # of the normal density
    log_rate = math.log(mean - 1) - _SIGMA**2 / 2 + _SIGMA * nodes[:, None]
    n = np.arange(4 * mean)
    log_factorial = np.array([math.lgamma(i + 1) for i in n])
    p = weights @ np.exp(n * log_rate - np.exp(log_rate) - log_factorial)
    return p / p.sum()


def draw(config: RecursionConfig, key: jax.Array) -> jax.Array:
    """Runs of one training step: `[]` int32, distributed as `distribution` says."""
    below = jnp.asarray(np.cumsum(distribution(config))[:-1], jnp.float32)
    return 1 + jnp.sum(jax.random.uniform(key) >= below, dtype=jnp.int32)


class ExpectedRuns(NamedTuple):
    """Mean runs of the span in a training step.

    Attributes:
        forward: all of them.
        backward: those that the gradient passes through.
    """

    forward: float
    backward: float


def expected_runs(config: RecursionConfig) -> ExpectedRuns:
    """Mean runs of the span in a training step, exactly, for counting operations."""
    p = distribution(config)
    runs = np.arange(1, len(p) + 1)
    through = runs if config.backward is None else np.minimum(runs, config.backward)
    return ExpectedRuns(float(p @ runs), float(p @ through))


class Injection(nnx.Module):
    """What a run of the span begins and ends with.

    Attributes:
        adapter: `[2 embed, embed]` over state and input, or `None`.
        norm: of the state after a run, or `None`.
    """

    def __init__(
        self,
        kind: Literal["none", "add", "concat"],
        d_model: int,
        norm: NormConfig,
        *,
        key: jax.Array,
    ) -> None:
        sizes = {"embed": 2 * d_model, "latent": d_model}
        self.kind = kind
        self.adapter = Linear("embed -> latent", sizes, key=key) if kind == "concat" else None
        self.norm = None if kind == "none" else Norm(norm, d_model)

    def start(self, e: jax.Array) -> jax.Array:
        """The state before the first run, `[B, S, embed]` as the span's input `e` is."""
        return e if self.kind == "none" else jnp.zeros_like(e)

    def enter(self, s: jax.Array, e: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """What the span's first layer reads; the adapter computes in `dtype`."""
        if self.kind == "none":
            return s
        if self.adapter is None:
            return s + e
        return self.adapter(jnp.concatenate([s, e], -1).astype(dtype), out_dtype=e.dtype)

    def leave(self, x: jax.Array) -> jax.Array:
        """The new state from what the span's last layer wrote."""
        return x if self.norm is None else self.norm(x)


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
