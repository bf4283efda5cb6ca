"""Steps that must not be taken: a loss or gradient that is no number, a loss far above the rest.

The decision is made and carried out inside the compiled step, by selection: 0 x NaN is NaN, so a
bad update multiplied by zero would destroy the weights all the same.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 128
"""Good steps whose losses are remembered."""
ENOUGH = 32
"""Of them before the first step is judged."""


class Losses(NamedTuple):
    """The losses of the last good steps.

    Attributes:
        values: `[WINDOW]` float32, a ring.
        seen: `[]` int32, good steps so far.
    """

    values: jax.Array
    seen: jax.Array


def no_losses() -> Losses:
    """Before the first step."""
    return Losses(jnp.zeros(WINDOW), jnp.zeros((), jnp.int32))


def is_bad(loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """Whether the loss or the gradient of a step is not finite: `[]` bool."""
    return ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))


def is_spike(losses: Losses, loss: jax.Array, sigma: float) -> jax.Array:
    """Whether a loss is more than `sigma` standard deviations above the mean of the last ones.

    A deviation below a thousandth of the mean counts as that: a loss that hardly moves has no
    spikes. `[]` bool.
    """
    known = jnp.arange(WINDOW) < losses.seen
    n = jnp.maximum(jnp.sum(known), 1)
    mean = jnp.sum(losses.values * known) / n
    deviation = jnp.sqrt(jnp.sum(jnp.square(losses.values - mean) * known) / n)
    limit = mean + sigma * jnp.maximum(deviation, 1e-3 * jnp.abs(mean))
    return (losses.seen >= ENOUGH) & (loss > limit)


def remember(losses: Losses, loss: jax.Array) -> Losses:
    """With one more good step."""
    return Losses(losses.values.at[losses.seen % WINDOW].set(loss), losses.seen + 1)


def unless[T](bad: jax.Array, new: T, old: T) -> T:
    """The new tree, or every bit of the old one if the step is bad."""
    return jax.tree.map(lambda n, o: jnp.where(bad, o, n), new, old)
