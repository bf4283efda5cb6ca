"""The one loop: batches in, metrics out one step late, checkpoints now and then."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slm_jax.errors import UserError
from slm_jax.parallel import shard_batch
from slm_jax.train.checkpoint import CHECKPOINTS_FOLDER, Checkpoints
from slm_jax.train.goodput import Goodput
from slm_jax.train.metrics import MetricLog
from slm_jax.train.optimizer import ScheduleConfig
from slm_jax.train.progress import TrainProgress
from slm_jax.train.step import Program, TrainState
from slm_jax.train.stop import PreemptedError, StoppedError, StopSignals
from slm_jax.train.version import code_version
from slm_jax.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


class DivergedError(UserError):
    """Step after step is skipped, or an evaluation is no longer a number."""


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
    keep_every: int = 0
    """Also keep the checkpoints whose number is a multiple of this; 0 is none."""
    max_skipped: int = 3
    """Bad steps in a row that end the run; fewer are skipped. See OptimizerConfig.skip_sigma."""
    hang_limit: float = 0.0
    """Seconds a step may take, its batch and its checkpoint included, before the process dumps its
    stacks and exits with 43 for a launcher to start it again; 0 is no limit."""
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
        if self.max_skipped < 1:
            raise UserError(f"max_skipped={self.max_skipped} must be at least 1: 3 is usual")
        if self.hang_limit < 0:
            raise UserError(f"hang_limit={self.hang_limit} must be 0 (no limit) or seconds")
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
        host_share: share of a step that this process spends on batches, dispatch and logging, so
            not in or waiting for the compiled step; median as before.
    """

    state: TrainState
    evaluation: dict[str, float]
    per_second: float
    host_share: float


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

    def __call__(self, batch: Mapping[str, jax.Array]) -> int:
        """How many there are in a global batch."""
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
    begin: Callable[[TrainState], TrainState] = lambda state: state,
    table_schedule: ScheduleConfig | None = None,
    count: Count = TOKENS,
    facts: dict[str, Any] | None = None,
    goodput: Goodput | None = None,
) -> Finished:
    """Trains from the newest whole checkpoint in `folder`, or from the beginning.

    Metrics of a step are read after the next one has been dispatched, so the device never waits
    for the host. No checkpoint is written while steps are skipped: one bad step after another
    must not push out the last good state.

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
        begin: what the first state becomes before the first step: other weights.
        table_schedule: learning rate of sparse tables, exactly if the program was compiled with
            an `OptimizerConfig.table_decay`.
        count: what the speed is measured in.
        facts: JSON about the run for its checkpoints: the configuration.
        goodput: the clock of the run, if it was started before.

    Raises:
        DivergedError: if `config.max_skipped` steps in a row were bad, or what `evaluate` returned
            is not finite; the last good checkpoint stays.
        PreemptedError: after SIGTERM or Ctrl-C, when the state is saved.
        UserError: if a checkpoint cannot be written, or there are some and none is whole.
    """
    goodput = goodput or Goodput()
    with (
        goodput.account(folder),
        jax.set_mesh(mesh),
        Checkpoints(
            folder / CHECKPOINTS_FOLDER,
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
        ) as checkpoints,
    ):
        start, evaluated = 0, True
        with goodput.part("restart"):
            if checkpoints.latest() is None:
                state = begin(program.init(np.uint32(seed)))
            else:
                restored = checkpoints.restore(program.state)
                start, state = restored.step, restored.state
                evaluated = restored.facts["evaluated"]
                batches.set_state(restored.data)  # type: ignore[attr-defined]
            jax.block_until_ready(state)
        chosen = frozenset(config.eval_steps)
        log = MetricLog(
            folder, first_step=start, evaluated=evaluated, wandb=config.wandb, name=name
        )
        replicated = NamedSharding(mesh, P())
        runs_in_call = mesh.devices.flat[0].platform == "cpu"
        saved, bad_in_row, save_due = start, 0, False
        durations: list[float] = []
        host_shares: list[float] = []
        counted, away = 0, 0.0
        pending: tuple[int, dict[str, jax.Array]] | None = None
        clock = time.perf_counter()

        def diverged(values: dict[str, float], step: int, why: str) -> DivergedError:
            kept = f"checkpoint {saved} is the last good one" if saved else "no checkpoint yet"
            return DivergedError(
                f"{', '.join(f'{k}={v}' for k, v in values.items())} at step {step} with "
                f"learning_rate={schedule(step, steps):.3g}{why}: lower it or lengthen the "
                f"warm-up; {kept} ({folder})"
            )

        def settle() -> None:
            """Reads and logs the metrics of the step dispatched before; ends a diverged run."""
            nonlocal pending, clock, bad_in_row, away
            if pending is None:
                return
            step, metrics = pending
            pending = None
            before = time.perf_counter()
            read = {k: float(metrics[k]) for k in ("loss", "grad_norm")}
            bad = int(metrics["skipped"])
            now = time.perf_counter()
            durations.append(now - clock)
            host_shares.append(1 - (away + now - before) / (now - clock))
            clock, away = now, 0.0
            rate = counted / float(np.median(durations[-20:]))
            bad_in_row = bad_in_row + 1 if bad else 0
            if bad:
                told = ", ".join(f"{k}={v:.6g}" for k, v in read.items())
                logger.warning("%s: step %d is skipped: %s", name, step, told)
            if bad or step % config.log_every == 0 or step == steps - 1:
                values: dict[str, Any] = {k: np.asarray(v) for k, v in metrics.items()}
                values |= {
                    "learning_rate": schedule(step, steps),
                    f"{count.unit}_per_second": rate,
                }
                if table_schedule is not None:
                    values["table_learning_rate"] = table_schedule(step, steps)
                values = derive(values)
                # JSON has no NaN.
                log.write(step, {k: v for k, v in values.items() if np.isfinite(v).all()})
            if bad_in_row == config.max_skipped:
                raise diverged(read, step, f", bad step {bad_in_row} in a row")
            progress.update(step + 1, read["loss"], rate)

        def evaluate_after(done: int) -> dict[str, float]:
            nonlocal clock
            settle()
            with goodput.part("evaluate"), watchdog.paused(), signals.interrupts():
                values = evaluate(state)
            if not np.isfinite(list(values.values())).all():
                raise diverged(values, done - 1, "")
            log.write(done - 1, values)
            clock = time.perf_counter()
            return values

        def save(done: int, *, evaluated: bool = True) -> None:
            nonlocal saved, save_due, clock
            with goodput.part("checkpoint"):
                known = {"name": name, "evaluated": evaluated, "code": code_version()}
                position = batches.get_state()  # type: ignore[attr-defined]
                checkpoints.save(done, state, position, known | (facts or {}))
            saved, save_due = done, False
            clock = time.perf_counter()

        def stop(done: int, *, evaluated: bool = True) -> PreemptedError:
            settle()
            if saved != done:
                save(done, evaluated=evaluated)
            with goodput.part("checkpoint"):
                checkpoints.wait()
            print(f"{name}: stopped after step {done}; the same command goes on", flush=True)
            return PreemptedError()

        try:
            with (
                TrainProgress(
                    name, first_step=start, steps=steps, quiet=config.quiet, unit=count.unit
                ) as progress,
                StopSignals() as signals,
                Watchdog(config.hang_limit) as watchdog,
            ):
                evaluation: dict[str, float] = {}
                if not evaluated:  # a signal had come in between
                    try:
                        evaluation = evaluate_after(start)
                    except StoppedError:
                        raise stop(start) from None
                elif start >= steps:
                    with goodput.part("evaluate"):
                        evaluation = evaluate(state)
                for step in range(start, steps):
                    goodput.begin_step(step)
                    watchdog.beat(step)
                    with goodput.part("data"):
                        host = next(batches)
                    batch = shard_batch(host, mesh)
                    counted = count(batch)
                    rates = [s(step, steps) for s in (schedule, table_schedule) if s is not None]
                    learning_rate = jax.make_array_from_process_local_data(
                        replicated, np.array(rates if table_schedule else rates[0], np.float32)
                    )
                    before = time.perf_counter()
                    with jax.transfer_guard("disallow"):
                        state, metrics = program.step(state, batch, learning_rate)
                    if runs_in_call:
                        away += time.perf_counter() - before
                    settle()
                    pending = (step, metrics)
                    checkpoints.poll()
                    done = step + 1
                    often = config.eval_every
                    if done == steps or done in chosen or (often and done % often == 0):
                        try:
                            evaluation = evaluate_after(done)
                        except StoppedError:
                            raise stop(done, evaluated=False) from None
                    every = config.checkpoint_every
                    save_due |= done == steps or bool(every and done % every == 0)
                    if save_due:
                        settle()
                        if not bad_in_row or done == steps:
                            save(done)
                    if signals.requested(done):
                        raise stop(done)
                with goodput.part("checkpoint"):
                    checkpoints.wait()
        finally:
            goodput.enter("other")
            log.close()

    def median(values: list[float]) -> float:
        return float(np.median(values[1:])) if len(values) > 2 else 0.0

    typical = median(durations)
    rate = counted / typical if typical else 0.0
    return Finished(state, evaluation, rate, median(host_shares))
