"""Steps that must not be taken change no bit of what is trained."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.parallel import MeshConfig, make_mesh, shard_batch
from slm_jax.train import guard
from slm_jax.train.optimizer import OptimizerConfig
from slm_jax.train.step import StepConfig, TrainState, compile_step, init_state, train_step
from slm_jax.train.tasks.lm import LMTask
from tests.train import tiny
from tests.train.test_step import Regression, regression_batch


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def assert_skipped(before: TrainState, after: TrainState, metrics: dict[str, Any]) -> None:
    assert int(metrics["skipped"]) == 1
    assert bits(after._replace(step=before.step)) == bits(before)
    assert int(after.step) == int(before.step) + 1


def poisoned(how: str) -> dict[str, np.ndarray]:
    """A batch whose loss is NaN or infinite, or finite with a gradient that is not."""
    batch = regression_batch()
    match how:
        case "nan":
            batch["y"][3] = np.nan
        case "inf":
            batch["y"][3] = np.inf
        case "gradient":  # the square of the error is 3e38, its gradient has another factor x
            batch["y"][2], batch["x"][2] = 1.0e18, 1e3
            batch["weights"][2] = 3.0
    return batch


@pytest.mark.parametrize(("how", "accumulate"), [("nan", 1), ("inf", 2), ("gradient", 1)])
def test_a_step_that_is_not_finite_changes_no_bit(how: str, accumulate: int) -> None:
    config = StepConfig(Regression(), OptimizerConfig(), accumulate, ema_decay=0.9)
    state, step = stepper(config)
    clean = state
    for bad in (True, False, False, True, False):
        before = state
        state, metrics = step(before, poisoned(how) if bad else regression_batch())
        if bad:
            assert np.isfinite(metrics["loss"]) == (how == "gradient")
            assert not np.isfinite(metrics["grad_norm"])
            assert_skipped(before, state, metrics)
        else:
            assert int(metrics["skipped"]) == 0
            clean, _ = step(clean, regression_batch())
    # All but the count of batches, and the noise that goes by it, is as without the bad batches.
    for name in ("model", "optimizer", "ema"):
        assert bits(getattr(state, name)) == bits(getattr(clean, name))


def stepper(config: StepConfig) -> tuple[TrainState, Any]:
    """The first state, and the step at a small learning rate."""
    options = {"xla_backend_optimization_level": 0}
    step = jax.jit(functools.partial(train_step, config), compiler_options=options)
    return init_state(config, jnp.uint32(3)), lambda state, batch: step(state, batch, 1e-3)


def batches(seed: int) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    while True:
        batch = regression_batch()
        yield batch | {"y": batch["y"] + rng.normal(size=12).astype(np.float32)}


def test_a_spike_changes_no_bit_and_is_not_remembered() -> None:
    config = StepConfig(Regression(), OptimizerConfig(skip_sigma=6.0))
    state, step = stepper(config)
    spikes = (guard.ENOUGH + 3, guard.ENOUGH + 9)
    for i, batch in zip(range(guard.ENOUGH + 20), batches(0), strict=False):
        before = state
        factor = 10 if i in spikes else 1  # the loss is 100 times as large
        state, metrics = step(before, batch | {"y": batch["y"] * factor})
        if i in spikes:
            assert_skipped(before, state, metrics)
        else:
            assert int(metrics["skipped"]) == 0
    assert int(state.losses.seen) == guard.ENOUGH + 18


@pytest.mark.parametrize("sigma", [4.0, 6.0])
def test_the_limit_is_so_many_deviations_above_the_mean(sigma: float) -> None:
    rng = np.random.default_rng(1)
    losses = guard.no_losses()
    seen: list[float] = []
    remember, is_spike = jax.jit(guard.remember), jax.jit(guard.is_spike)
    for _ in range(guard.WINDOW + 40):
        seen.append(float(np.float32(rng.normal(3.0, 0.1))))
        losses = remember(losses, jnp.float32(seen[-1]))
        if len(seen) in (guard.ENOUGH - 1, guard.ENOUGH, guard.WINDOW, guard.WINDOW + 40):
            last = seen[-guard.WINDOW :]
            limit = np.mean(last) + sigma * np.std(last)
            known = len(seen) >= guard.ENOUGH
            for factor, above in ((0.999, False), (1.001, True)):
                loss = jnp.float32(limit * factor)
                assert bool(is_spike(losses, loss, sigma)) == (above and known)


def test_a_loss_that_hardly_moves_has_no_spikes() -> None:
    losses = guard.Losses(jnp.full(guard.WINDOW, 2.0), jnp.int32(500))
    assert not guard.is_spike(losses, jnp.float32(2.011), 6.0)
    assert guard.is_spike(losses, jnp.float32(2.013), 6.0)


def test_without_looking_for_spikes_the_state_has_no_losses() -> None:
    assert init_state(StepConfig(Regression(), OptimizerConfig()), jnp.uint32(3)).losses == ()


def test_a_bad_batch_of_a_sharded_model_changes_no_bit() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    shape = (8, 16)
    ints = [(name, shape, np.int32) for name in ("tokens", "targets", "segments", "positions")]
    config = StepConfig(LMTask(tiny.model("dense")), OptimizerConfig(), ema_decay=0.9)
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 16, shape).astype(np.int32) for name, *_ in ints}
    batch |= {"segments": np.ones(shape, np.int32), "weights": np.ones(shape, np.float32)}
    with jax.set_mesh(mesh):
        program = compile_step(config, mesh, (*ints, ("weights", shape, np.float32)))
        state = program.init(np.uint32(0))
        for i in range(4):
            before = bits(state._replace(step=0))
            weights = batch["weights"] * (np.nan if i % 2 else 1.0)
            split = shard_batch(batch | {"weights": weights.astype(np.float32)}, mesh)
            state, metrics = program.step(state, split, np.float32(0.01))
            assert int(metrics["skipped"]) == i % 2
            assert (bits(state._replace(step=0)) == before) == bool(i % 2)
