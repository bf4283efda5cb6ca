"""Training the Tiny Recursive Model: parity with NumPy, the carry, halting, devices, resuming."""

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from slm_jax.errors import UserError
from slm_jax.models.trm import TRM, TRMConfig, refine
from slm_jax.models.trm_flops import training_flops
from slm_jax.nn.module import named_leaves
from slm_jax.parallel import MeshConfig, make_mesh, shard_batch, shardings
from slm_jax.train.checkpoint import Checkpoints
from slm_jax.train.loop import CHECKPOINTS_FOLDER, LoopConfig, train
from slm_jax.train.metrics import read_metrics
from slm_jax.train.optimizer import OptimizerConfig, ScheduleConfig, make_optimizer
from slm_jax.train.step import Program, StepConfig, TrainState, compile_step
from slm_jax.train.tasks import trm
from slm_jax.train.tasks.trm import TRMLossConfig, TRMTask
from tests.train import trm_numpy
from tests.train.trm_numpy import State

TINY = TRMConfig(5, 4, 6, 8, 2, 1, n_prefix=2, n_cycles=2, n_latent_steps=2, ff_multiple=8)
RULE = OptimizerConfig("adam_atan2", 0.5, 0.8, 0.9, clip_norm=None, table_decay=0.3)
RATES = np.array([0.01, 0.02], np.float32)
ROWS = 8


def puzzles(rows: int, seed: int, config: TRMConfig = TINY) -> dict[str, np.ndarray]:
    """Random puzzles; a third of the cells is not scored; id 5 is never used."""
    rng = np.random.default_rng(seed)
    shape = (rows, config.seq_len)
    labels = rng.integers(1, config.vocab_size, shape) * (rng.random(shape) < 0.7)
    labels[:, 0] = 1
    return {
        "inputs": rng.integers(0, config.vocab_size, shape).astype(np.int32),
        "labels": labels.astype(np.int32),
        "puzzle_ids": rng.integers(0, 5, rows).astype(np.int32),
    }


def program(task: TRMTask, mesh: Mesh, *, ema: float | None = 0.75, accumulate: int = 1) -> Program:
    shape = (task.batch_size, task.model.seq_len)
    cells = [(name, shape, np.int32) for name in ("inputs", "labels")]
    config = StepConfig(task, RULE, accumulate, ema)
    return compile_step(config, mesh, (*cells, ("puzzle_ids", shape[:1], np.int32)))


def one_device() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


def stirred(state: TrainState) -> TrainState:
    """The state with weights that are zero or small at first made large enough to matter."""
    rng = np.random.default_rng(1)
    size = {"halt.w": 1.0, "halt.b": 0.5, "puzzles": 0.3}

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        if name not in size:
            return leaf
        value = rng.normal(size=leaf.shape) * size[name]
        return jax.device_put(value.astype(np.float32), leaf.sharding)

    model = jax.tree_util.tree_map_with_path(one, state.model)
    return state._replace(model=model, ema=jax.tree.map(jnp.copy, model))


def numbers(tree: Any) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(jax.device_get(leaf.get_value()), np.float64)
        for name, leaf in named_leaves(tree).items()
        if jax.tree.leaves(leaf)
    }


PARITY = {
    "mlp": (TINY, TRMLossConfig(2, exploration=0.0)),
    "attention": (
        replace(TINY, mixer="attention", n_layers=2, n_cycles=3),
        TRMLossConfig(2, exploration=0.0),
    ),
    "separate networks, continue loss, last gradient": (
        replace(TINY, separate_networks=True, gradient="last"),
        TRMLossConfig(2, halt_weight=0.7, exploration=0.0, continue_loss=True),
    ),
    "one latent, recomputed": (
        replace(TINY, latents="one", remat="full"), TRMLossConfig(3, exploration=0.0)
    ),
    "direct": (
        replace(TINY, latents="one", n_cycles=1, n_latent_steps=0),
        TRMLossConfig(1, exploration=0.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", PARITY)
def test_training_is_that_of_the_reference_in_float64(variant: str) -> None:
    """Outputs, losses, gradients, weights and their average over three supervision steps.

    NumPy goes its own way from the initial weights, but takes the gradients as they are, a few
    entries of each compared with finite differences.
    """
    config, loss = PARITY[variant]
    task, mesh = TRMTask(config, ROWS, loss), one_device()
    compiled = program(task, mesh)
    with jax.set_mesh(mesh):
        state = stirred(compiled.init(np.uint32(3)))
    w, ema = numbers(state.model), numbers(state.model)
    shape = (ROWS, config.n_slots, config.d_model)
    zeros = np.zeros(shape)
    oracle = State(
        zeros if config.latents == "two" else None,
        zeros,
        np.zeros(ROWS, int),
        np.ones(ROWS, bool),
        {k: np.zeros_like(v) for k, v in puzzles(ROWS, 0).items()},
    )
    rule = trm_numpy.Optimizer(w, RULE.b1, RULE.b2, RULE.weight_decay, 0.3)
    momentum = {k: np.zeros_like(v) for k, v in w.items()}
    rng = np.random.default_rng(0)
    waited = 0
    for step in range(3):
        batch = puzzles(ROWS, step)
        table = numbers(state.model)["puzzles"]
        with jax.set_mesh(mesh):
            state, metrics = compiled.step(state, shard_batch(batch, mesh), RATES)
        want = trm_numpy.supervision_step(w, config, loss, oracle, batch)
        np.testing.assert_allclose(metrics["loss"], want.total / ROWS, rtol=1e-5)
        for name, number in want.logged.items():
            np.testing.assert_allclose(metrics[name], number, rtol=1e-5, atol=1e-6, err_msg=name)
        for name in ("y", "z", "steps", "halted"):
            got, expected = getattr(state.carry, name), getattr(want.state, name)
            if expected is not None:
                np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=name)
        for name, value in want.state.data.items():
            np.testing.assert_array_equal(state.carry.data[name], value)

        after = numbers(state.optimizer[0].inner_state[0].mu)
        g = {k: (after[k] - RULE.b1 * momentum[k]) / (1 - RULE.b1) for k in after}
        momentum = after
        # What sign-SGD did to the table says the signs of its gradient.
        ids = want.state.data["puzzle_ids"]
        read = np.isin(np.arange(config.n_puzzle_ids), ids)[:, None]
        kept = table * (1 - RATES[1] * 0.3 * read)
        g["puzzles"] = (kept - numbers(state.model)["puzzles"]) / RATES[1]
        check_gradient(w, g, want.loss_of, rng)

        w = rule.step(w, g, float(RATES[0]), float(RATES[1]), ids)
        trained = w.keys() - {"y_init", "z_init", "puzzles"}
        ema = {k: ema[k] + 0.25 * (w[k] - ema[k]) if k in trained else w[k] for k in w}
        for got, expected in ((state.model, w), (state.ema, ema)):
            for name, value in numbers(got).items():
                np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)
        oracle = want.state
        waited += int((~oracle.halted).sum())
    assert variant == "direct" or 0 < waited < 3 * ROWS  # some rows kept their puzzle, some not


def check_gradient(w: Any, g: Any, loss_of: Any, rng: np.random.Generator) -> None:
    """Compares entries of the mean gradient with finite differences; buffers have none."""
    for name in w:
        if name.endswith("_init"):
            assert not g[name].any()
            continue
        largest = np.argmax(np.abs(g[name]))
        for flat in {int(largest), *rng.integers(0, w[name].size, 3).tolist()}:
            index = np.unravel_index(flat, w[name].shape)
            ends = []
            for h in (1e-5, -1e-5):
                moved = w[name].copy()
                moved[index] += h
                ends.append(loss_of(w | {name: moved}))
            slope = (ends[0] - ends[1]) / 2e-5 / ROWS
            if name == "puzzles":
                assert abs(slope) < 1e-6 or np.sign(slope) == np.round(g[name][index], 2)
            else:
                bound = 1e-5 * max(1.0, np.abs(g[name]).max())
                np.testing.assert_allclose(g[name][index], slope, atol=bound, err_msg=name)


def test_initial_losses() -> None:
    """Cells: near ln 11, a little above, as logits have unit variance; halting: log(1 + e^-5)."""
    v = np.random.default_rng(0).normal(size=(20_000, 11))
    scores = np.where(v >= 0, v + 1, 1 / (1 - np.minimum(v, 0)))
    expected = np.log(scores.sum(-1)).mean()  # log s(v) of the label is 0 on average
    assert math.log(11) < expected < math.log(11) + 0.2
    config = TRMConfig(11, 81, 1, 64, 4, 2, n_cycles=1, n_latent_steps=1, ff_multiple=32)
    task = TRMTask(config, 16)
    model, carry = task.init(jax.random.key(0))
    batch = puzzles(16, 0, config) | {"puzzle_ids": np.zeros(16, np.int32)}
    _, aux, carry = jax.jit(task.loss)(model, batch, carry, jax.random.key(1))
    assert abs(float(aux["cross_entropy"]) - expected) < 0.05
    np.testing.assert_allclose(aux["halt_loss"], 0.006715, rtol=1e-4)
    assert not carry.halted.any()


# Halting: of a model so small that many rows cost nothing.
SMALL = replace(TINY, seq_len=2, n_puzzle_ids=0, n_prefix=1, n_cycles=1, n_latent_steps=1)


def halting(loss: TRMLossConfig, bias: float, rows: int, steps: int) -> Iterator[Any]:
    """The carries after each step of an untrained model whose halting logit is `bias`."""
    task = TRMTask(replace(SMALL, halt_bias=bias), rows, loss)
    model, carry = task.init(jax.random.key(0))
    run = jax.jit(lambda b, c, k: task.loss(model, b, c, k)[1:])
    for step in range(steps):
        aux, carry = run(puzzles(rows, step, SMALL), carry, jax.random.key(step))
        yield aux, carry


def test_a_row_halts_at_the_last_step_or_when_it_says_so() -> None:
    carries = [c for _, c in halting(TRMLossConfig(3, exploration=0.0), -5.0, 4, 7)]
    assert [int(c.steps[0]) for c in carries] == [1, 2, 3, 1, 2, 3, 1]
    assert [bool(c.halted[0]) for c in carries] == [False, False, True] * 2 + [False]
    for now, then in ((1, 0), (2, 0), (4, 3), (5, 3)):  # puzzles stay until their row halts
        for name, value in puzzles(4, then, SMALL).items():
            np.testing.assert_array_equal(carries[now].data[name], value)
    for _, carry in halting(TRMLossConfig(3, exploration=0.0), 5.0, 4, 2):
        assert carry.halted.all()
        assert (carry.steps == 1).all()
    for _, carry in halting(TRMLossConfig(1, exploration=1.0), -5.0, 4, 2):
        assert carry.halted.all()


def test_exploration_puts_halting_off() -> None:
    """At step s a row that wants to halt may if a number drawn from 2..4 is at most s."""
    rows, shares = 600, []
    for _, carry in halting(TRMLossConfig(4, exploration=1.0), 5.0, rows, 2):
        shares.append(float(carry.halted.mean()))
    assert shares[0] == 0
    assert abs(shares[1] - 1 / 3) < 0.06
    (first, _), *_ = halting(TRMLossConfig(4, exploration=0.25), 5.0, rows, 1)
    assert abs(float(first["halted"]) - 0.75) < 0.06


def test_labels_are_those_of_the_puzzle_in_the_carry() -> None:
    """What is offered to a row that has not halted changes nothing."""
    task = TRMTask(SMALL, 4, TRMLossConfig(3, exploration=0.0))
    model, _ = task.init(jax.random.key(0))
    run = jax.jit(lambda b, c: jax.value_and_grad(
        lambda m: task.loss(m, b, c, jax.random.key(0))[0].total)(model))  # fmt: skip
    ((_, carry),) = halting(task.objective, -5.0, 4, 1)
    a, b = (run(puzzles(4, seed, SMALL), carry) for seed in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    fresh = carry._replace(halted=jnp.ones(4, bool))
    c, d = (run(puzzles(4, seed, SMALL), fresh)[0] for seed in (1, 2))
    assert float(c) != float(d)


def run_steps(mesh: Mesh, accumulate: int, n: int = 5) -> list[dict[str, float]]:
    task = TRMTask(replace(TINY, mixer="attention"), 16, TRMLossConfig(3, exploration=0.0))
    compiled = program(task, mesh, ema=None, accumulate=accumulate)
    with jax.set_mesh(mesh):
        state = compiled.init(np.uint32(0))
        out = []
        for step in range(n):
            batch = shard_batch(puzzles(16, step), mesh)
            state, metrics = compiled.step(state, batch, RATES)
            out.append({k: float(v) for k, v in metrics.items()})
    return out


@pytest.fixture(scope="module")
def reference() -> list[dict[str, float]]:
    return run_steps(one_device(), 1)


@pytest.mark.parametrize(("mesh", "accumulate"), [((2, 4), 1), ((8, 1), 2)])
def test_devices_and_microbatches_do_not_change_a_run(
    mesh: tuple[int, int], accumulate: int, reference: list[dict[str, float]]
) -> None:
    got = run_steps(make_mesh(MeshConfig(data=mesh[0], fsdp=mesh[1])), accumulate)
    for a, b in zip(got, reference, strict=True):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert np.ptp([r["loss"] for r in got]) > 0.1


class Batches:
    """Deterministic in the position, like `slm_jax.data`'s iterators."""

    def __init__(self) -> None:
        self.position = 0

    def __next__(self) -> dict[str, np.ndarray]:
        self.position += 1
        return puzzles(ROWS, self.position)

    def __iter__(self) -> "Batches":
        return self

    def get_state(self) -> dict[str, int]:
        return {"next_index": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["next_index"]


def test_the_loop_trains_it_and_resumes_it_with_its_carry(tmp_path: Path) -> None:
    task = TRMTask(replace(SMALL, seq_len=4, n_puzzle_ids=6), ROWS, TRMLossConfig(4))
    mesh = make_mesh(MeshConfig(data=8))
    compiled = program(task, mesh)
    evaluate = functools.partial(trm.evaluate, puzzles(11, 99), mesh, n_steps=2, batch_size=8)

    def run(folder: Path, steps: int) -> list[dict[str, Any]]:
        train(
            compiled,
            mesh,
            Batches(),
            folder=folder,
            name="trm",
            steps=steps,
            seed=0,
            schedule=ScheduleConfig(0.01, "constant", warmup_steps=0),
            table_schedule=ScheduleConfig(0.02, "constant", warmup_steps=4),
            config=LoopConfig(quiet=True, checkpoint_every=3),
            evaluate=evaluate,
            derive=trm.derived(task, mesh),
            count=trm.COUNT,
        )
        clock = ("puzzles_per_second",)
        return [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(folder)]

    whole = run(tmp_path / "whole", 6)
    first = run(tmp_path / "parts", 3)
    both = run(tmp_path / "parts", 6)
    assert [r for r in whole if "loss" in r] == [r for r in both if "loss" in r]
    assert first[:3] == both[:3]
    assert [r for r in both if "exact_2" in r][-1] == whole[-1]
    np.testing.assert_allclose(both[1]["table_learning_rate"], 0.02 * 2 / 5)
    assert both[0]["flops"] == ROWS * training_flops(task.model)
    halts = [r for r in both if r.get("halted")]
    assert halts
    assert all(1 <= r["act_steps"] <= 4 for r in halts)
    with Checkpoints(tmp_path / "parts" / CHECKPOINTS_FOLDER, read_only=True) as checkpoints:
        saved = checkpoints.restore(compiled.state).state
    assert saved.carry.z.sharding.spec[0] == ("data", "fsdp", "expert")
    assert float(jnp.abs(saved.carry.z).max()) > 0
    assert {"y_init", "z_init"} <= named_leaves(saved.model).keys()
    for name in ("y_init", "z_init"):
        a, b = (np.asarray(named_leaves(t)[name].get_value()) for t in (saved.model, saved.ema))
        np.testing.assert_array_equal(a, b)


def test_accuracy_after_each_supervision_step() -> None:
    model = TRM(TINY, jax.random.key(0))
    test, mesh = puzzles(11, 5), make_mesh(MeshConfig(data=4, fsdp=2))
    found = refine(model, jnp.asarray(test["inputs"]), jnp.asarray(test["puzzle_ids"]), 3)
    labels = np.array(found.predictions[1])  # as after two steps: then all is right
    labels[3, 1:] = 1 + labels[3, 1:] % 4  # but in one puzzle
    labels[:5, 2] = 0
    right = (np.asarray(found.predictions) == labels) & (labels > 0)
    with jax.set_mesh(mesh):
        split = jax.device_put(model, shardings(model, mesh))
    got = trm.accuracy(split, test | {"labels": labels}, mesh, n_steps=3, batch_size=8)
    cell = right.sum(-1) / (labels > 0).sum(-1)
    np.testing.assert_allclose(got["cell"], cell.mean(-1), rtol=1e-6)
    exact = (right | (labels == 0)).all(-1)
    np.testing.assert_allclose(got["exact"], exact.mean(-1), rtol=1e-6)
    np.testing.assert_allclose(got["halt"], 1 - exact.mean(-1), rtol=1e-6)  # it never says halt


def test_clear_errors() -> None:
    task = TRMTask(SMALL, 4)
    model, carry = task.init(jax.random.key(0))
    with pytest.raises(UserError, match="batch_size and seq_len must agree"):
        task.loss(model, jax.tree.map(jnp.asarray, puzzles(6, 0, SMALL)), carry, jax.random.key(0))
    with pytest.raises(UserError, match="table_decay=None"):
        make_optimizer(OptimizerConfig(), TRM(TINY, jax.random.key(0)))
    with pytest.raises(UserError, match="n_supervision=0"):
        TRMLossConfig(0)
    with pytest.raises(UserError, match="exploration=2"):
        TRMLossConfig(exploration=2)
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(UserError, match="batch_size=6"):
        trm.accuracy(model, puzzles(6, 0, SMALL), mesh, n_steps=1, batch_size=6)
    with pytest.raises(UserError, match="none to score"):
        trm.accuracy(model, puzzles(0, 0, SMALL), mesh, n_steps=1, batch_size=8)
