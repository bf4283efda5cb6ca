"""Which experts a token goes to, and with what weight. Always in float32."""

from typing import Literal

import jax
import jax.numpy as jnp


def route(
    logits: jax.Array,
    top_k: int,
    routing: Literal["renormalised", "softmax", "sparsemixer"],
    *,
    bias: jax.Array | None = None,
    key: jax.Array | None = None,
    jitter_eps: float = 0.01,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses `top_k` experts a token.

    Args:
        logits: `[..., experts]` float32.
        top_k: choices a token.
        routing: see `MoEConfig.routing`.
        bias: `[experts]` added to the probabilities for the choice only, never to the weights.
        key: PRNG key for sparsemixer's training noise; `None` is its deterministic form.
        jitter_eps: see `MoEConfig.jitter_eps`.

    Returns:
        Weights `[..., top_k]` float32, experts `[..., top_k]` int32, and the softmax over all
        experts `[..., experts]` that the load-balance term uses.
    """
    logits = logits.astype(jnp.float32)
    probs = jax.nn.softmax(logits, axis=-1)
    if routing == "sparsemixer":
        weights, experts = _sparsemixer(logits, key, jitter_eps)
        return weights, experts, probs
    preference = probs if bias is None else probs + jax.lax.stop_gradient(bias)
    _, experts = jax.lax.top_k(preference, top_k)
    weights = _pick(probs, experts)
    if routing == "renormalised":
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, experts, probs


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[..., index], as a masked sum: a gather along a batch-split array is refused."""
    hit = index[..., None] == jnp.arange(values.shape[-1])
    return jnp.sum(jnp.where(hit, values[..., None, :], 0.0), axis=-1)


def _sparsemixer(
    logits: jax.Array, key: jax.Array | None, jitter_eps: float
) -> tuple[jax.Array, jax.Array]:
    """Two successive top-1 choices, each weighted by a softmax over its close competitors.

    SparseMixer-v2 (arXiv 2409.12136, section 3). The two weights do not sum to one. In training
    the choice is sampled and its forward weight is x 1, or x 1/3 for three quarters of the samples
    that miss the arg-max (Heun's third-order estimate); the gradient is that of the plain weight.
    """
    n = logits.shape[-1]
    keys = [None, None] if key is None else list(jax.random.split(key))
    candidates, weights, experts = logits, [], []
    for step_key in keys:
        top = jnp.max(candidates, axis=-1, keepdims=True)
        best = jnp.argmax(candidates, axis=-1)
        distance = (top - logits) / jnp.maximum(jnp.abs(logits), top)
        masked = jnp.where(distance > 2 * jitter_eps, -jnp.inf, candidates)
        probs = jax.nn.softmax(masked, axis=-1)
        choice = best
        if step_key is not None:
            gumbel, coin = jax.random.split(step_key)
            choice = jnp.argmax(masked + jax.random.gumbel(gumbel, masked.shape), axis=-1)
        weight = _pick(probs, choice[..., None])[..., 0]
        if step_key is not None:
            full = (choice == best) | (jax.random.uniform(coin, choice.shape) > 0.75)
            scaled = weight * jnp.where(full, 1.0, 1.0 / 3.0)
            weight = weight + jax.lax.stop_gradient(scaled - weight)
        weights.append(weight)
        experts.append(choice.astype(jnp.int32))
        candidates = jnp.where(choice[..., None] == jnp.arange(n), -jnp.inf, candidates)
    return jnp.stack(weights, axis=-1), jnp.stack(experts, axis=-1)
