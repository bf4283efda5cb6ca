"""A training run of the Tiny Recursive Model on puzzles, from one configuration to its results."""

import functools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from slm_jax.data.puzzles import (
    ArcQuestions,
    ArcVotes,
    PuzzleData,
    PuzzleSet,
    PuzzleSplits,
    SudokuGenerated,
    arc_score,
    open_puzzles,
    puzzle_batches,
)
from slm_jax.errors import UserError
from slm_jax.models.trm import TRM, TRMConfig
from slm_jax.models.trm_flops import training_flops
from slm_jax.parallel import MeshConfig, local_rows, make_mesh
from slm_jax.train import folder
from slm_jax.train.checkpoint import restore_weights
from slm_jax.train.goodput import Goodput
from slm_jax.train.loop import LoopConfig, train
from slm_jax.train.optimizer import OptimizerConfig, ScheduleConfig
from slm_jax.train.serialize import from_json, to_json
from slm_jax.train.step import BatchShapes, Program, StepConfig, TrainState, compile_step
from slm_jax.train.tasks import trm
from slm_jax.train.tasks.trm import TRMLossConfig, TRMTask

# Fields that say where and how a run is watched, not what it computes: they may change on resuming.
_FREE = ("out", "overwrite", "mesh", "loop", "model.remat")


@dataclass(frozen=True)
class TRMExperiment:
    """One training run on puzzles. An optimiser step is one supervision step of every row."""

    model: TRMConfig
    """The model; its `vocab_size` and `seq_len` are those of the puzzles."""
    data: PuzzleData = SudokuGenerated()
    """Puzzles."""
    optimizer: OptimizerConfig = OptimizerConfig("adam_atan2", weight_decay=0.1, clip_norm=None)
    """Update rule; `table_decay` with puzzle embeddings."""
    schedule: ScheduleConfig = ScheduleConfig(1e-3, "constant", 200)
    """Learning rate by step."""
    table_schedule: ScheduleConfig | None = None
    """Learning rate of the puzzle embeddings, exactly if the model has them."""
    objective: TRMLossConfig = TRMLossConfig()
    """Loss, supervision steps, halting."""
    steps: int = 2400
    """Optimiser steps."""
    batch_size: int = 48
    """Puzzles a step, over all devices and microbatches."""
    accumulate: int = 1
    """Microbatches a step."""
    ema_decay: float | None = 0.999
    """Also keep, and score, an exponential moving average of the weights."""
    seed: int = 0
    """Source of all randomness of the run; the data has a seed of its own."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    loop: LoopConfig = LoopConfig()
    """Logging, evaluation, checkpoints."""
    out: Path = Path("runs/trm")
    """Run folder. A run found there with the same configuration is resumed."""
    overwrite: bool = False
    """Delete what is in the run folder first."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must be between 0 and 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must be at least 0 and below 2^32")
        needs = "needs" if self.model.n_puzzle_ids else "must not have"
        for name, given in (
            ("table_schedule", self.table_schedule),
            ("optimizer.table_decay", self.optimizer.table_decay),
        ):
            if (given is not None) != bool(self.model.n_puzzle_ids):
                raise UserError(
                    f"{name}={given}: a model with n_puzzle_ids={self.model.n_puzzle_ids} "
                    f"{needs} one"
                )


@dataclass(frozen=True)
class TRMResult:
    """What a finished run measured on the test puzzles.

    Attributes:
        exact: share solved entirely, after supervision step 1..N.
        cell: share of the scored cells that are right, the same.
        exact_ema: as `exact`, of the averaged weights, if there are any.
        cell_ema: as `cell`, of the averaged weights.
        arc_pass_2: official ARC score of two attempts (averaged weights if any), for ARC only.
        steps: optimiser steps.
        flops: of the whole training.
        puzzles_per_second: median over the steps.
        compile_seconds: compiling the step; equal steps of one process are compiled once.
        memory_bytes: of the step on one device, from the compiler.
        out: run folder.
        host_share: share of a step that the process spends outside the compiled step; median.
        goodput: seconds by part, over all restarts (`slm_jax.train.goodput.PARTS`).
    """

    exact: list[float]
    cell: list[float]
    exact_ema: list[float] | None
    cell_ema: list[float] | None
    arc_pass_2: float | None
    steps: int
    flops: float
    puzzles_per_second: float
    compile_seconds: float
    memory_bytes: int
    out: str
    host_share: float = 0.0
    goodput: dict[str, float] = field(default_factory=dict)


def run(config: TRMExperiment, splits: PuzzleSplits | None = None) -> TRMResult:
    """Trains, or resumes, or returns the result if the run folder holds it already.

    Args:
        config: what to run.
        splits: the opened puzzles of `config.data`, to share them between runs.

    Raises:
        UserError: on a configuration that cannot run, or a run folder of another one.
        DivergedError: if several steps in a row were bad, or an evaluation is not finite.
        PreemptedError: after SIGTERM or Ctrl-C, when the state is saved.
    """
    goodput = Goodput()
    splits = splits or open_puzzles(config.data)
    _check_fit(config.model, splits.train)
    identity = to_json(config) | {"data_fingerprint": splits.fingerprint}
    found = folder.agree_on_folder(config.out, identity, free=_FREE, overwrite=config.overwrite)
    if found is not None:
        return TRMResult(**found)
    mesh = make_mesh(config.mesh)
    with goodput.part("compile"):
        program = compile_program(config, mesh)
    # Last: a configuration that cannot run leaves no folder.
    folder.make_folder(config.out, identity, overwrite=config.overwrite)
    end = train(
        program,
        mesh,
        puzzle_batches(
            splits.train,
            batch_size=config.batch_size,
            seed=config.seed,
            augment=splits.augment,
            rows=local_rows(mesh, config.batch_size),
        ),
        folder=config.out,
        name="/".join(config.out.parts[-2:]),
        steps=config.steps,
        seed=config.seed,
        schedule=config.schedule,
        table_schedule=config.table_schedule,
        config=config.loop,
        evaluate=functools.partial(
            trm.evaluate,
            splits.valid.batch(slice(None)),
            mesh,
            n_steps=config.objective.n_supervision,
            batch_size=_scored_at_once(config),
        ),
        derive=trm.derived(task(config), mesh),
        count=trm.COUNT,
        facts={"config": identity},
        goodput=goodput,
    )
    with goodput.part("evaluate"):
        scores = _scores(config, splits, mesh, end.state)
    result = TRMResult(
        **scores,
        steps=config.steps,
        flops=config.steps * step_flops(config),
        puzzles_per_second=end.per_second,
        compile_seconds=program.compile_seconds,
        memory_bytes=program.memory_bytes,
        out=str(config.out),
        host_share=end.host_share,
        goodput=goodput.write(),
    )
    return TRMResult(**folder.write_result(config.out, asdict(result)))


def task(config: TRMExperiment) -> TRMTask:
    """The task of a run."""
    return TRMTask(config.model, config.batch_size, config.objective)


def step_flops(config: TRMExperiment) -> float:
    """Floating-point operations of one optimiser step."""
    one = training_flops(config.model, continue_loss=config.objective.continue_loss)
    return config.batch_size * one


def step_inputs(config: TRMExperiment) -> tuple[StepConfig, BatchShapes]:
    """What the step of a run is compiled from, apart from the mesh."""
    step = StepConfig(task(config), config.optimizer, config.accumulate, config.ema_decay)
    cells = (config.batch_size, config.model.seq_len)
    arrays = (("inputs", cells), ("labels", cells), ("puzzle_ids", cells[:1]))
    return step, tuple((name, shape, np.int32) for name, shape in arrays)


def compile_program(config: TRMExperiment, mesh: Mesh) -> Program:
    """The compiled step of a run; runs that differ in seed or learning rate share it."""
    step, batch = step_inputs(config)
    return compile_step(step, mesh, batch)


def _check_fit(model: TRMConfig, puzzles: PuzzleSet) -> None:
    length = puzzles.height * puzzles.width
    for name, given, wanted in (
        ("vocab_size", model.vocab_size, puzzles.vocab_size),
        ("seq_len", model.seq_len, length),
    ):
        if given != wanted:
            raise UserError(f"model.{name}={given}: the puzzles of {puzzles.name} have {wanted}")
    if 0 < model.n_puzzle_ids < puzzles.n_puzzle_ids:
        raise UserError(
            f"model.n_puzzle_ids={model.n_puzzle_ids}: {puzzles.name} has ids below "
            f"{puzzles.n_puzzle_ids}; raise it, or set 0 for a model that does not see them"
        )


def _scores(
    config: TRMExperiment, splits: PuzzleSplits, mesh: Mesh, state: TrainState
) -> dict[str, Any]:
    """The fields of the result that the test puzzles give."""
    out: dict[str, Any] = {"exact_ema": None, "cell_ema": None, "arc_pass_2": None}
    test = splits.test.batch(slice(None))
    n, rows = config.objective.n_supervision, _scored_at_once(config)
    for suffix, model in (("", state.model), ("_ema", state.ema)):
        if model is not None:
            scores = trm.accuracy(model, test, mesh, n_steps=n, batch_size=rows)
            out |= {f"{name}{suffix}": scores[name].tolist() for name in ("exact", "cell")}
    if splits.arc is not None:
        model = state.model if state.ema is None else state.ema
        out["arc_pass_2"] = _arc_pass_2(splits.arc, mesh, model, n, rows)
    return out


def _scored_at_once(config: TRMExperiment) -> int:
    """Puzzles: as many as a microbatch, which are known to fit."""
    return config.batch_size // config.accumulate


def _arc_pass_2(arc: ArcQuestions, mesh: Mesh, model: TRM, n_steps: int, rows: int) -> float:
    """The official score of two attempts, voted from the answers to all variants."""
    votes = ArcVotes(arc.variants)
    asked = arc.asked.batch(slice(None))
    found = trm.answer(model, asked, mesh, n_steps=n_steps, batch_size=rows)
    votes.add(asked["puzzle_ids"], asked["inputs"], found.predictions, found.halt)
    return arc_score(votes.attempts(arc.tasks), arc.tasks)


def load_experiment(out: Path) -> TRMExperiment:
    """The configuration of the run in `out`.

    Raises:
        UserError: if the folder holds no run on puzzles.
    """
    data = folder.read_config(out, kind=TRMExperiment.__name__)
    data = {k: v for k, v in data.items() if k != "data_fingerprint"}
    return from_json(TRMExperiment, data | {"out": str(out), "overwrite": False})


def load_model(out: Path, *, ema: bool) -> tuple[TRM, TRMExperiment]:
    """The newest weights of the run in `out`, on the first device, and its configuration.

    Raises:
        UserError: if there is no run, no checkpoint, or no average of the weights.
    """
    config = load_experiment(out)
    if ema and config.ema_decay is None:
        raise UserError(f"ema=True: the run in {out} keeps no average of its weights")
    return restore_weights(out, lambda key: TRM(config.model, key), ema=ema), config
