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
stops as soon as one more repeat changes its state by little. `recursion_run` does all this.

Every repeat has a decode state of its own, so that decoding step by step equals one pass over the
row: a model of r repeats has the state of the model unrolled. A token that stopped early lends the
keys and values of its last repeat to the deeper ones, where later tokens may look for them.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.errors import UserError
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.linear import Linear
from slm_jax.nn.norm import Norm, NormConfig

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
