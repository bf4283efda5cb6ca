"""What the user gives to generation, checked."""

from collections.abc import Collection, Sequence

import jax
import numpy as np

from slm_jax.errors import UserError

Prompts = Sequence[Sequence[int] | np.ndarray] | np.ndarray | jax.Array
"""One sequence of token ids a row, lengths may differ; or `[B, S]` integers, -1 for padding."""

Eos = int | Collection[int] | None
"""The tokens that end a row: one, several, or none."""


def rows_of(prompts: Prompts, vocab_size: int) -> list[np.ndarray]:
    """One integer array a row, padding removed.

    Raises:
        UserError: on no prompt, an empty one, or a token id outside the vocabulary.
    """
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


def eos_of(eos_id: Eos, vocab_size: int) -> np.ndarray:
    """The tokens that end a row, `[n]` int32.

    Raises:
        UserError: if one is outside the vocabulary.
    """
    ids = [eos_id] if isinstance(eos_id, int | np.integer) else list(eos_id or ())
    for i in ids:
        if not 0 <= i < vocab_size:
            raise UserError(f"eos_id={i} is not below vocab_size={vocab_size}: it can never come")
    return np.array(ids, np.int32)


def limits_of(max_new_tokens: int | Sequence[int], rows: int) -> np.ndarray:
    """Most tokens to add to each row, `[B]`.

    Raises:
        UserError: if they are not as many as rows, or one is below 1.
    """
    limits = np.atleast_1d(np.asarray(max_new_tokens))
    if len(limits) not in (1, rows):
        raise UserError(
            f"max_new_tokens has {len(limits)} numbers for {rows} prompts: give one, or one a row"
        )
    if limits.min() < 1:
        raise UserError(f"max_new_tokens={limits.min()} must be at least 1")
    return np.broadcast_to(limits, rows)


def keys_of(key: jax.Array, rows: int) -> jax.Array:
    """One PRNG key a row, `[B]`.

    Args:
        key: `[]`, from which row i gets `fold_in(key, i)`, or `[B]`, a row's own each.
        rows: B.

    Raises:
        UserError: on another number of keys.
    """
    if key.ndim == 0:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(rows))
    if key.shape != (rows,):
        raise UserError(f"key{list(key.shape)} for {rows} prompts: give one key, or one a row")
    return key
