"""Batched generation: one prefill, then one token a step through the mixers' state."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.errors import UserError
from slm_jax.infer.sampling import Sampling, sample
from slm_jax.models.lm import LM, State

Prompts = Sequence[Sequence[int] | np.ndarray] | np.ndarray | jax.Array

_PLAIN = Sampling()

# Prompt and cache lengths are rounded up to this, so that few programs are compiled.
_ROUND = 16


def generate(
    model: LM,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    sampling: Sampling = _PLAIN,
    eos_id: int | None = None,
    key: jax.Array,
) -> list[np.ndarray]:
    """Continues every prompt.

    Args:
        model: the language model.
        prompts: one sequence of token ids a row, lengths may differ; or a `[B, S]` integer array
            in which -1 is padding.
        max_new_tokens: most tokens to add. There is no limit from `max_seq_len`: caches are sized
            to prompt and continuation.
        sampling: how tokens are drawn.
        eos_id: a row ends with this token; `None` never ends early.
        key: PRNG key; a row's text depends on it, the prompt and the row's index, not on the
            other rows. Not used when greedy.

    Returns:
        The new tokens of every row, int32, the prompt left out, `eos_id` included.

    Raises:
        UserError: on an empty prompt, a token id outside the vocabulary, or max_new_tokens < 1.
    """
    steps = stream(
        model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, eos_id=eos_id, key=key
    )
    return [row[row >= 0] for row in np.stack(list(steps), axis=1)]


def stream(
    model: LM,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    sampling: Sampling = _PLAIN,
    eos_id: int | None = None,
    key: jax.Array,
) -> Iterator[np.ndarray]:
    """As `generate`, but yields `[B]` int32 as the tokens come: -1 for a row that has ended."""
    vocab = model.config.vocab_size
    rows = _rows(prompts, vocab)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if eos_id is not None and not 0 <= eos_id < vocab:
        raise UserError(f"eos_id={eos_id} is not below vocab_size={vocab}: it can never come")
    return _stream(model, rows, max_new_tokens, sampling, eos_id, key)


def _stream(
    model: LM,
    rows: list[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | None,
    key: jax.Array,
) -> Iterator[np.ndarray]:
    tokens, segments = left_pad(rows)
    lengths = np.array([len(row) for row in rows], np.int32)
    capacity = _round_up(tokens.shape[1] + max_new_tokens)
    logits, state = prefill(model, tokens, segments, capacity)
    drawn = _sample(logits, sampling, key, 0)
    ended = np.zeros(len(rows), bool)
    for step in range(max_new_tokens):
        current = drawn
        if step + 1 < max_new_tokens:  # under way while the host reads `current`
            logits, state = decode(model, current, lengths + step, state)
            drawn = _sample(logits, sampling, key, step + 1)
        out = np.where(ended, -1, np.asarray(current))
        yield out
        ended |= out == eos_id
        if ended.all():
            return


def left_pad(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as one array that ends with everyone's last token.

    Args:
        rows: `[length]` integer arrays.

    Returns:
        Tokens and segments (0 = padding, 1 = prompt), `[B, S]` int32; S is a multiple of 16.
    """
    length = _round_up(max(len(row) for row in rows))
    tokens, segments = np.zeros((2, len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        segments[i, length - len(row) :] = 1
    return tokens, segments


@partial(jax.jit, static_argnames="capacity")
def prefill(
    model: LM, tokens: jax.Array, segments: jax.Array, capacity: int
) -> tuple[jax.Array, State]:
    """Reads the prompts.

    Args:
        model: the language model.
        tokens: `[B, S]` int32, padded on the left.
        segments: `[B, S]` int32, 0 = padding, 1 = prompt.
        capacity: tokens the state can hold, padding included.

    Returns:
        Logits after the last token `[B, V]` float32, and the state.
    """
    # Padding gets negative positions, which see and are seen by nothing.
    positions = jnp.cumsum(segments, axis=1) - 1
    empty = model.init_state(tokens.shape[0], capacity)
    x, _, state = model.hidden(tokens, positions=positions, segments=segments, state=empty)
    assert state is not None
    return model.logits(x[:, -1:])[:, 0], state


@partial(jax.jit, donate_argnames="state")
def decode(
    model: LM, tokens: jax.Array, positions: jax.Array, state: State
) -> tuple[jax.Array, State]:
    """Reads one more token a row.

    Args:
        model: the language model.
        tokens: `[B]` int32.
        positions: `[B]` int32, where they stand in their rows.
        state: from `prefill` or the last call; its buffers are reused and it is gone afterwards.

    Returns:
        Logits of the next token `[B, V]` float32, and the new state.
    """
    logits, _, new = model(tokens[:, None], positions=positions[:, None], state=state)
    assert new is not None
    return logits[:, 0], new


_sample = jax.jit(sample, static_argnames="sampling")


def _round_up(n: int) -> int:
    return -(-n // _ROUND) * _ROUND


def _rows(prompts: Prompts, vocab_size: int) -> list[np.ndarray]:
    """Checks the prompts; one integer array a row, padding removed."""
    rows = [np.asarray(row) for row in prompts]
    if isinstance(prompts, np.ndarray | jax.Array) and prompts.ndim == 2:
        rows = [row[row != -1] for row in rows]
    if not rows:
        raise UserError("prompts=[] is empty: give at least one")
    for i, row in enumerate(rows):
        if row.size == 0:
            raise UserError(f"prompts[{i}] is empty: begin it with a token, such as the eos_id")
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise UserError(
                f"prompts[{i}] is {row.dtype}{list(row.shape)}: give a flat sequence of token ids"
            )
        bad = row[(row < 0) | (row >= vocab_size)]
        if bad.size:
            raise UserError(
                f"prompts[{i}] holds token id {bad[0]}, outside vocab_size={vocab_size}: "
                "was it encoded with this model's tokenizer?"
            )
    return rows
