"""Logits, gradients, caches and causality of every golden case against `transformers`.

Few programs are compiled, and without LLVM's optimisations, which cost more than they save here.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from slm_jax.models.hf import load_hf, tensor_map, to_hf
from slm_jax.models.lm import LM, State, default_positions
from slm_jax.models.loss import cross_entropy
from slm_jax.nn.attention import AttentionConfig
from tests.golden.cases import CASES, LENGTH, VARIANTS

GOLDEN = Path(__file__).parent.parent / "golden"
MAX_LEN = 64

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Case(NamedTuple):
    """The two models of one golden case and their golden tensors, by variant."""

    name: str
    models: dict[str, LM]
    golden: dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    folders = {variant: GOLDEN / f"{request.param}-{variant}" for variant in VARIANTS}
    with jax.default_matmul_precision("highest"):
        yield Case(
            request.param,
            {variant: load_hf(folder) for variant, folder in folders.items()},
            {v: load_file(folder / "golden.safetensors") for v, folder in folders.items()},
        )


@quick_jit
def full(model: LM, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """Logits of one pass without a cache."""
    return model(tokens, segments=segments)[0]


@quick_jit
def step(
    model: LM, tokens: jax.Array, positions: jax.Array, segments: jax.Array, state: State
) -> tuple[jax.Array, State]:
    """Logits of the next tokens and the extended state."""
    logits, _, state = model(tokens, positions=positions, segments=segments, state=state)
    return logits, state


@quick_jit
def gradient(
    model: LM, tokens: jax.Array, direction: jax.Array, ce_weight: jax.Array
) -> tuple[LM, jax.Array]:
    """Gradient of ce_weight x mean next-token CE + direction . hidden, and the logits."""

    def objective(model: LM) -> tuple[jax.Array, jax.Array]:
        x, _, _ = model.hidden(tokens)
        logits = model.logits(x)
        ce = jnp.mean(cross_entropy(logits[:, :-1], tokens[:, 1:]))
        return ce_weight * ce + jnp.sum(x * direction), logits

    return jax.grad(objective, has_aux=True)(model)


def run(model: LM, tokens: np.ndarray, segments: np.ndarray, chunks: list[int]) -> Any:
    """Logits of `tokens` fed through a cache in chunks, and the last state."""
    positions = np.broadcast_to(default_positions(tokens.shape[1], segments), tokens.shape)
    state, logits, start = model.init_state(len(tokens), MAX_LEN), [], 0
    for size in chunks:
        at = slice(start, start + size)
        out, state = step(model, tokens[:, at], positions[:, at], segments[:, at], state)
        logits.append(np.asarray(out))
        start += size
    assert start == tokens.shape[1]
    return np.concatenate(logits, axis=1), state


def assert_close(have: Any, want: np.ndarray, *, relative: float = 1e-5) -> None:
    """Max-abs at most 1e-4 and at most `relative` of the largest magnitude wanted."""
    error = np.abs(np.asarray(have) - want).max()
    assert error <= min(1e-4, relative * np.abs(want).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(case: Case, variant: str) -> None:
    model, golden = case.models[variant], case.golden[variant]
    zero = jnp.zeros((*golden["tokens"].shape, model.config.d_model))
    _, logits = gradient(model, golden["tokens"], zero, 1.0)
    assert_close(logits, golden["logits"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padding_changes_nothing(case: Case, variant: str) -> None:
    golden = case.golden[variant]
    mask = golden["padded_mask"]
    logits = full(case.models[variant], golden["padded_tokens"], mask)
    real = mask == 1
    assert_close(np.asarray(logits)[real], golden["padded_logits"][real])


def test_gradients(case: Case) -> None:
    model, golden = case.models["reinit"], case.golden["reinit"]
    zero = jnp.zeros((*golden["tokens"].shape, model.config.d_model))
    grads, _ = gradient(model, golden["tokens"], zero, 1.0)
    config = json.loads((GOLDEN / f"{case.name}-reinit" / "config.json").read_text())
    ours = to_hf(grads, tensor_map(grads, config["model_type"]))
    wanted = {k.removeprefix("grad."): v for k, v in golden.items() if k.startswith("grad.")}
    assert set(wanted) == set(CASES[case.name].grads)
    for name, want in wanted.items():
        error = np.abs(ours[name] - want).max()
        assert error <= 2e-5 * np.abs(want).max(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_cache_gives_the_logits_of_the_full_pass(case: Case, variant: str) -> None:
    model, golden = case.models[variant], case.golden[variant]
    length = LENGTH
    if case.name == "llama-dynamic":
        # Beyond this, cached keys keep the frequencies of the step that wrote them.
        length = model.config.max_seq_len
    segments = np.ones_like(golden["tokens"])
    segments[:, length:] = 0
    want = np.asarray(full(model, golden["tokens"], segments))[:, :length]
    chunks = [9] + [1] * (length - 9)
    logits, _ = run(model, golden["tokens"][:, :length], segments[:, :length], chunks)
    assert_close(logits, want)


def test_cache_in_chunks_of_padded_rows(case: Case) -> None:
    """Chunks of 5 wrap around a window of 8; the first is nothing but padding in row 0."""
    model, golden = case.models["reinit"], case.golden["reinit"]
    tokens, segments, length = golden["padded_tokens"], golden["padded_mask"].copy(), LENGTH
    if case.name == "llama-dynamic":
        length = model.config.max_seq_len
        segments[:, length:] = 0
    want = np.asarray(full(model, tokens, segments))
    chunks = [5, 5, 5] + [1] * (length - 15)
    logits, _ = run(model, tokens[:, :length], segments[:, :length], chunks)
    real = segments[:, :length] == 1
    assert_close(logits[real], want[:, :length][real])


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens(case: Case, variant: str) -> None:
    model, golden = case.models[variant], case.golden[variant]
    tokens, ones = golden["tokens"], np.ones_like(golden["tokens"])
    # transformers fills its cache in one call, which matters for dynamic NTK only.
    chunks = [LENGTH] if case.name == "llama-dynamic" else [9, 9, 1, 1, 1, 1, 1, 1]
    logits, state = run(model, tokens, ones, chunks)
    generated = [logits[:, -1].argmax(-1)]
    for position in range(LENGTH, LENGTH + golden["generated"].shape[1] - 1):
        at = np.full((len(tokens), 1), position, np.int32)
        next_token = generated[-1][:, None].astype(np.int32)
        logits, state = step(model, next_token, at, ones[:, :1], state)
        generated.append(np.asarray(logits)[:, -1].argmax(-1))
    np.testing.assert_array_equal(np.stack(generated, axis=1), golden["generated"])


def test_no_gradient_from_the_future(case: Case) -> None:
    """d hidden[t] / d embedding of later tokens, and of another row's, is exactly zero."""
    model = case.models["reinit"]
    tokens = np.stack([np.arange(LENGTH), np.full(LENGTH, LENGTH)]).astype(np.int32)
    direction = np.random.default_rng(0).standard_normal(model.config.d_model)
    layers = [model.config.layer(i).mixer for i in range(model.config.n_layers)]
    windows = [m.window if isinstance(m, AttentionConfig) else None for m in layers]
    reach = LENGTH if None in windows else sum(w - 1 for w in windows if w is not None)
    for t in (0, 7, LENGTH - 2):
        where = np.zeros((*tokens.shape, model.config.d_model), np.float32)
        where[0, t] = direction
        grads, _ = gradient(model, tokens, where, 0.0)
        rows = np.abs(np.asarray(grads.embed.w[...])).max(axis=-1)
        first = max(0, t - reach)
        assert (rows[first : t + 1] > 0).all()
        assert not rows[t + 1 :].any()
        assert not rows[:first].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_long_rope_switches_its_factors(variant: str) -> None:
    folder = GOLDEN / f"phi3-longrope-{variant}"
    golden = load_file(folder / "golden.safetensors")
    tokens = golden["tokens_long"]
    with jax.default_matmul_precision("highest"):
        logits = full(load_hf(folder), tokens, np.ones_like(tokens))
    assert_close(logits, golden["logits_long"])
