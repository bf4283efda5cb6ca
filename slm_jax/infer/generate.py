"""Batched generation: prompts of different lengths, and new prompts in the place of finished rows.

A batch has slots. Each step decodes all of them; a slot whose row has ended takes the next waiting
prompt, which is read alone and put in its place. What a row gives depends on its prompt and its key
only: not on its slot, nor on when it began, nor on the other rows.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from slm_jax.errors import UserError
from slm_jax.infer.prompts import Eos, Prompts, eos_of, keys_of, limits_of, rows_of
from slm_jax.infer.sampling import Sampling
from slm_jax.infer.step import (
    CHUNK,
    decode,
    decode_until_sure,
    draw,
    left_pad,
    prefill,
    put_row,
    round_up,
    tokens_seen,
)
from slm_jax.models.early_exit import check_early_exit
from slm_jax.models.lm import LM

Stop = Callable[[int, int], bool]
"""Is told every token, (row, token), in order; true ends the row with it."""

_PLAIN = Sampling()


@dataclass
class EarlyExit:
    """Decoding leaves out layers where it is sure without them, and counts those it took.

    Attributes:
        threshold: the lead of the likeliest token in probability, above 0, at which a token exits
            (`slm_jax.models.early_exit`); above 1 none does.
        tokens: read by decoding so far; those of the prompts take all layers.
        layers: that they took.
    """

    threshold: float
    tokens: int = 0
    layers: int = 0

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise UserError(f"threshold={self.threshold} must be above 0; above 1 nothing exits")


def generate(
    model: LM, prompts: Prompts, *, max_new_tokens: int | Sequence[int], **options: Any
) -> list[np.ndarray]:
    """Continues every prompt.

    Arguments and errors as in `stream`.

    Returns:
        The new tokens of every row, int32, the prompt left out, what ended it included.
    """
    steps = list(stream(model, prompts, max_new_tokens=max_new_tokens, **options))
    return [row[row >= 0] for row in np.stack(steps, axis=1)]


def stream(
    model: LM,
    prompts: Prompts,
    *,
    max_new_tokens: int | Sequence[int],
    key: jax.Array,
    sampling: Sampling = _PLAIN,
    eos_id: Eos = None,
    stop: Stop | None = None,
    slots: int | None = None,
    cache_dtype: Any = None,
    chunk: int = CHUNK,
    early_exit: EarlyExit | None = None,
) -> Iterator[np.ndarray]:
    """As `generate`, but yields the tokens as they come.

    Args:
        model: the language model.
        prompts: one sequence of token ids a row, lengths may differ; or a `[B, S]` integer array
            in which -1 is padding.
        max_new_tokens: most tokens to add, for all rows or one number a row. There is no limit from
            `max_seq_len`: caches are sized to prompt and continuation.
        key: PRNG key, from which row i has `fold_in(key, i)`; or `[B]` keys, a row's own each. Not
            used when greedy.
        sampling: how tokens are drawn.
        eos_id: a row ends with this token, or one of these; `None` never ends early.
        stop: told every token; ends a row when it returns true.
        slots: most rows decoded at a time; `None` is all.
        cache_dtype: of keys and values, such as "int8"; default the compute dtype.
        chunk: tokens of a prompt read at a time.
        early_exit: when to leave layers out; is told how many were taken.

    Yields:
        `[B]` int32: the next token of every row, -1 for one that has ended or waits.

    Raises:
        UserError: on an empty prompt, a token id outside the vocabulary, numbers below 1, or a
            model that cannot leave layers out.
    """
    if early_exit is not None:
        check_early_exit(model)
    vocab = model.config.vocab_size
    rows = rows_of(prompts, vocab)
    limits = limits_of(max_new_tokens, len(rows))
    ends, keys = eos_of(eos_id, vocab), keys_of(key, len(rows))
    for name, value in (("slots", slots), ("chunk", chunk)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    lengths = np.array([len(row) for row in rows], np.int32)
    capacity = round_up(int(np.max(lengths + limits)))
    n_slots = min(slots or len(rows), len(rows))
    counts = np.zeros(len(rows), np.int32)  # tokens drawn and read

    def begin(who: Sequence[int]) -> dict[str, Any]:
        """The batch of some rows after their prompts and the first token."""
        prompts = [rows[i] for i in who]
        padded, segments = left_pad(prompts, chunk)
        logits, state = prefill(model, padded, segments, capacity, dtype=cache_dtype, chunk=chunk)
        seen = tokens_seen(prompts, vocab, sampling)
        first, seen = draw(logits, sampling, keys, np.array(who), counts[who], seen)
        layers = np.zeros(len(who), np.int32)  # none of decoding
        return {"state": state, "seen": seen, "tokens": first, "layers": layers}

    def advance(batch: dict[str, Any], owner: np.ndarray, places: np.ndarray) -> dict[str, Any]:
        """The batch one token later."""
        now, state, layers = batch["tokens"], batch["state"], batch["layers"]
        if early_exit is None:
            logits, state = decode(model, now, places, state)
        else:
            threshold = np.float32(early_exit.threshold)
            logits, state, layers = decode_until_sure(model, now, places, state, threshold)
        token, seen = draw(logits, sampling, keys, owner, counts[owner], batch["seen"])
        return {"state": state, "seen": seen, "tokens": token, "layers": layers}

    def run() -> Iterator[np.ndarray]:
        owner = np.arange(n_slots)  # the row in each slot, -1 for none
        waiting = deque(range(n_slots, len(rows)))
        batch = begin(owner.tolist())
        while (owner >= 0).any():
            live, now, layers = owner >= 0, batch["tokens"], batch["layers"]
            counts[owner[live]] += 1
            more = live & (counts[owner] < limits[owner])
            if more.any():  # under way while the host reads `now`
                places = np.where(live, lengths[owner] + counts[owner] - 1, -1)
                batch = advance(batch, owner, places)
            read = np.asarray(now)
            out = np.full(len(rows), -1, np.int32)
            out[owner[live]] = read[live]
            if early_exit is not None:
                taken = np.asarray(layers)[live]
                early_exit.tokens += int(np.sum(taken > 0))
                early_exit.layers += int(np.sum(taken))
            yield out
            ended = ~more | np.isin(read, ends)
            if stop is not None:
                told = [live[s] and stop(int(owner[s]), int(read[s])) for s in range(n_slots)]
                ended |= np.array(told)
            owner[ended] = -1
            for slot in np.flatnonzero(owner < 0):
                if waiting:
                    owner[slot] = waiting.popleft()
                    batch = put_row(batch, begin([owner[slot]]), slot)

    return run()
