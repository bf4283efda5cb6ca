"""Layers that repeat: against plain loops, unrolled models, and with every token's own depth."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slm_jax.errors import UserError
from slm_jax.infer.step import decode, left_pad, prefill
from slm_jax.models.flops import forward_flops, training_flops
from slm_jax.models.hf import config_to_hf
from slm_jax.models.lm import LM, LMConfig
from slm_jax.models.loss import next_token_loss
from slm_jax.models.presets import dense
from slm_jax.models.recursion import RecursionConfig, distribution, draw, expected_runs
from slm_jax.nn.parametrization import MuPConfig
from tests.nn.tiny import PATTERNS, tiny_config, tiny_lm, tokens

LENGTH = 12
# Layers 1 and 2 of four repeat; of the hybrid, whose period is two, layers 2 and 3 of five.
SPANS = {"dense": (4, 1, 2), "window": (4, 1, 2), "moe": (4, 1, 2), "hybrid": (5, 2, 3)}


@cache
def looped(name: str, **recursion: Any) -> LM:
    n_layers, first, last = SPANS[name]
    config = RecursionConfig(first, last, **{"repeats": 3} | recursion)
    return tiny_lm(name, n_layers=n_layers, recursion=config)


@jax.jit
def forward(model: LM, ids: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    logits, aux, _ = model(ids)
    return logits, aux


@jax.jit
def loss_and_gradient(model: LM, batch: Any, key: jax.Array | None = None) -> Any:
    """((loss, runs), gradient)."""

    def loss(model: LM) -> tuple[jax.Array, jax.Array]:
        total, _, aux = next_token_loss(model, batch, key=key)
        return total, aux.get("recursion_runs", jnp.ones(()))

    return jax.value_and_grad(loss, has_aux=True)(model)


def batch() -> dict[str, np.ndarray]:
    ids = tokens(2, LENGTH + 1)
    return dict(tokens=ids[:, :-1], targets=ids[:, 1:], weights=np.ones((2, LENGTH)))


def assert_close(got: Any, want: Any, rtol: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=rtol * max(1e-3, np.abs(b).max()), rtol=0)


def copies(model: LM) -> np.ndarray:
    """Periods of the unrolled model, by their number in `model`."""
    recursion, period = model.config.recursion, len(model.config.pattern)
    first, end = recursion.first // period, (recursion.last + 1) // period
    span = [*range(first, end)] * recursion.repeats
    return np.array([*range(first), *span, *range(end, model.config.n_layers // period)])


def unrolled(model: LM) -> LM:
    """An ordinary model with a copy of the shared layers for every run."""
    config = model.config
    added = (config.recursion.repeats - 1) * (config.recursion.last - config.recursion.first + 1)
    plain = replace(config, n_layers=config.n_layers + added, recursion=None)
    flat = jax.eval_shape(lambda key: LM(plain, key), jax.random.key(0))
    flat.embed, flat.tail, flat.final_norm = model.embed, model.tail, model.final_norm
    flat.blocks = jax.tree.map(lambda a: a[copies(model)], model.blocks)
    return flat


def test_without_injection_it_is_a_deep_model_with_tied_weights() -> None:
    model = looped("dense", injection="none")
    flat = unrolled(model)
    (loss, _), gradient = loss_and_gradient(model, batch())
    (flat_loss, _), flat_gradient = loss_and_gradient(flat, batch())
    np.testing.assert_allclose(loss, flat_loss, rtol=1e-6)

    def summed(copied: jax.Array, shared: jax.Array) -> np.ndarray:
        return np.asarray(jnp.zeros_like(shared).at[copies(model)].add(copied))

    assert_close(gradient.blocks, jax.tree.map(summed, flat_gradient.blocks, gradient.blocks))
    assert_close(gradient.embed, flat_gradient.embed)
    shapes = [jax.tree.map(jnp.shape, m.init_state(2, 8)) for m in (model, flat)]
    assert shapes[0] == shapes[1]


@partial(jax.jit, static_argnames=("runs", "constant"))
def by_hand(model: LM, ids: np.ndarray, runs: int, constant: int = 0) -> jax.Array:
    """Logits by a loop in Python; the first `constant` runs are constants to the gradient."""
    recursion, dtype = model.config.recursion, jnp.float32
    positions = jnp.arange(ids.shape[1])[None]
    blocks = [jax.tree.map(lambda a, i=i: a[i], model.blocks[0]) for i in range(4)]

    def layers(x: jax.Array, which: range, blocks: Any = blocks) -> jax.Array:
        for i in which:
            x = blocks[i](x, positions=positions, segments=None, dtype=dtype)[0]
        return x

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * scale

    e = layers(model.embed.w[...][ids], range(1))
    s = jnp.zeros_like(e)
    for i in range(runs):
        stop = jax.lax.stop_gradient if i < constant else lambda x: x
        d = e.shape[-1]
        if recursion.injection == "add":
            x = s + stop(e)
        else:
            w = stop(model.inject.adapter.w[...])
            x = s @ w[:d] + stop(e) @ w[d:]
        s = norm(layers(x, range(1, 3), stop(blocks)), stop(model.inject.norm.scale[...]))
    x = norm(layers(s, range(3, 4)), model.final_norm.scale[...])
    return x @ model.embed.w[...].T


@pytest.mark.parametrize("injection", ["add", "concat"])
def test_forward_is_a_loop_over_the_layers(injection: str) -> None:
    model, ids = looped("dense", injection=injection), tokens(2, LENGTH)
    logits, aux = forward(model, ids)
    np.testing.assert_allclose(logits, by_hand(model, ids, 3), atol=1e-4)
    assert aux["recursion_runs"] == 3
    deeper, aux = forward(model.at_depth(5), ids)
    np.testing.assert_allclose(deeper, by_hand(model, ids, 5), atol=1e-4)
    assert aux["recursion_runs"] == 5
    assert np.abs(deeper - logits).max() > 1e-2


def test_a_drawn_step_is_a_fixed_step_whose_first_runs_are_constants() -> None:
    model = looped("dense", sampling="uniform", backward=2, repeats=2)
    b, found = batch(), {}
    for seed in range(20):
        (loss, runs), gradient = loss_and_gradient(model, b, jax.random.key(seed))
        found[int(runs)] = loss, gradient
    assert set(found) == {1, 2, 3}

    @jax.jit
    @jax.value_and_grad
    def truncated(model: LM) -> jax.Array:
        logits = by_hand(model, b["tokens"], 3, constant=1)
        picked = jnp.take_along_axis(logits, b["targets"][..., None], -1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits, -1) - picked)

    (one, _), one_gradient = loss_and_gradient(looped("dense", repeats=1), b)
    (three, _), three_gradient = loss_and_gradient(looped("dense", repeats=3, backward=2), b)
    for got, want in (
        (found[1], (one, one_gradient)),  # fewer than have a gradient
        (found[3], truncated(model)),
        ((three, three_gradient), truncated(model)),
    ):
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
        assert_close(got[1], want[1])


@jax.jit
def _with_key(model: LM, ids: jax.Array, key: jax.Array) -> Any:
    return model(ids, key=key)


def test_without_a_key_the_depth_is_not_drawn() -> None:
    model = looped("dense", sampling="poisson", backward=2)
    logits, aux = forward(model, tokens(2, LENGTH))
    assert aux["recursion_runs"] == 3
    np.testing.assert_array_equal(logits, forward(model, tokens(2, LENGTH))[0])
    fixed, _ = forward(looped("dense"), tokens(2, LENGTH))
    np.testing.assert_allclose(logits, fixed, atol=1e-5)


@pytest.mark.parametrize("repeats", [2, 32])
def test_draws_follow_the_stated_distributions(repeats: int) -> None:
    rng = np.random.default_rng(0)
    n = 200_000
    rate = np.exp(np.log(repeats - 1) - 1 / 8 + rng.normal(size=n) / 2)
    samples = {
        "fixed": np.full(n, repeats),
        "uniform": rng.integers(1, 2 * repeats, n),
        "poisson": 1 + rng.poisson(rate),
    }
    for sampling, values in samples.items():
        config = RecursionConfig(0, 0, repeats, sampling, backward=3)
        p = distribution(config)
        values = values[values <= len(p)]
        assert p.sum() == pytest.approx(1)
        assert p @ np.arange(1, len(p) + 1) == pytest.approx(repeats, rel=0.01)
        seen = np.bincount(values, minlength=len(p) + 1)[1:] / len(values)
        np.testing.assert_allclose(p, seen, atol=5e-3)
        assert expected_runs(config).forward == pytest.approx(values.mean(), rel=0.01)
        with_gradient = np.minimum(values, 3).mean()
        assert expected_runs(config).backward == pytest.approx(with_gradient, rel=0.01)
        drawn = jax.jit(jax.vmap(lambda key, c=config: draw(c, key)))(
            jax.random.split(jax.random.key(1), 20_000)
        )
        seen = np.bincount(drawn, minlength=len(p) + 1)[1:] / len(drawn)
        np.testing.assert_allclose(p, seen, atol=0.02)


PROMPTS = [tokens(1, n, seed=n)[0] for n in (3, 20, 9)]
FED = tokens(3, 6, seed=5)


def fed(model: LM, prompts: Any = PROMPTS, follow: np.ndarray = FED) -> np.ndarray:
    """Logits after the prompts and after each token that follows, `[B, 1 + 6, V]`."""
    padded, segments = left_pad(prompts)
    logits, state = prefill(model, padded, segments, 48)
    out, lengths = [logits], np.array([len(p) for p in prompts], np.int32)
    for t in range(follow.shape[1]):
        logits, state = decode(model, follow[:, t], lengths + t, state)
        out.append(logits)
    return np.stack(out, axis=1)


def whole(model: LM) -> np.ndarray:
    """The same by one pass over each row, without a state."""
    rows = [np.concatenate(pair) for pair in zip(PROMPTS, FED, strict=True)]
    width = max(map(len, rows))
    logits, _ = forward(model, np.stack([np.pad(row, (0, width - len(row))) for row in rows]))
    return np.stack([logits[i, len(p) - 1 : len(p) + 6] for i, p in enumerate(PROMPTS)])


@pytest.mark.parametrize("name", ["window", "hybrid"])
def test_decoding_with_a_cache_for_every_run_is_the_whole_forward(name: str) -> None:
    model = looped(name)
    np.testing.assert_allclose(fed(model), whole(model), atol=2e-4, rtol=0)


def test_a_tolerance_that_stops_none_or_all() -> None:
    model, ids = looped("window"), tokens(2, 8)
    one, three = stepped(model.at_depth(1), ids)[0], stepped(model, ids)[0]
    logits, runs = stepped(model.at_depth(3, 1e-12), ids)
    np.testing.assert_allclose(logits, three, atol=1e-5)
    assert runs == [3] * 8
    logits, runs = stepped(model.at_depth(3, 1e12), ids)
    np.testing.assert_allclose(logits, one, atol=1e-5)
    assert runs == [1] * 8
    assert np.abs(one - three).max() > 1e-2


def stepped(model: LM, ids: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Logits `[B, S, V]` token by token, and the mean runs of every step."""
    state, logits, runs = model.init_state(*ids.shape), [], []
    for t in range(ids.shape[1]):
        here = np.full((len(ids), 1), t)
        step, aux, state = _step(model, ids[:, t : t + 1], here, state)
        logits.append(step[:, 0])
        runs.append(float(aux["recursion_runs"]))
    return np.stack(logits, 1), runs


@jax.jit
def _step(model: LM, ids: jax.Array, positions: jax.Array, state: Any) -> Any:
    return model(ids, positions=positions, state=state)


def settled_by_hand(model: LM, ids: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """One row token by token, caches in NumPy: logits `[S, V]` and the runs of every token."""
    recursion = model.config.recursion
    blocks = [jax.tree.map(lambda a, i=i: a[i], model.blocks[0]) for i in range(4)]
    empty = blocks[0].mixer.init_state(1, len(ids), jnp.float32)
    # One for every layer and run: layers 0 and 3 have one run.
    caches = [[jax.tree.map(np.array, empty) for _ in range(recursion.repeats)] for _ in range(4)]
    logits, counts = [], []
    for t, token in enumerate(ids):

        def layer(x: jax.Array, i: int, run: int, t: int = t) -> jax.Array:
            x, new = _one_layer(blocks[i], x, np.full((1, 1), t), caches[i][run])
            caches[i][run] = jax.tree.map(np.array, new)
            return x

        e = layer(model.embed.w[...][token][None, None], 0, 0)
        s = jnp.zeros_like(e)
        for run in range(recursion.repeats):
            x = layer(model.inject.enter(s, e, jnp.float32), 1, run)
            old, s = s, model.inject.leave(layer(x, 2, run))
            if jnp.linalg.norm(s - old) <= recursion.tolerance * jnp.linalg.norm(s):
                break
        for i in (1, 2):
            for deeper in range(run + 1, recursion.repeats):
                cache = caches[i][deeper]
                cache.k[:, t], cache.v[:, t] = caches[i][run].k[:, t], caches[i][run].v[:, t]
                cache.positions[:, t] = t
        logits.append(model.logits(model.final_norm(layer(s, 3, 0)))[0, 0])
        counts.append(run + 1)
    return np.stack(logits), counts


@jax.jit
def _one_layer(block: Any, x: jax.Array, positions: jax.Array, state: Any) -> Any:
    x, _, state = block(x, positions=positions, segments=None, state=state, dtype=jnp.float32)
    return x, state


def test_every_token_stops_by_itself_and_lends_its_keys() -> None:
    model = looped("dense").at_depth(6, 0.3)
    ids = tokens(2, 8, seed=3)
    got, runs = stepped(model, ids)
    want = [settled_by_hand(model, row) for row in ids]
    np.testing.assert_allclose(got, [logits for logits, _ in want], atol=1e-4)
    counts = np.array([count for _, count in want])
    assert runs == pytest.approx(counts.mean(0).tolist())
    assert (counts[0] != counts[1]).any()  # the rows stop apart
    assert counts.min() < 4 < counts.max()  # and later tokens look where earlier ones were not


def test_depth_depends_neither_on_later_tokens_nor_on_other_rows_nor_on_padding() -> None:
    model = looped("dense").at_depth(6, 0.3)
    ids = tokens(3, LENGTH)
    logits, aux = forward(model, ids)
    assert 1 < aux["recursion_runs"] < 6
    changed = ids.copy()
    changed[0, 7:] += 1
    changed[1:] = tokens(2, LENGTH, seed=9)
    other, _ = forward(model, changed % 48)
    np.testing.assert_allclose(other[0, :7], logits[0, :7], atol=1e-5)
    assert np.abs(other[0, 7:] - logits[0, 7:]).max() > 1e-2

    alone = fed(model, PROMPTS[2:], FED[2:])  # padded by 7, in the batch by 23
    np.testing.assert_allclose(alone[0], fed(model)[2], atol=1e-4)


def test_experts_in_the_span_report_the_mean_of_their_runs() -> None:
    model = looped("moe", injection="none", sampling="uniform")
    flat = unrolled(model)
    _, aux = forward(model, tokens(2, LENGTH))
    _, flat_aux = forward(flat, tokens(2, LENGTH))
    assert len(flat_aux["moe_z"]) == 8
    for name, value in flat_aux.items():
        span = value[1:7].reshape(3, 2, *value.shape[1:]).mean(0)
        np.testing.assert_allclose(
            aux[name], np.concatenate([value[:1], span, value[7:]]), rtol=1e-4, atol=1e-6
        )
    for seed in range(3):
        _, drawn, _ = _with_key(model, tokens(2, LENGTH), jax.random.key(seed))
        np.testing.assert_allclose(drawn["moe_load"].sum(-1), 1, rtol=1e-5)
        assert drawn["recursion_runs"] in (1, 2, 3, 4, 5)


def test_operations_count_the_runs() -> None:
    plain = dense(32, 4, 2, d_ff=48)
    one = replace(plain, n_layers=1)
    layer = forward_flops(one, 64).total - forward_flops(one, 64).head
    adapter, head = 4 * 32 * 32, forward_flops(plain, 64).head

    def model(**recursion: Any) -> LMConfig:
        return replace(plain, recursion=RecursionConfig(1, 2, **recursion))

    assert forward_flops(model(repeats=3), 64).total == 8 * layer + 3 * adapter + head
    assert forward_flops(model(repeats=3, injection="add"), 64).total == 8 * layer + head
    assert training_flops(model(repeats=3), 64) == 3 * (8 * layer + 3 * adapter + head)
    # 1, 2 or 3 runs; at most two of them backward: 2 and 5/3 on average.
    drawn = model(repeats=2, sampling="uniform", backward=2)
    span = 2 * layer + adapter
    want = 3 * (2 * layer + head) + span * (2 + 2 * 5 / 3)
    assert training_flops(drawn, 64) == pytest.approx(want)
    again = 2 * layer + 2 * layer * 5 / 3
    assert training_flops(drawn, 64, "full") == pytest.approx(want + again)


def test_bfloat16_over_a_float32_stream() -> None:
    config = RecursionConfig(1, 2, repeats=3, backward=1)
    model = tiny_lm(
        "dense", n_layers=4, recursion=config, dtype="bfloat16", residual_dtype="float32"
    )
    (loss, _), gradient = loss_and_gradient(model, batch())
    (exact, _), _ = loss_and_gradient(looped("dense"), batch())
    assert float(loss) == pytest.approx(float(exact), rel=3e-2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_another_depth_leaves_the_model_as_it_was() -> None:
    model = looped("dense")
    assert model.at_depth(7, 0.1).config.recursion == RecursionConfig(1, 2, 7, tolerance=0.1)
    assert model.at_depth(tolerance=0.1).config.recursion.repeats == 3
    assert model.config.recursion == RecursionConfig(1, 2, 3)
    assert isinstance(model.inject, nnx.Module)


def tiny(name: str, first: int, last: int, **recursion: Any) -> LMConfig:
    return tiny_config(name, recursion=RecursionConfig(first, last, **recursion))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RecursionConfig(2, 1), "first=2 and last=1: give 0 <= first <= last"),
        (lambda: RecursionConfig(0, 1, 0), r"recursion.repeats=0 must be at least 1"),
        (lambda: RecursionConfig(0, 1, backward=0), "recursion.backward=0 must be at least 1"),
        (lambda: RecursionConfig(0, 1, tolerance=0.0), "tolerance=0.0 must be above 0"),
        (lambda: RecursionConfig(0, 1, 1, "poisson"), "sampling='poisson' with repeats=1"),
        (
            lambda: RecursionConfig(0, 1, backward=2, injection="none"),
            "backward=2 with injection='none' would train nothing",
        ),
        (lambda: tiny("dense", 1, 3), "last=3 must be whole periods of 1 within n_layers=3"),
        (lambda: tiny("hybrid", 1, 2), "first=1, last=2 must be whole periods of 2"),
        (lambda: tiny("hybrid", 2, 2), "first=2, last=2 must be whole periods of 2"),
        (lambda: tiny("hybrid", 0, 1, tolerance=0.1), "tolerance=0.1 over a MambaConfig"),
        (
            lambda: replace(tiny("dense", 0, 1), mup=MuPConfig(16, base_depth=2)),
            "mup.base_depth=2 with recursion",
        ),
        (lambda: config_to_hf(tiny("dense", 0, 1)), "layers 0 to 1: no class of transformers"),
        (lambda: tiny_lm("dense").at_depth(4), "repeats=4, tolerance=None: no layers of this"),
        (lambda: looped("dense").at_depth(0), "recursion.repeats=0 must be at least 1"),
        (
            lambda: looped("dense").at_depth(2)(
                tokens(1, 1), positions=np.zeros((1, 1)), state=looped("dense").init_state(1, 4)
            ),
            "state holds 8 periods, with repeats=2 it is 6: begin with init_state",
        ),
    ],
)
def test_errors_name_field_value_and_remedy(make: Any, message: str) -> None:
    assert set(SPANS) <= set(PATTERNS)
    with pytest.raises(UserError, match=message):
        make()
