"""Early exit: a token leaves the layers as soon as the model is sure of the next one.

After every period of layers the head reads the residual stream. Where the likeliest next token
leads the second by at least the threshold in probability, the token is done: its state stays what
it is, and each layer above keeps the keys and values that it makes of that state, so that later
tokens find it in every cache ("softmax response" and "state propagation" of CALM, arXiv
2207.07061). A token exits by itself, whatever the other rows do. Layers are left out, but for their
keys and values, when all rows have exited; what is sure is paid for by a pass of the head a period.

For models trained with a loss at the last layer only, the lower layers are seldom sure, and the
threshold is to be chosen on held-out text.
"""

from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.errors import UserError
from slm_jax.models.lm import LM, State
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import Block


def check_early_exit(model: LM) -> None:
    """Refuses a model that cannot leave layers out.

    Raises:
        UserError: if layers are not attention, repeat, or do not make whole periods.
    """
    config = model.config
    for layer in config.pattern:
        if not isinstance(layer.mixer, AttentionConfig):
            raise UserError(
                f"early exit over a {type(layer.mixer).__name__}: only attention can keep a token "
                "without computing its layer: leave the threshold out"
            )
    if config.recursion is not None:
        raise UserError("early exit with recursion: use recursion.tolerance, which stops repeats")
    if config.n_layers % len(config.pattern):
        raise UserError(
            f"early exit with n_layers={config.n_layers} and a pattern of {len(config.pattern)}: "
            "exits are between whole periods: choose a multiple"
        )


def step_until_sure(
    model: LM, tokens: jax.Array, positions: jax.Array, state: State, threshold: jax.Array
) -> tuple[jax.Array, State, jax.Array]:
    """One more token a row, through as many layers as it needs.

    Args:
        model: a model that `check_early_exit` passes.
        tokens: `[B, 1]` int32.
        positions: `[B, 1]` int32, -1 for a row that no one reads.
        state: as of the whole model.
        threshold: `[]`, the lead in probability that makes sure; above 1 nothing does.

    Returns:
        Logits `[B, V]` float32 of each row's last layer, the new state of all layers, and the
        layers that each row took, `[B]` int32.
    """
    blocks, period = list(model.blocks), len(model.config.pattern)
    periods = model.config.n_layers // period
    dtype = jnp.dtype(model.config.dtype)

    def one_period(i: Any, x: jax.Array, caches: Any, sure: jax.Array) -> tuple[jax.Array, Any]:
        for j, block in enumerate(_at(blocks, i)):
            y, _, cache = block(
                x, positions=positions, segments=None, state=_at(caches[j], i), dtype=dtype
            )
            x = jnp.where(sure[:, None, None], x, y)
            caches = _put(caches, j, i, cache)
        return x, caches

    def judged(x: jax.Array, sure: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(model.final_norm(x, dtype))[:, 0]
        best = jax.lax.top_k(jax.nn.softmax(logits), 2)[0]
        return logits, sure | (best[:, 0] - best[:, 1] >= threshold)

    def turn(carry: Any) -> Any:
        i, x, caches, sure, _, layers = carry
        layers = layers + jnp.where(sure, 0, period)
        x, caches = one_period(i, x, caches, sure)
        logits, sure = judged(x, sure)
        return i + 1, x, caches, sure, logits, layers

    def unsure(carry: Any) -> jax.Array:
        return (carry[0] < periods) & ~jnp.all(carry[3])

    def keep(carry: Any) -> Any:
        i, x, caches = carry
        for j, block in enumerate(_at(blocks, i)):
            cache = _remembered(block, x, positions, _at(caches[j], i), dtype)
            caches = _put(caches, j, i, cache)
        return i + 1, x, caches

    unread = positions[:, 0] < 0
    x, caches = one_period(0, model.embedded(tokens), state["blocks"], jnp.zeros_like(unread))
    logits, sure = judged(x, unread)
    carry = jnp.int32(1), x, caches, sure, logits, jnp.full_like(positions[:, 0], period)
    i, x, caches, _, logits, layers = jax.lax.while_loop(unsure, turn, carry)
    _, _, caches = jax.lax.while_loop(lambda c: c[0] < periods, keep, (i, x, caches))
    return logits, {"blocks": caches, "tail": ()}, layers


def _remembered(
    block: Block, x: jax.Array, positions: jax.Array, cache: Any, dtype: jnp.dtype
) -> Any:
    """The cache of a layer that is left out, with the keys and values that it makes of `x`."""
    h = x.astype(dtype) if block.mixer_norm is None else block.mixer_norm(x, dtype)
    return block.mixer.remember(h, positions, cache)


def _at(tree: Any, i: Any) -> Any:
    """Layer `i` of stacked ones."""
    return jax.tree.map(lambda a: a[i], tree)


def _put(caches: tuple[Any, ...], j: int, i: Any, cache: Any) -> tuple[Any, ...]:
    """The stacked caches with layer `i` of position `j` replaced."""
    new = jax.tree.map(lambda a, b: a.at[i].set(b), caches[j], cache)
    return (*caches[:j], new, *caches[j + 1 :])
