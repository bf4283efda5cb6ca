"""Deep supervision of the Tiny Recursive Model, with learned halting (arXiv 2510.04871).

An optimiser step is one supervision step. A row of the batch keeps its puzzle, and what the model
thinks of it, in the carry until it halts; until then the puzzles offered to that row are dropped.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from slm_jax.errors import UserError
from slm_jax.models.flops import peak_flops
from slm_jax.models.trm import TRM, Latents, TRMConfig, empty_latents, refine
from slm_jax.models.trm_flops import training_flops
from slm_jax.nn.stablemax import stablemax_cross_entropy
from slm_jax.parallel import local_rows, shard_batch
from slm_jax.parallel.rules import split_as
from slm_jax.train.loop import Count
from slm_jax.train.step import TrainState
from slm_jax.train.task import Loss

COUNT = Count("puzzles", "inputs", 1)


@dataclass(frozen=True)
class TRMLossConfig:
    """Stablemax cross-entropy of the cells and the cross-entropy of halting."""

    n_supervision: int = 16
    """Most supervision steps a puzzle is kept for."""
    halt_weight: float = 0.5
    """Weight of the halting terms."""
    exploration: float = 0.1
    """Share of rows and steps at which an early halt is put off to a random step."""
    continue_loss: bool = False
    """Also learn the value of going on, from a second forward pass, as HRM does
    (arXiv 2506.21734); a row then halts when that value is the smaller."""

    def __post_init__(self) -> None:
        if self.n_supervision < 1:
            raise UserError(f"n_supervision={self.n_supervision} must be at least 1")
        if not 0 <= self.exploration <= 1:
            raise UserError(f"exploration={self.exploration} must be between 0 and 1")


class TRMCarry(NamedTuple):
    """What every row of the batch is doing.

    Attributes:
        y: answer, `[B, n_slots, d_model]` in the compute dtype; `None` with one latent.
        z: latent, the same.
        steps: `[B]` int32, supervision steps done on this puzzle.
        halted: `[B]` bool: the row takes a new puzzle in the next step.
        data: its puzzle: `inputs`, `labels` `[B, seq_len]` and `puzzle_ids` `[B]` int32.
    """

    y: jax.Array | None
    z: jax.Array
    steps: jax.Array
    halted: jax.Array
    data: dict[str, jax.Array]


@dataclass(frozen=True)
class TRMTask:
    """Trains a Tiny Recursive Model; `Task` of the one training loop."""

    model: TRMConfig
    batch_size: int
    """Rows a step, over all devices and microbatches: the carry has as many."""
    objective: TRMLossConfig = TRMLossConfig()

    def init(self, key: jax.Array) -> tuple[TRM, TRMCarry]:
        """A new model, and a carry in which every row has halted."""
        rows, length = self.batch_size, self.model.seq_len
        cells = jnp.zeros((rows, length), jnp.int32)
        numbers = jnp.zeros(rows, jnp.int32)
        data = {"inputs": cells, "labels": cells, "puzzle_ids": numbers}
        latents = empty_latents(self.model, rows)
        return TRM(self.model, key), TRMCarry(*latents, numbers, numbers == 0, data)

    def loss(
        self, model: TRM, batch: Mapping[str, jax.Array], carry: TRMCarry, key: jax.Array
    ) -> tuple[Loss, dict[str, jax.Array], TRMCarry]:
        """One supervision step.

        Args:
            model: the weights.
            batch: `inputs`, `labels` `[B, seq_len]` int32 (label 0: not scored) and `puzzle_ids`
                `[B]` int32, for the rows that have halted.
            carry: of the step before.
            key: of the exploration.

        Returns:
            Sum over the rows of mean cell loss + `halt_weight` x halting loss, and the number of
            rows; means over the rows to log (`derived` makes the readable ones); the new carry.

        Raises:
            UserError: if the batch has not the shape of the carry.
        """
        c = self.objective
        if batch["inputs"].shape != carry.data["inputs"].shape:
            raise UserError(
                f"batch of inputs{list(batch['inputs'].shape)}, but the task was made for "
                f"{list(carry.data['inputs'].shape)}: batch_size and seq_len must agree"
            )
        data = {name: _where(carry.halted, batch[name], old) for name, old in carry.data.items()}
        latents = model.start(carry.halted, Latents(carry.y, carry.z))
        latents, logits, q = model(data["inputs"], data["puzzle_ids"], latents)
        latents = jax.lax.stop_gradient(latents)

        labels = data["labels"]
        scored = labels > 0
        share = scored / jnp.maximum(jnp.sum(scored, axis=-1, keepdims=True), 1)
        cell_loss = jnp.sum(stablemax_cross_entropy(logits, labels) * share, axis=-1)
        right = jnp.argmax(logits, axis=-1) == labels
        exact = jnp.all(right | ~scored, axis=-1)
        halt_loss = optax.sigmoid_binary_cross_entropy(q[:, 0], exact.astype(jnp.float32))
        extra = jnp.zeros_like(halt_loss)

        steps = jnp.where(carry.halted, 0, carry.steps) + 1
        last = steps >= c.n_supervision
        stop = q[:, 0] > 0
        if c.continue_loss:
            _, _, ahead = model(data["inputs"], data["puzzle_ids"], latents)
            value = jnp.where(last, ahead[:, 0], jnp.maximum(ahead[:, 0], ahead[:, 1]))
            target = jax.lax.stop_gradient(jax.nn.sigmoid(value))
            extra = optax.sigmoid_binary_cross_entropy(q[:, 1], target)
            stop = q[:, 0] > q[:, 1]
        halted = (last | stop) & (steps >= self._least_steps(key, steps))

        total = jnp.sum(cell_loss + c.halt_weight * (halt_loss + extra))
        logged = {
            "cross_entropy": cell_loss,
            "halt_loss": halt_loss,
            "cell_accuracy": jnp.sum(right * share, axis=-1),
            "exact_accuracy": exact,
            "halt_accuracy": (q[:, 0] >= 0) == exact,
            "halted": halted,
            "halted_exact": halted & exact,
            "halted_steps": halted * steps,
        }
        if c.continue_loss:
            logged["continue_loss"] = extra
        aux = {name: jnp.mean(x.astype(jnp.float32)) for name, x in logged.items()}
        rows = jnp.asarray(steps.shape[0], jnp.float32)
        return Loss(total, rows), aux, TRMCarry(*latents, steps, halted, data)

    def _least_steps(self, key: jax.Array, steps: jax.Array) -> jax.Array:
        """Exploration: 0, or in a few rows a step of 2..N before which they do not halt."""
        n = self.objective.n_supervision
        if n < 2:
            return jnp.zeros_like(steps)
        k_which, k_step = jax.random.split(key)
        chosen = jax.random.uniform(k_which, steps.shape) < self.objective.exploration
        least = jax.random.randint(k_step, steps.shape, 2, n + 1)
        return split_as(jnp.where(chosen, least, 0), steps, (0,))

    def after_update(self, model: TRM, aux: dict[str, jax.Array]) -> TRM:
        """Nothing moves but by gradient."""
        return model


def _where(halted: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(halted.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def derived(task: TRMTask, mesh: Mesh) -> Any:
    """Adds what is a ratio to a step's record, for the `derive` of the loop.

    `halted_accuracy`: share solved exactly of the puzzles that halted; `act_steps`: their mean
    number of supervision steps (both absent from a step in which none did); `flops`: of the step;
    `mfu` where the device's peak is known.
    """
    one = training_flops(task.model, continue_loss=task.objective.continue_loss)
    peak = peak_flops(mesh.devices.flat[0])

    def derive(values: dict[str, Any]) -> dict[str, Any]:
        halted = float(values["halted"])
        extra = {"flops": one * task.batch_size}
        if halted:
            extra["halted_accuracy"] = float(values["halted_exact"]) / halted
            extra["act_steps"] = float(values["halted_steps"]) / halted
        if peak is not None:
            extra["mfu"] = one * values["puzzles_per_second"] / (peak * mesh.size)
        return values | extra

    return derive


def accuracy(
    model: TRM,
    puzzles: Mapping[str, np.ndarray],
    mesh: Mesh,
    *,
    n_steps: int,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Scores puzzles after exactly 1, 2, ... N supervision steps from the initial states.

    Args:
        model: raw or averaged weights, on the mesh.
        puzzles: `inputs`, `labels` `[P, seq_len]` and `puzzle_ids` `[P]` int32, the same on every
            process.
        mesh: where the model is.
        n_steps: N; halting is not asked.
        batch_size: rows at a time over all devices; the last batch is padded.

    Returns:
        `exact` `[N]`: share of puzzles with every scored cell right; `cell` `[N]`: share of the
        scored cells, averaged over puzzles; `halt` `[N]`: share of puzzles whose halting logit
        tells rightly whether they are exact. All float64.

    Raises:
        UserError: if there are no puzzles, or `batch_size` does not divide over the mesh.
    """
    names = ("inputs", "labels", "puzzle_ids")
    with jax.set_mesh(mesh):
        sums = [_score(model, b, n_steps) for b, _ in _batches(puzzles, names, mesh, batch_size)]
    totals = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *jax.device_get(sums))
    n = len(puzzles["inputs"])
    return {name: total / n for name, total in totals.items()}


@functools.partial(jax.jit, static_argnums=2)
def _score(model: TRM, batch: Mapping[str, jax.Array], n_steps: int) -> dict[str, jax.Array]:
    found = refine(model, batch["inputs"], batch["puzzle_ids"], n_steps)
    scored = batch["labels"] > 0
    right = (found.predictions == batch["labels"]) & scored
    exact = jnp.all(right | ~scored, axis=-1)
    cell = jnp.sum(right, axis=-1) / jnp.maximum(jnp.sum(scored, axis=-1), 1)
    halt = (found.halt >= 0) == exact
    scores = {"exact": exact, "cell": cell, "halt": halt}
    return {name: jnp.sum(x * batch["weights"], axis=-1) for name, x in scores.items()}


class Answers(NamedTuple):
    """What a model says in the end.

    Attributes:
        predictions: `[P, seq_len]` uint8 tokens.
        halt: `[P]` float32, logits of being right.
    """

    predictions: np.ndarray
    halt: np.ndarray


def answer(
    model: TRM,
    puzzles: Mapping[str, np.ndarray],
    mesh: Mesh,
    *,
    n_steps: int,
    batch_size: int,
) -> Answers:
    """Answers puzzles after `n_steps` supervision steps; arguments as in `accuracy`."""
    names = ("inputs", "puzzle_ids")
    with jax.set_mesh(mesh):
        parts = [
            tuple(part[:n] for part in jax.device_get(_answer(model, batch, n_steps)))
            for batch, n in _batches(puzzles, names, mesh, batch_size)
        ]
    return Answers(*(np.concatenate(part) for part in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnums=2)
def _answer(model: TRM, batch: Mapping[str, jax.Array], n_steps: int) -> tuple[jax.Array, ...]:
    found = refine(model, batch["inputs"], batch["puzzle_ids"], n_steps)
    out = found.predictions[-1].astype(jnp.uint8), found.halt[-1]
    # Whole on every process.
    return tuple(jax.reshard(x, P()) for x in out)


def _batches(
    puzzles: Mapping[str, np.ndarray], names: tuple[str, ...], mesh: Mesh, batch_size: int
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """Arrays of so many puzzles on the mesh, the last ones filled up, and how many are new.

    `weights` is 1 for a puzzle and 0 for what fills up.
    """
    n = len(puzzles["inputs"])
    if not n:
        raise UserError("puzzles: there is none to score")
    rows = local_rows(mesh, batch_size)
    for i in range(0, n, batch_size):
        index = i + rows
        host = {name: np.asarray(puzzles[name], np.int32)[index % n] for name in names}
        host["weights"] = (index < n).astype(np.float32)
        yield shard_batch(host, mesh), min(batch_size, n - i)


def evaluate(
    puzzles: Mapping[str, np.ndarray],
    mesh: Mesh,
    state: TrainState,
    *,
    n_steps: int,
    batch_size: int,
) -> dict[str, float]:
    """`accuracy` of the weights and of their average, flat, for the `evaluate` of the loop.

    Returns:
        `exact_{k}`, `cell_{k}`, `halt_{k}` for k = 1..N, and `..._ema` of them if an average is
        kept.
    """
    models = {"": state.model} | ({} if state.ema is None else {"_ema": state.ema})
    out: dict[str, float] = {}
    for suffix, model in models.items():
        scores = accuracy(model, puzzles, mesh, n_steps=n_steps, batch_size=batch_size)
        for name, values in scores.items():
            out |= {f"{name}_{k}{suffix}": float(v) for k, v in enumerate(values, 1)}
    return out
