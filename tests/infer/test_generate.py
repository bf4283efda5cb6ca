"""Cached, batched, left-padded generation against plain forward passes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.infer import Sampling, generate, stream
from slm_jax.infer.generate import decode, left_pad, prefill
from slm_jax.models.lm import LM
from slm_jax.nn.attention import KVCache
from slm_jax.parallel import MeshConfig, make_mesh, shard_batch, shardings
from tests.nn.tiny import VOCAB, WINDOW, tiny_lm, tokens

GREEDY = Sampling(temperature=0)
KEY = jax.random.key(0)
NEW = 8
LENGTHS = (3, 20, 9)
PROMPTS = [tokens(1, n, seed=n)[0] for n in LENGTHS]
ARCHITECTURES = ["dense", "window", "moe", "mamba", "hybrid"]

forward = jax.jit(lambda model, tokens: model(tokens)[0])
model_of = cache(tiny_lm)


@cache
def greedy(name: str) -> tuple[np.ndarray, ...]:
    return tuple(generate(model_of(name), PROMPTS, max_new_tokens=NEW, sampling=GREEDY, key=KEY))


@cache
def uncached(name: str) -> np.ndarray:
    """Logits `[B, NEW, V]` that chose each token: one forward pass, no state, no left padding."""
    rows = [np.concatenate(pair) for pair in zip(PROMPTS, greedy(name), strict=True)]
    width = max(LENGTHS) + NEW
    padded = np.stack([np.pad(row, (0, width - len(row))) for row in rows])  # the end is not seen
    logits = np.asarray(forward(model_of(name), padded))
    return np.stack([logits[i, n - 1 : n - 1 + NEW] for i, n in enumerate(LENGTHS)])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_the_argmax_of_full_forward_passes(name: str) -> None:
    assert [len(row) for row in greedy(name)] == [NEW] * 3
    np.testing.assert_array_equal(np.stack(greedy(name)), np.argmax(uncached(name), axis=-1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_full_forward_passes(name: str) -> None:
    padded, segments = left_pad(PROMPTS)
    logits, state = prefill(model_of(name), padded, segments, 48)
    steps = [np.asarray(logits)]
    for i in range(NEW - 1):
        fed = np.array([row[i] for row in greedy(name)])
        logits, state = decode(model_of(name), fed, np.array(LENGTHS, np.int32) + i, state)
        steps.append(np.asarray(logits))
    np.testing.assert_allclose(np.stack(steps, axis=1), uncached(name), atol=1e-4, rtol=0)
    caches = [s for s in (*state["blocks"], *state["tail"]) if isinstance(s, KVCache)]
    slots = WINDOW.window if name in ("window", "hybrid") else 48  # a ring is as long as its window
    assert all(c.positions.shape[-1] == slots for c in caches)


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_a_prompt_alone_gives_what_it_gives_in_a_batch(name: str) -> None:
    prompt = [PROMPTS[2]]  # alone it is padded by 7, here by 23
    [alone] = generate(model_of(name), prompt, max_new_tokens=NEW, sampling=GREEDY, key=KEY)
    np.testing.assert_array_equal(alone, greedy(name)[2])


@jax.jit
def continued(model: LM, ids: jax.Array, start: jax.Array, state):
    positions = start + jnp.arange(ids.shape[1])[None]
    logits, _, state = model(ids, positions=positions, state=state)
    return logits, state


@pytest.mark.parametrize("name", ["dense", "hybrid"])
@pytest.mark.parametrize("chunk", [2, 7])  # shorter than the convolution; longer than the window
def test_chunked_prefill_is_one_prefill(name: str, chunk: int) -> None:
    model, ids = model_of(name), tokens(2, 28)
    state, logits = model.init_state(2, 28), []
    for start in range(0, 28, chunk):
        part, state = continued(model, ids[:, start : start + chunk], start, state)
        logits.append(part)
    np.testing.assert_allclose(np.concatenate(logits, 1), forward(model, ids), atol=1e-4, rtol=0)


def sampled(prompts: list[np.ndarray], key: jax.Array = KEY, **kwargs) -> list[list[int]]:
    rows = generate(model_of("dense"), prompts, max_new_tokens=NEW, key=key, **kwargs)
    return [row.tolist() for row in rows]


def test_sampled_text_depends_on_key_and_row_not_on_neighbours() -> None:
    text = sampled(PROMPTS)
    assert text == sampled(PROMPTS)
    assert text != sampled(PROMPTS, jax.random.key(1))
    others = sampled([PROMPTS[1], PROMPTS[1], PROMPTS[0]])
    assert others[1] == text[1]
    assert others[0] != others[1]  # two rows with one prompt draw their own texts


def test_a_row_ends_with_eos_and_the_others_go_on() -> None:
    free = [row.tolist() for row in greedy("dense")]
    eos = free[0][3]
    ended = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert len(ended[0]) <= 4
    assert max(map(len, ended)) > len(ended[0])  # or the test shows nothing
    assert sampled(PROMPTS, sampling=GREEDY, eos_id=eos) == ended


def test_stream_yields_tokens_as_they_come_and_stops_when_all_have_ended() -> None:
    free = np.stack(greedy("dense"))
    eos = int(free[0, 3])
    row = PROMPTS[0]
    steps = stream(model_of("dense"), [row, PROMPTS[1]], max_new_tokens=NEW, sampling=GREEDY,
                   eos_id=eos, key=KEY)  # fmt: skip
    got = np.stack(list(steps), axis=1)
    first = free[0].tolist().index(eos)
    np.testing.assert_array_equal(got[0, : first + 1], free[0, : first + 1])
    assert (got[0, first + 1 :] == -1).all()
    np.testing.assert_array_equal(got[1], free[1, : got.shape[1]])
    lone = stream(
        model_of("dense"), [row], max_new_tokens=NEW, sampling=GREEDY, eos_id=eos, key=KEY
    )
    assert len(list(lone)) == first + 1


def test_padded_array_is_its_rows() -> None:
    array = np.full((3, max(LENGTHS) + 2), -1)
    for i, p in enumerate(PROMPTS):
        array[i, i : i + len(p)] = p  # padding on either side
    assert sampled(array, sampling=GREEDY) == [row.tolist() for row in greedy("dense")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts=[]), "prompts=.. is empty"),
        (dict(prompts=[[1], []]), r"prompts\[1\] is empty"),
        (dict(prompts=[[1, VOCAB]]), f"token id {VOCAB}, outside vocab_size={VOCAB}"),
        (dict(prompts=[[-1, 2]]), "token id -1, outside"),
        (dict(prompts=[[0.5]]), r"prompts\[0\] is float64\[1\]"),
        (dict(prompts=np.array([1, 2])), r"prompts\[0\] is int64\[\]"),
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(eos_id=VOCAB), f"eos_id={VOCAB} is not below"),
    ],
)
def test_errors_come_at_the_call(change: dict, message: str) -> None:
    arguments = dict(prompts=[[1]], max_new_tokens=1, key=KEY) | change
    with pytest.raises(UserError, match=message):
        stream(model_of("dense"), **arguments)


def test_generation_works_with_weights_split_over_devices() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        split = jax.device_put(model_of("hybrid"), shardings(model_of("hybrid"), mesh))
        got = generate(split, PROMPTS, max_new_tokens=NEW, sampling=GREEDY, key=KEY)
    np.testing.assert_array_equal(np.stack(got), np.stack(greedy("hybrid")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_state_is_split_over_devices_as_the_rows_are(name: str) -> None:
    mesh, model = make_mesh(MeshConfig(data=2, fsdp=4)), model_of(name)
    padded, segments = left_pad([tokens(1, 9, seed=i)[0] for i in range(8)])
    fed, places = padded[:, -1], np.full(8, 9, np.int32)
    _, state = prefill(model, padded, segments, 32)
    want, _ = decode(model, fed, places, state)
    with jax.set_mesh(mesh):
        split = jax.device_put(model, shardings(model, mesh))
        rows = shard_batch(dict(tokens=padded, segments=segments, fed=fed), mesh)
        _, state = prefill(split, rows["tokens"], rows["segments"], 32)
        got, _ = decode(split, rows["fed"], places, state)
    assert got.sharding.shard_shape(got.shape) == (1, VOCAB)
    np.testing.assert_allclose(got, want, atol=1e-5)
