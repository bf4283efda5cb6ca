"""Caches of every golden case: prefill and steps give the logits of the full pass."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from slm_jax.models.lm import LM, State, default_positions
from tests.golden.cases import CASES, LENGTH, NEW_TOKENS, VARIANTS
from tests.models.hf_golden import Case, assert_close, full, opened, quick_jit

STATEFUL = ("llama", "mistral", "gemma2", "mamba", "jamba")  # one of each kind of state


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with opened(request.param) as case:
        yield case


@quick_jit
def step(
    model: LM, tokens: jax.Array, positions: jax.Array, segments: jax.Array, state: State
) -> tuple[jax.Array, State]:
    """Logits of the next tokens and the extended state."""
    logits, _, state = model(tokens, positions=positions, segments=segments, state=state)
    return logits, state


def run(
    model: LM, tokens: np.ndarray, segments: np.ndarray, chunks: list[int]
) -> tuple[np.ndarray, State]:
    """Logits of `tokens` fed through a cache in chunks, and the last state."""
    assert sum(chunks) == tokens.shape[1]
    positions = np.asarray(default_positions(tokens.shape[1], jax.numpy.asarray(segments)))
    state, logits, start = model.init_state(len(tokens), LENGTH + NEW_TOKENS), [], 0
    for size in chunks:
        at = slice(start, start + size)
        out, state = step(model, tokens[:, at], positions[:, at], segments[:, at], state)
        logits.append(np.asarray(out))
        start += size
    return np.concatenate(logits, axis=1), state


def comparable(case: Case) -> int:
    """Tokens over which a cache can give the logits of the full pass.

    With dynamic NTK no further than the frequencies stay as they are: cached keys keep those of
    the step that wrote them.
    """
    return case.models["init"].config.max_seq_len if case.name == "llama-dynamic" else LENGTH


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_and_steps(case: Case, variant: str) -> None:
    """The prefill is longer than the windows of 8."""
    model, tokens, length = case.models[variant], case.golden[variant]["tokens"], comparable(case)
    segments = np.ones_like(tokens)
    segments[:, length:] = 0
    want = np.asarray(full(model, tokens, segments))[:, :length]
    chunks = [9] + [1] * (length - 9)
    logits, _ = run(model, tokens[:, :length], segments[:, :length], chunks)
    assert_close(logits, want)


def test_chunks_of_padded_rows(case: Case) -> None:
    """The first chunk of 5 is nothing but padding in row 0, the next wrap around the windows."""
    model, length = case.models["reinit"], comparable(case)
    tokens, segments = (case.golden["reinit"][f"padded_{key}"].copy() for key in ("tokens", "mask"))
    segments[:, length:] = 0
    want = np.asarray(full(model, tokens, segments))[:, :length]
    tokens, segments = tokens[:, :length], segments[:, :length]
    prefill = [5, 5, 5] if case.name in STATEFUL else [9]  # 9 is compiled already
    logits, _ = run(model, tokens, segments, prefill + [1] * (length - sum(prefill)))
    assert_close(logits[segments == 1], want[segments == 1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens(case: Case, variant: str) -> None:
    model, golden = case.models[variant], case.golden[variant]
    tokens, ones = golden["tokens"], np.ones_like(golden["tokens"])
    # transformers fills its cache in one call, which matters for dynamic NTK only.
    chunks = [LENGTH] if case.name == "llama-dynamic" else [9, 9, 1, 1, 1, 1, 1, 1]
    logits, state = run(model, tokens, ones, chunks)
    generated = [logits[:, -1].argmax(-1)]
    for position in range(LENGTH, LENGTH + NEW_TOKENS - 1):
        at = np.full((len(tokens), 1), position, np.int32)
        last = generated[-1][:, None].astype(np.int32)
        logits, state = step(model, last, at, ones[:, :1], state)
        generated.append(np.asarray(logits)[:, -1].argmax(-1))
    np.testing.assert_array_equal(np.stack(generated, axis=1), golden["generated"])
