"""Speculative decoding: a small model drafts tokens, the model reads them all in one pass.

With the model's distribution p and the draft's q (after penalty, temperature and filters, which
both share), a drafted token x stays with probability min(1, p(x) / q(x)). The first that does not
is drawn again from max(p - q, 0), normalised; if all stay, one more comes from p. Every token is
then distributed as p alone would have drawn it (arXiv 2211.17192, theorem in appendix A; also
2302.01318), and greedy decoding gives the model's own tokens.

Rejected tokens are taken back by writing over them: the KV cache keeps the token at position p in
slot p % capacity. A recurrent state has no such slots, so models with one are refused.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.errors import UserError
from slm_jax.infer.generate import Stop
from slm_jax.infer.prompts import Eos, Prompts, eos_of, keys_of, limits_of, rows_of
from slm_jax.infer.sampling import Sampling, penalised, probabilities
from slm_jax.infer.step import (
    CHUNK,
    draw,
    left_pad,
    on_all_devices,
    over_devices,
    prefill,
    round_up,
    tokens_seen,
)
from slm_jax.models.lm import LM, State
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.moe import MoEConfig

_PLAIN = Sampling()


class Round(NamedTuple):
    """What one pass of the model gave.

    Attributes:
        tokens: `[B, n_draft + 1]` int32, new tokens of every row from the left, -1 for none.
        drafted: tokens that were drafted for rows that had not ended.
        accepted: how many of them stayed.
    """

    tokens: np.ndarray
    drafted: int
    accepted: int


def speculate(
    model: LM,
    draft: LM,
    prompts: Prompts,
    *,
    max_new_tokens: int | Sequence[int],
    key: jax.Array,
    n_draft: int = 4,
    sampling: Sampling = _PLAIN,
    eos_id: Eos = None,
    stop: Stop | None = None,
    cache_dtype: Any = None,
    chunk: int = CHUNK,
) -> Iterator[Round]:
    """Continues every prompt as `stream` would, several tokens a pass of the model.

    The tokens are other draws than those of `stream` with the same key, from the same distribution.

    Args:
        model: the model whose text it is.
        draft: a smaller one with the same vocabulary.
        prompts: as in `stream`, and so are
        max_new_tokens: and
        key: a row's own randomness.
        n_draft: tokens drafted for each pass.
        sampling: how tokens are drawn, by both models.
        eos_id: what ends a row, and so does
        stop: which may be told no more of a row once it has ended.
        cache_dtype: of both caches.
        chunk: tokens of a prompt read at a time.

    Yields:
        The new tokens of a pass, until all rows have ended.

    Raises:
        UserError: as `stream`; if the vocabularies differ, or a model has a recurrent state.
    """
    vocab = model.config.vocab_size
    if draft.config.vocab_size != vocab:
        raise UserError(
            f"draft: vocab_size={draft.config.vocab_size}, the model's is {vocab}: both must be "
            "of one tokenizer"
        )
    if n_draft < 1:
        raise UserError(f"n_draft={n_draft} must be at least 1")
    _check("model", model)
    _check("draft", draft)
    rows = rows_of(prompts, vocab)
    limits = limits_of(max_new_tokens, len(rows))
    ends, keys = set(eos_of(eos_id, vocab).tolist()), keys_of(key, len(rows))
    lengths = np.array([len(row) for row in rows], np.int32)
    # The last pass may go n_draft tokens beyond the limit.
    capacity = round_up(int(np.max(lengths + limits)) + n_draft)

    def run() -> Iterator[Round]:
        padded, segments = left_pad(rows, chunk)
        options: dict[str, Any] = dict(dtype=cache_dtype, spare=n_draft, chunk=chunk)
        logits, state = prefill(model, padded, segments, capacity, **options)
        _, draft_state = prefill(draft, padded, segments, capacity, **options)
        counts = np.zeros(len(rows), np.int32)
        seen = tokens_seen(rows, vocab, sampling)
        last, seen = draw(logits, sampling, keys, np.arange(len(rows)), counts, seen)
        tokens = np.full((len(rows), n_draft + 1), -1, np.int32)
        tokens[:, 0] = last
        kept = np.ones(len(rows), np.int32)
        live = np.ones(len(rows), bool)
        drafted = accepted = 0
        while True:
            for i in np.flatnonzero(live):
                n = min(int(kept[i]), int(limits[i] - counts[i]))
                for j in range(n):
                    token = int(tokens[i, j])
                    if token in ends or (stop is not None and stop(int(i), token)):
                        n, live[i] = j + 1, False
                        break
                tokens[i, n:] = -1
                counts[i] += n
                live[i] &= counts[i] < limits[i]
            yield Round(tokens, drafted, accepted)
            if not live.any():
                return
            # `last` stands at this position and has not been read.
            places = np.where(live, lengths + counts - 1, -1)
            new, n_kept, last, state, draft_state, seen = _pass(
                model, draft, last, places, keys, counts, state, draft_state, seen,
                n_draft, sampling,
            )  # fmt: skip
            tokens, kept = np.array(new), np.asarray(n_kept)
            tokens[~live] = -1
            drafted = n_draft * int(live.sum())
            accepted = int((kept[live] - 1).sum())

    return run()


def _check(name: str, lm: LM) -> None:
    """Refuses a model for which several tokens in one call, or taken back, are not the same."""
    for layer in lm.config.pattern:
        if not isinstance(layer.mixer, AttentionConfig):
            raise UserError(
                f"{name}: {type(layer.mixer).__name__} has a recurrent state, which cannot take "
                "rejected tokens back: use models of attention layers, or no draft"
            )
        if isinstance(layer.channel, MoEConfig) and layer.channel.dispatch == "capacity":
            raise UserError(
                f"{name}: dispatch='capacity' drops other tokens when several are read at once: "
                "set dispatch='dropless', or use no draft"
            )
    recursion = lm.config.recursion
    if recursion is not None and recursion.tolerance is not None:
        raise UserError(
            f"{name}: recursion.tolerance={recursion.tolerance} lets tokens that are read at once "
            "see one another before they have stopped: set it to None, or use no draft"
        )


@partial(
    jax.jit,
    static_argnames=("n_draft", "sampling"),
    donate_argnames=("state", "draft_state", "seen"),
)
def _pass(
    model: LM,
    draft: LM,
    last: jax.Array,
    places: jax.Array,
    keys: jax.Array,
    counts: jax.Array,
    state: State,
    draft_state: State,
    seen: jax.Array | None,
    n_draft: int,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array, jax.Array, State, State, jax.Array | None]:
    """Drafts, reads, and keeps what may stay.

    Args:
        model: the model.
        draft: the one that drafts.
        last: `[B]` int32, the last token of each row, which neither has read.
        places: `[B]` int32, where it stands; -1 is a row that no one reads.
        keys: `[B]` PRNG keys, one a row.
        counts: `[B]` int32, tokens that the row has drawn so far: a pass has its own randomness.
        state: of the model.
        draft_state: of the draft.
        seen: `[B, V]` bool, tokens that the row has, or `None` where nothing is penalised.
        n_draft: tokens to draft.
        sampling: how tokens are drawn, by both.

    Returns:
        New tokens `[B, n_draft + 1]` int32, how many of them are valid `[B]` (1 at least), the last
        of these `[B]`, the new states, and `seen` with them.
    """
    keys = jax.vmap(jax.random.fold_in)(keys, counts)
    vocab = model.config.vocab_size

    def propose(carry: Any, i: jax.Array) -> tuple[Any, Any]:
        token, state, seen = carry
        at = jnp.where(places >= 0, places + i, -1)
        logits, state = _logits(draft, token[:, None], at[:, None], state)
        q = probabilities(penalised(logits[:, 0], seen, sampling), sampling)
        token = _choose(jax.vmap(jax.random.fold_in, (0, None))(keys, 2 * i), q)
        if seen is not None:
            seen = seen | (jnp.arange(vocab) == token[:, None])
        return (token, state, seen), (token, q, seen)

    # The step after the last drafted token is there to read it, should it stay.
    carry = (last, draft_state, seen)
    (_, draft_state, _), (drafted, q, after) = jax.lax.scan(propose, carry, jnp.arange(n_draft + 1))
    drafted, q = drafted[:-1].T, jnp.moveaxis(q[:-1], 0, 1)  # [B, n_draft], [B, n_draft, V]

    read = jnp.concatenate([last[:, None], drafted], axis=1)
    at = jnp.where(places[:, None] >= 0, places[:, None] + jnp.arange(n_draft + 1), -1)
    logits, state = _logits(model, read, at, state)
    if seen is not None and after is not None:
        before = jnp.concatenate([seen[:, None], jnp.moveaxis(after[:-1], 0, 1)], axis=1)
    else:
        before = None
    p = probabilities(penalised(logits, before, sampling), sampling)  # [B, n_draft + 1, V]

    def of(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, drafted[..., None], axis=-1)[..., 0]

    chance = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1), (n_draft,)))(keys)
    stays = chance * of(q) < of(p[:, :-1])
    kept = jnp.sum(jnp.cumprod(stays.astype(jnp.int32), axis=1), axis=1)
    # After the last that stays: what p has and q has not; behind all drafted tokens q is nothing.
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
    p_next, q_next = (jnp.take_along_axis(x, kept[:, None, None], axis=1)[:, 0] for x in (p, q))
    rest = jnp.maximum(p_next - q_next, 0)
    # p = q up to rounding leaves nothing, and then rejects by rounding alone.
    rest = jnp.where(jnp.sum(rest, -1, keepdims=True) > 0, rest, p_next)
    extra = _choose(jax.vmap(lambda k: jax.random.fold_in(k, 3))(keys), rest)
    index = jnp.arange(n_draft + 1)
    tokens = jnp.where(index == kept[:, None], extra[:, None], jnp.pad(drafted, ((0, 0), (0, 1))))
    if seen is not None:
        new = (tokens[..., None] == jnp.arange(vocab)) & (index <= kept[:, None])[..., None]
        seen = seen | jnp.any(new, axis=1)
    return tokens, kept + 1, extra, state, draft_state, seen


def _logits(
    lm: LM, tokens: jax.Array, positions: jax.Array, state: State
) -> tuple[jax.Array, State]:
    """Logits `[B, S, V]` of `[B, S]` more tokens, and the new state."""
    tokens, positions = over_devices(tokens, positions)
    logits, _, new = lm(tokens, positions=positions, state=state)
    assert new is not None
    return on_all_devices(logits), new


def _choose(keys: jax.Array, weights: jax.Array) -> jax.Array:
    """One token a row, `[B]` int32, as likely as `weights` `[B, V]` say; any sum will do."""
    return jax.vmap(jax.random.categorical)(keys, jnp.log(weights)).astype(jnp.int32)
