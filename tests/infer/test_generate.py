"""Cached, batched, left-padded generation against plain forward passes."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.infer import Sampling, generate, stream, unrolled
from slm_jax.infer.step import decode, left_pad, prefill
from slm_jax.models.lm import LM
from slm_jax.models.recursion import RecursionConfig
from slm_jax.nn.kv_cache import KVCache
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


def slowly(*names: str) -> list:
    """Cases of the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def assert_close(got: np.ndarray, want: np.ndarray, share: float = 1e-5) -> None:
    """Within a share of the largest logit."""
    np.testing.assert_allclose(got, want, atol=share * np.abs(want).max(), rtol=0)


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
    assert_close(np.stack(steps, axis=1), uncached(name))
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
    assert_close(np.concatenate(logits, 1), forward(model, ids))


@pytest.mark.parametrize("name", ["dense", *slowly("window", "moe", "mamba", "hybrid")])
def test_a_prompt_in_chunks_is_the_prompt(name: str) -> None:
    rows = [tokens(1, n, seed=n)[0] for n in (45, 3, 20)]  # the second begins in the last chunk
    padded, segments = left_pad(rows, chunk=16)
    assert padded.shape == (3, 48)
    whole, state = prefill(model_of(name), padded, segments, 64)
    parts, again = prefill(model_of(name), padded, segments, 64, chunk=16)
    assert_close(parts, whole)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert_close(np.asarray(a), np.asarray(b))
    ids, at = np.array([1, 2, 3]), np.array([45, 3, 20], np.int32)
    assert_close(
        decode(model_of(name), ids, at, again)[0], decode(model_of(name), ids, at, state)[0]
    )


@pytest.mark.parametrize("name", ["dense", *slowly("hybrid")])
def test_an_int8_cache_stays_near_a_float_one(name: str) -> None:
    """Within 4 % of the largest logit, though weights as random as these are sensitive."""
    padded, segments = left_pad(PROMPTS)
    logits, state = prefill(model_of(name), padded, segments, 48, dtype="int8")
    caches = [s for s in (*state["blocks"], *state["tail"]) if isinstance(s, KVCache)]
    assert {(c.k.dtype.name, c.v.dtype.name) for c in caches} == {("int8", "int8")}
    fed = np.array([row[0] for row in greedy(name)])
    step, _ = decode(model_of(name), fed, np.array(LENGTHS, np.int32), state)
    got, want = np.stack([logits, step], 1), uncached(name)[:, :2]
    assert_close(got, want, 0.04)
    assert np.abs(got - want).max() > 1e-4 * np.abs(want).max()  # or it was no int8


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
        (dict(eos_id=[1, VOCAB]), f"eos_id={VOCAB} is not below"),
        (dict(max_new_tokens=[1, 2]), "max_new_tokens has 2 numbers for 1 prompts"),
        (dict(slots=0), "slots=0 must be at least 1"),
        (dict(key=jax.random.split(KEY, 2)), r"key\[2\] for 1 prompts"),
    ],
)
def test_errors_come_at_the_call(change: dict, message: str) -> None:
    arguments = dict(prompts=[[1]], max_new_tokens=1, key=KEY) | change
    with pytest.raises(UserError, match=message):
        stream(model_of("dense"), **arguments)


@pytest.mark.parametrize("name", ["dense", *slowly("hybrid")])
def test_waiting_prompts_take_the_slots_of_finished_rows(name: str) -> None:
    prompts = [tokens(1, n, seed=n)[0] for n in (9, 20, 3, 14, 17)]
    keys, limits = jax.random.split(KEY, 5), [2, 8, 7, 1, 6]
    options = dict(sampling=Sampling(0.9, top_k=9, repetition_penalty=1.2), slots=2)
    steps = np.stack(
        list(stream(model_of(name), prompts, max_new_tokens=limits, key=keys, **options)),
        axis=1,
    )
    assert (steps >= 0).sum(axis=0).max() == 2
    assert steps.shape[1] == 15  # batches of two, one after another, would take 8 + 7 + 6
    rows = [row[row >= 0].tolist() for row in steps]
    assert [len(row) for row in rows] == limits
    alone = dict(options, slots=None)
    for i in (1, 2, 4):
        row = generate(
            model_of(name), [prompts[i]], max_new_tokens=limits[i], key=keys[i : i + 1], **alone
        )
        assert row[0].tolist() == rows[i]


def test_a_row_ends_with_any_of_several_tokens_or_when_told() -> None:
    free = [row.tolist() for row in greedy("dense")]
    ends = [free[0][2], free[1][5]]
    want = [row[: min([i + 1 for i, t in enumerate(row) if t in ends] or [NEW])] for row in free]
    assert sampled(PROMPTS, sampling=GREEDY, eos_id=ends) == want
    assert sampled(PROMPTS, sampling=GREEDY, eos_id=set(ends)) == want
    told: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def stop(row: int, token: int) -> bool:
        told[row].append(token)
        return row == 1 and len(told[1]) == 3

    got = sampled(PROMPTS, sampling=GREEDY, stop=stop)
    assert got == [free[0], free[1][:3], free[2]] == list(told.values())


def test_repetition_penalty_counts_the_prompt_and_what_was_drawn() -> None:
    """A penalty so large that no token comes twice."""
    model = model_of("dense")
    [row] = generate(
        model, [PROMPTS[0]], max_new_tokens=20, key=KEY,
        sampling=Sampling(temperature=0, repetition_penalty=1e6),
    )  # fmt: skip
    assert len({*row.tolist(), *PROMPTS[0].tolist()}) == 20 + len(set(PROMPTS[0].tolist()))


def test_generation_works_with_weights_split_over_devices() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        split = jax.device_put(model_of("hybrid"), shardings(model_of("hybrid"), mesh))
        got = generate(split, PROMPTS, max_new_tokens=NEW, sampling=GREEDY, key=KEY)
    np.testing.assert_array_equal(np.stack(got), np.stack(greedy("hybrid")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "hybrid"])
@pytest.mark.parametrize("cache", [None, "int8"])
def test_generation_works_with_rows_and_heads_split_over_devices(name: str, cache: str) -> None:
    """Four rows at a time over four devices, and the fifth where one has ended."""
    prompts = [*PROMPTS, *PROMPTS[:2]]
    options = dict(
        max_new_tokens=[3, NEW, 5, NEW, NEW], sampling=Sampling(0.8, top_k=8), key=KEY, slots=4,
        cache_dtype=cache,
    )  # fmt: skip
    want = generate(model_of(name), prompts, **options)
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    with jax.set_mesh(mesh):
        split = jax.device_put(model_of(name), shardings(model_of(name), mesh))
        got = generate(split, prompts, **options)
    assert [row.tolist() for row in got] == [row.tolist() for row in want]


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


@pytest.mark.parametrize("name", ["dense", *slowly("moe", "mamba", "hybrid")])
def test_unrolled_layers_give_the_same_tokens(name: str) -> None:
    model = unrolled(model_of(name))
    assert not model.blocks
    assert len(model.tail) == model.config.n_layers
    got = generate(model, PROMPTS, max_new_tokens=NEW, sampling=GREEDY, key=KEY, slots=2)
    for mine, whole in zip(got, greedy(name), strict=True):
        np.testing.assert_array_equal(mine, whole)


def test_unrolled_decoding_copies_no_weight_and_no_cache() -> None:
    """One product a matrix and token, and every cache is written where it is."""
    model = unrolled(model_of("dense"))
    state = model.init_state(1, 32)
    now = np.array([3], np.int32)
    text = decode.lower(model, now, now, state).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert " copy(" not in entry
    assert "dynamic-slice(" not in entry
    assert text.count("may-alias") + text.count("must-alias") == len(jax.tree.leaves(state))


def test_layers_that_repeat_are_not_unrolled() -> None:
    model = jax.eval_shape(
        lambda: LM(replace(model_of("dense").config, recursion=RecursionConfig(0, 1)), KEY)
    )
    with pytest.raises(UserError, match="layers repeat"):
        unrolled(model)
