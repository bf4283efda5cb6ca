"""Next-token loss, optionally without ever holding the logits of the whole batch."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.parallel.rules import lead_spec, split_rows, token_parts


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) in nats: `[..., V]` float32 and `[...]` int32 to `[...]` float32.

    A masked sum instead of a gather, so that the vocabulary may be split over devices.
    """
    hit = targets[..., None] == jnp.arange(logits.shape[-1])
    picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def next_token_loss(
    model: LM,
    batch: Mapping[str, jax.Array],
    *,
    chunk: int | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Sum of the next-token losses and of their weights.

    Args:
        model: the language model.
        batch: `tokens`, `targets` `[B, S]` int32, `weights` `[B, S]` float32, and optionally
            `segments` and `positions` `[B, S]` int32.
        chunk: tokens of each row whose logits exist at one time (recomputed in the backward
            pass); `None` takes the whole row at once.
        key: PRNG key for training noise, or `None`.

    Returns:
        Sum of weight x nats `[]`, sum of weights `[]`, the model's aux terms.

    Raises:
        UserError: if S is not a multiple of `chunk`, or one of them not of the devices that the
            tokens of a row are split over.
    """
    x, aux, _ = model.hidden(
        batch["tokens"],
        positions=batch.get("positions"),
        segments=batch.get("segments"),
        key=key,
    )
    targets, weights = split_rows((batch["targets"], batch["weights"].astype(jnp.float32)))

    def total(x: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(cross_entropy(model.logits(x), targets) * weights)

    if chunk is None:
        return total(x, targets, weights), jnp.sum(weights), aux
    length = x.shape[1]
    if chunk < 1 or length % chunk:
        raise UserError(f"chunk={chunk} does not divide seq_len={length}: choose a divisor")
    parts = token_parts(x)
    if chunk % parts:
        raise UserError(
            f"chunk={chunk} is not a multiple of the {parts} devices that a row is split over: "
            f"choose one that is, and divides seq_len={length}"
        )

    def split(a: jax.Array) -> jax.Array:
        """`[B, S, ...]` to `[S / chunk, B, chunk, ...]`: of every device's tokens as many."""
        rows, rest = a.shape[0], a.shape[2:]
        if parts == 1:
            return jnp.moveaxis(a.reshape(rows, length // chunk, chunk, *rest), 1, 0)
        batch, seq, *others = lead_spec(a, a.ndim)
        a = jnp.reshape(
            a,
            (rows, parts, length // chunk, chunk // parts, *rest),
            out_sharding=P(batch, seq, None, None, *others),
        )
        return jnp.reshape(
            jnp.moveaxis(a, 2, 0),
            (length // chunk, rows, chunk, *rest),
            out_sharding=P(None, batch, seq, *others),
        )

    chunked = jax.checkpoint(total)
    sums, _ = jax.lax.scan(
        lambda acc, xs: (acc + chunked(*xs), None),
        jnp.zeros(()),
        (split(x), split(targets), split(weights)),
    )
    return sums, jnp.sum(weights), aux
