"""The step on a task small enough to check by hand, and the balance of experts."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.models.lm import LMConfig
from slm_jax.models.presets import dense
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.module import Buffer, named_leaves, parameter
from slm_jax.parallel import make_mesh, use_rules
from slm_jax.train import step
from slm_jax.train.experiment import Experiment, step_inputs
from slm_jax.train.optimizer import OptimizerConfig
from slm_jax.train.step import StepConfig, TrainState, init_state, train_step
from slm_jax.train.task import Loss
from slm_jax.train.tasks.lm import LMLossConfig, LMTask
from tests.train import tiny

ROWS = 12


@dataclass(frozen=True)
class Regression:
    """Weighted least squares; the carry holds the key that each row was last given."""

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        model = {
            "w": parameter(jax.random.normal(key, (3,)), (None,)),
            "worst": Buffer(jnp.zeros(()), axes=()),
        }
        return model, jnp.zeros((ROWS, 2), jnp.uint32)

    def loss(
        self, model: Any, batch: Mapping[str, jax.Array], carry: Any, key: jax.Array
    ) -> tuple[Loss, dict[str, jax.Array], Any]:
        error = jnp.square(batch["x"] @ model["w"][...] - batch["y"]) * batch["weights"]
        total, weight = jnp.sum(error), jnp.sum(batch["weights"])
        aux = {"error": total / jnp.maximum(weight, 1.0)}
        return Loss(total, weight), aux, jnp.broadcast_to(jax.random.key_data(key), carry.shape)

    def after_update(self, model: Any, aux: dict[str, jax.Array]) -> Any:
        worst = jnp.maximum(model["worst"][...], aux["error"])
        return model | {"worst": model["worst"].replace(worst)}


def regression_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 3)).astype(np.float32)
    weights = rng.uniform(0.5, 3.0, ROWS).astype(np.float32)
    weights[1::4] = 0.0  # with four microbatches, one of them counts for nothing
    return {"x": x, "y": rng.normal(size=ROWS).astype(np.float32), "weights": weights}


def steps(
    config: StepConfig, n: int, batch: Any, state: TrainState | None = None, rate: float = 0.1
) -> Any:
    """The states before and after each of n steps, and their metrics."""
    # Unoptimised code: it runs a few times.
    options = {"xla_backend_optimization_level": 0}
    if state is None:
        state = jax.jit(functools.partial(init_state, config), compiler_options=options)(
            np.uint32(3)
        )
    step = jax.jit(functools.partial(train_step, config), compiler_options=options)
    for _ in range(n):
        before = state
        state, metrics = step(before, batch, np.float32(rate))
        yield before, state, metrics


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_microbatches_of_uneven_weight_add_up_to_the_batch(accumulate: int) -> None:
    batch = regression_batch()
    config = StepConfig(Regression(), OptimizerConfig(clip_norm=None), accumulate)
    for before, _, metrics in steps(config, 2, batch):
        w = np.asarray(before.model["w"].get_value(), np.float64)
        residual = batch["x"] @ w - batch["y"]
        weight = batch["weights"].sum()
        loss = (batch["weights"] * residual**2).sum() / weight
        gradient = 2 * (batch["weights"] * residual) @ batch["x"] / weight
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        np.testing.assert_allclose(metrics["error"], loss, rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)


def test_update_average_and_buffer() -> None:
    """Buffers follow the task alone: no decay, no momentum, no average."""
    config = StepConfig(
        Regression(), OptimizerConfig(weight_decay=0.5, clip_norm=None), ema_decay=0.75
    )
    worst = 0.0
    moved = []
    for before, after, metrics in steps(config, 3, regression_batch()):
        model, ema = after.model["w"].get_value(), after.ema["w"].get_value()
        want = 0.75 * before.ema["w"].get_value() + 0.25 * model
        np.testing.assert_allclose(ema, want, rtol=1e-6)
        worst = max(worst, float(metrics["error"]))
        assert float(after.model["worst"].get_value()) == pytest.approx(worst)
        assert float(after.ema["worst"].get_value()) == float(after.model["worst"].get_value())
        moved.append(float(jnp.abs(model - ema).max()))
        assert int(after.step) == int(before.step) + 1
    np.testing.assert_array_less(0.01, moved)


@pytest.mark.parametrize("exponent", [0.0, 3.0])
def test_tail_average_weighs_the_steps_by_a_polynomial(exponent: float) -> None:
    """After T steps, step t has the weight of t (t + 1) ... (t + g - 1); with g = 0 the mean."""
    config = StepConfig(Regression(), OptimizerConfig(clip_norm=None), tail_average=exponent)
    weights = []
    for n, (_, after, _) in enumerate(steps(config, 6, regression_batch()), 1):
        weights.append(np.asarray(after.model["w"].get_value(), np.float64))
        polynomial = [math.prod(t + k for k in range(int(exponent))) for t in range(1, n + 1)]
        want = np.average(weights, axis=0, weights=polynomial)
        np.testing.assert_allclose(after.ema["w"].get_value(), want, rtol=1e-5)
        assert float(after.ema["worst"].get_value()) == float(after.model["worst"].get_value())


def test_every_microbatch_has_noise_of_its_own() -> None:
    """And none of it is what the initial weights were made of: splits of the seed's key."""
    seed = jax.random.key(3)
    seen = [k for n in (4, 7) for k in jax.random.key_data(jax.random.split(seed, n))]
    for accumulate, n in ((1, 4), (2, 3)):
        config = StepConfig(Regression(), OptimizerConfig(), accumulate)
        for _, after, _ in steps(config, n, regression_batch()):
            # Row r is in microbatch r % accumulate.
            seen += list(after.carry[:accumulate])
            assert (after.carry.reshape(-1, accumulate, 2) == after.carry[:accumulate]).all()
    # split(key, 7) begins with split(key, 4); all others differ.
    assert len({tuple(np.asarray(k).tolist()) for k in seen}) == len(seen) - 4


# MoE layers are 0 and 2: one in the scanned period, one in the tail.
MIXED = LMConfig(
    64, 16, 3, (LayerConfig(tiny.ATTENTION, tiny.MOE), LayerConfig(tiny.ATTENTION, tiny.MLP))
)
BALANCE = LMLossConfig(load_balance=0.5, router_z=0.25, bias_rate=0.015625)
BIASES = ("blocks.0.channel.bias", "tail.0.channel.bias")


def skewed_state(config: StepConfig) -> TrainState:
    """Experts 0 (first MoE layer) and 3 (second) are always chosen at first."""
    options = {"xla_backend_optimization_level": 0}
    init = jax.jit(functools.partial(init_state, config), compiler_options=options)
    state = init(np.uint32(0))
    for bias, expert in zip((named_leaves(state.model)[b] for b in BIASES), (0, 3), strict=True):
        bias.set_value(bias.get_value().at[..., expert].set(0.5))
    return state


def test_router_biases_even_out_the_load_and_balance_terms_are_in_the_loss() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (8, 17)).astype(np.int32)
    weights = rng.integers(0, 2, (8, 16)).astype(np.float32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    config = StepConfig(LMTask(MIXED, BALANCE), OptimizerConfig(weight_decay=0.3))
    loads = []
    for before, after, metrics in steps(config, 40, batch, skewed_state(config), 1e-3):
        balance, z = metrics["moe_load_balance"], metrics["moe_z"]
        assert balance.shape == z.shape == metrics["moe_dropped"].shape == (2,)
        want = metrics["nll"] + 0.5 * balance.mean() + 0.25 * z.mean()
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)

        load = np.asarray(metrics["moe_load"])
        np.testing.assert_allclose(load.sum(axis=1), 1.0, rtol=1e-6)
        for layer, name in enumerate(BIASES):
            old, new = (
                np.asarray(named_leaves(s.model)[name].get_value()) for s in (before, after)
            )
            change = 0.015625 * np.sign(load[layer].mean() - load[layer])
            np.testing.assert_array_equal(new, old + change.astype(np.float32))
        loads.append(load)
    # Two of four experts a token: an expert that is always chosen has half of all assignments.
    assert loads[0][0, 0] == loads[0][1, 3] == 0.5
    settled = np.mean(loads[-8:], axis=0)
    assert settled.max() < 0.3
    assert settled.min() > 0.2


def test_another_rule_table_is_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(step, "_compile", lambda *key: asked.append(key))
    config = StepConfig(LMTask(tiny.model("dense")), OptimizerConfig())
    for changes in ({}, {}, {"embed": None}):
        with use_rules(**changes):
            step.compile_step(config, make_mesh(), ())
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]


@pytest.mark.parametrize("shape", [(16, 576, 7), (64, 576, 32), (16, 16, 2), (128, 512, 256)])
def test_the_compiler_options_for_cpus_give_right_products(shape: tuple[int, int, int]) -> None:
    """Some fuse what follows a product and get it wrong by orders of magnitude."""
    m, k, n = shape
    rng = np.random.default_rng(0)
    x, w, y = (rng.standard_normal(s) for s in ((m, k), (k, n), (m, n)))
    scale = 1 / 16

    def parts(x: Any, w: Any, y: Any, scale: Any, xp: Any) -> dict[str, Any]:
        z = x @ w
        return {
            "scaled": z * scale,
            "divided": z / 3.0,
            "moment": 0.9 * y + 0.1 * (z * scale),
            "difference": y - z,
            "sum": y + z,
            "relu": xp.maximum(z, 0.0),
            "exp": xp.exp(z * 0.01),
            "square": xp.sum((z * scale) ** 2),
        }

    args = [np.float32(a) for a in (x, w, y, scale)]
    compiled = jax.jit(lambda *a: parts(*a, jnp)).lower(*args).compile(step.ON_CPU)
    want = parts(x, w, y, scale, np)
    for name, value in compiled(*args).items():
        error = np.abs(value - want[name]).max() / np.abs(want[name]).max()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_a_batch_of_one_row_is_a_batch(n_kv_heads: int) -> None:
    """A reshape on an explicit mesh forgets how an axis of size one is split."""
    model = dense(32, 1, 4, n_kv_heads, d_ff=64, vocab_size=64)
    run = Experiment(model=model, batch_size=1, seq_len=32)
    config, batch = step_inputs(run)
    lowered = step.lower_step(config, make_mesh(run.mesh, jax.devices()[:1]), batch)
    assert lowered.state.model.embed.w.get_value().shape == (64, 32)
