"""Tokens that leave the layers early, against a loop in Python without caches."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.infer import EarlyExit, Sampling, generate
from slm_jax.infer.step import decode, decode_until_sure, prefill
from slm_jax.models.early_exit import check_early_exit
from slm_jax.models.lm import LM
from slm_jax.models.recursion import RecursionConfig
from tests.nn.tiny import tiny_lm, tokens

LAYERS, LENGTH, NEW = 4, 6, 5
KEY = jax.random.key(0)
# About half of the tokens are as sure as this before the last layer.
THRESHOLD = 0.2


@cache
def lm(name: str) -> LM:
    return tiny_lm(name, n_layers=LAYERS)


@jax.jit
def layer(block: Any, x: jax.Array) -> jax.Array:
    """All tokens of `[B, S, embed]` through one layer, without a cache."""
    positions = jnp.arange(x.shape[1])[None]
    return block(x, positions=positions, segments=None, dtype=jnp.float32)[0]


@jax.jit
def judged(model: LM, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = model.logits(model.final_norm(x))[0, -1]
    best = jnp.sort(jax.nn.softmax(logits))
    return logits, best[-1] - best[-2]


def by_hand(model: LM, ids: np.ndarray, threshold: float) -> tuple[np.ndarray, list[int]]:
    """Logits of the tokens after the first LENGTH, and the layers that each took.

    `inputs[i]` is what layer i reads of every token; one that has left goes up as it is.
    """
    blocks = [jax.tree.map(lambda a, i=i: a[i], model.blocks[0]) for i in range(LAYERS)]
    inputs = [model.embedded(ids[None, :LENGTH])]
    for block in blocks[:-1]:
        inputs.append(layer(block, inputs[-1]))
    out, counts = [], []
    for t in range(LENGTH, len(ids)):
        x, taken = model.embedded(ids[None, t : t + 1]), LAYERS
        for i, block in enumerate(blocks):
            inputs[i] = jnp.concatenate([inputs[i], x], axis=1)
            if i < taken:
                x = layer(block, jnp.pad(inputs[i], ((0, 0), (0, LENGTH + NEW - t - 1), (0, 0))))
                x = x[:, t : t + 1]
                logits, lead = judged(model, x)
                taken = i + 1 if lead >= threshold else taken
        out.append(np.asarray(logits))
        counts.append(taken)
    return np.stack(out), counts


def stepped(model: LM, ids: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, Any]:
    """Logits `[B, NEW, V]` and layers `[B, NEW]` by decoding, and the last state."""
    prompt = ids[:, :LENGTH]
    _, state = prefill(model, prompt, np.ones_like(prompt), LENGTH + NEW)
    out, counts = [], []
    for t in range(LENGTH, LENGTH + NEW):
        at = np.full(len(ids), t, np.int32)
        logits, state, taken = decode_until_sure(model, ids[:, t], at, state, threshold)
        out.append(np.asarray(logits))
        counts.append(np.asarray(taken))
    return np.stack(out, 1), np.stack(counts, 1), state


@pytest.mark.parametrize("name", ["dense", pytest.param("window", marks=pytest.mark.slow)])
def test_tokens_leave_and_are_remembered_as_in_a_loop(name: str) -> None:
    ids = tokens(2, LENGTH + NEW, seed=3)
    logits, counts, _ = stepped(lm(name), ids, THRESHOLD)
    assert 1 <= counts.min() < counts.max() == LAYERS  # or the test shows nothing
    for row in range(2):
        want, taken = by_hand(lm(name), ids[row], THRESHOLD)
        assert counts[row].tolist() == taken
        np.testing.assert_allclose(logits[row], want, atol=1e-5 * np.abs(want).max())


def test_a_threshold_above_one_is_the_whole_model() -> None:
    ids = tokens(2, LENGTH + NEW, seed=3)
    logits, counts, state = stepped(lm("dense"), ids, 1.01)
    assert (counts == LAYERS).all()
    prompt = ids[:, :LENGTH]
    _, whole = prefill(lm("dense"), prompt, np.ones_like(prompt), LENGTH + NEW)
    for t in range(NEW):
        at = np.full(2, LENGTH + t, np.int32)
        want, whole = decode(lm("dense"), ids[:, LENGTH + t], at, whole)
        np.testing.assert_allclose(logits[:, t], want, atol=1e-6 * np.abs(want).max())
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), state, whole)


@pytest.mark.slow
def test_generation_counts_the_layers_of_every_row_by_itself() -> None:
    prompts = [tokens(1, n, seed=n)[0] for n in (3, 9, 5)]
    options = dict(max_new_tokens=[6, 3, 5], sampling=Sampling(temperature=0), key=KEY, slots=2)
    together = EarlyExit(THRESHOLD)
    rows = generate(lm("dense"), prompts, early_exit=together, **options)
    assert together.tokens == 5 + 2 + 4  # the first of each row is the prompt's
    assert together.tokens < together.layers < LAYERS * together.tokens
    options["max_new_tokens"] = 6
    alone = EarlyExit(THRESHOLD)
    [row] = generate(lm("dense"), prompts[:1], early_exit=alone, **options)
    assert row.tolist() == rows[0].tolist()
    assert alone.tokens == 5
    plain = generate(lm("dense"), prompts, **options)
    never = EarlyExit(2.0)
    full = generate(lm("dense"), prompts, early_exit=never, **options)
    assert [r.tolist() for r in full] == [r.tolist() for r in plain]
    assert never.layers == LAYERS * never.tokens


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: lm("mamba"), "early exit over a MambaConfig"),
        (lambda: tiny_lm("dense", recursion=RecursionConfig(0, 1)), "recursion.tolerance"),
        (
            lambda: tiny_lm("dense", n_layers=3, pattern=lm("dense").config.pattern * 2),
            "n_layers=3 and a pattern of 2",
        ),
    ],
)
def test_what_cannot_leave_layers_out_is_refused(model: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_early_exit(model())
    with pytest.raises(UserError, match="threshold=0 must be above 0"):
        EarlyExit(0)
