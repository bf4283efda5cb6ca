"""The one loop: batches in, metrics out one step late, checkpoints now and then."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from slm_jax.errors import UserError
from slm_jax.parallel.rules import shard_batch
from slm_jax.train.checkpoint import CHECKPOINTS_FOLDER, Checkpoints
from slm_jax.train.metrics import MetricLog
from slm_jax.train.optimizer import ScheduleConfig
from slm_jax.train.progress import TrainProgress
from slm_jax.train.step import Program, TrainState


class DivergedError(UserError):
    """The loss or the gradient is no longer a number."""


@dataclass(frozen=True)
class LoopConfig:
    """How long to train and what to do on the way. Nothing here changes the numbers."""

    log_every: int = 1
    """Steps between records."""
    eval_every: int = 0
    """Steps between evaluations on held-out text; 0 is at the end only."""
    eval_steps: tuple[int, ...] = ()
    """Further numbers of steps after which to evaluate."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 is at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    wandb: bool = False
    """Also log to Weights & Biases."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        if self.log_every < 1 or self.keep_checkpoints < 1:
            raise UserError(
                f"log_every={self.log_every} and keep_checkpoints={self.keep_checkpoints} must be "
                "at least 1"
            )
        if any(step < 1 for step in self.eval_steps):
            raise UserError(
                f"eval_steps={self.eval_steps}: each must be at least 1, the number of steps done"
            )


class Finished(NamedTuple):
    """The end of a run.

    Attributes:
        state: the last state.
        evaluation: what `evaluate` returned for it.
        per_second: tokens, or what `train` counted; median over the steps of this process,
            evaluation left out; 0 if it ran fewer than three steps.
    """

    state: TrainState
    evaluation: dict[str, float]
    per_second: float


class Count(NamedTuple):
    """What the speed of a run is measured in.

    Attributes:
        unit: plural name, for the log (`{unit}_per_second`).
        array: array of the batch to count in.
        dims: how many of its dimensions are counted: 1 is rows, 2 the tokens of rows.
    """

    unit: str = "tokens"
    array: str = "tokens"
    dims: int = 2

    def __call__(self, batch: dict[str, np.ndarray]) -> int:
        """How many there are in a host batch."""
        return math.prod(batch[self.array].shape[: self.dims])


TOKENS = Count()


def train(
    program: Program,
    mesh: Mesh,
    batches: Iterator[dict[str, np.ndarray]],
    *,
    folder: Path,
    name: str,
    steps: int,
    seed: int,
    schedule: ScheduleConfig,
    config: LoopConfig,
    evaluate: Callable[[TrainState], dict[str, float]],
    derive: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values,
    table_schedule: ScheduleConfig | None = None,
    count: Count = TOKENS,
) -> Finished:
    """Trains from the newest checkpoint in `folder`, or from the beginning.

    Metrics of a step are read after the next one has been dispatched, so the device never waits
    for the host. A checkpoint is written only after the losses up to it were seen to be finite.

    Args:
        program: compiled step.
        mesh: the mesh it was compiled for.
        batches: grain iterator of host batches, with `get_state` and `set_state`.
        folder: run folder, where checkpoints and metrics go.
        name: shown with the progress.
        steps: optimiser steps of the whole run.
        seed: source of all randomness of the model.
        schedule: learning rate by step.
        config: intervals of logging, evaluation and checkpoints.
        evaluate: maps a state to numbers for the log.
        derive: adds quantities (bits per byte, MFU) to a step's record.
        table_schedule: learning rate of sparse tables, exactly if the program was compiled with
            an `OptimizerConfig.table_decay`.
        count: what the speed is measured in.

    Raises:
        DivergedError: if a loss, a gradient norm or what `evaluate` returned is not finite; the
            last good checkpoint stays.
    """
    with (
        jax.set_mesh(mesh),
        Checkpoints(folder / CHECKPOINTS_FOLDER, keep=config.keep_checkpoints) as checkpoints,
    ):
        start = 0
        if checkpoints.latest() is None:
            state = program.init(np.uint32(seed))
        else:
            start, state, position = checkpoints.restore(program.state)
            batches.set_state(position)  # type: ignore[attr-defined]
        chosen = frozenset(config.eval_steps)
        log = MetricLog(folder, first_step=start, wandb=config.wandb, name=name)
        saved = start
        durations: list[float] = []
        counted = 0
        pending: tuple[int, dict[str, jax.Array]] | None = None
        clock = time.perf_counter()

        def check(values: dict[str, float], step: int) -> None:
            if not np.isfinite(list(values.values())).all():
                kept = f"checkpoint {saved} is the last good one" if saved else "no checkpoint yet"
                raise DivergedError(
                    f"{', '.join(f'{k}={v}' for k, v in values.items())} at step {step} with "
                    f"learning_rate={schedule(step, steps):.3g}: lower it or lengthen the warm-up; "
                    f"{kept} ({folder})"
                )

        def settle() -> None:
            """Reads the metrics of the step dispatched before, logs them, stops on NaN."""
            nonlocal pending, clock
            if pending is None:
                return
            step, metrics = pending
            pending = None
            loss, norm = (float(metrics[k]) for k in ("loss", "grad_norm"))
            now = time.perf_counter()
            durations.append(now - clock)
            clock = now
            rate = counted / float(np.median(durations[-20:]))
            check({"loss": loss, "grad_norm": norm}, step)
            if step % config.log_every == 0 or step == steps - 1:
                values: dict[str, Any] = {k: np.asarray(v) for k, v in metrics.items()}
                values |= {
                    "learning_rate": schedule(step, steps),
                    f"{count.unit}_per_second": rate,
                }
                if table_schedule is not None:
                    values["table_learning_rate"] = table_schedule(step, steps)
                log.write(step, derive(values))
            progress.update(step + 1, loss, rate)

        try:
            with TrainProgress(
                name, first_step=start, steps=steps, quiet=config.quiet, unit=count.unit
            ) as progress:
                evaluation: dict[str, float] = {}
                for step in range(start, steps):
                    host = next(batches)
                    counted = count(host) * jax.process_count()
                    rates = [s(step, steps) for s in (schedule, table_schedule) if s is not None]
                    learning_rate = np.array(rates if table_schedule else rates[0], np.float32)
                    state, metrics = program.step(state, shard_batch(host, mesh), learning_rate)
                    settle()
                    pending = (step, metrics)
                    done = step + 1
                    often = config.eval_every
                    if done == steps or done in chosen or (often and done % often == 0):
                        settle()
                        evaluation = evaluate(state)
                        check(evaluation, step)
                        log.write(step, evaluation)
                        clock = time.perf_counter()
                    every = config.checkpoint_every
                    if done == steps or (every and done % every == 0):
                        settle()
                        position = batches.get_state()  # type: ignore[attr-defined]
                        checkpoints.save(done, state, position, {"name": name})
                        saved = done
                        clock = time.perf_counter()
                if start >= steps:
                    evaluation = evaluate(state)
        finally:
            log.close()
    steady = durations[1:]
    rate = counted / float(np.median(steady)) if len(steady) > 1 else 0.0
    return Finished(state, evaluation, rate)
