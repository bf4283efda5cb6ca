"""A training run of a language model, from one frozen configuration to a folder of results."""

import functools
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slm_jax.compress.qat import QATConfig, learned, rounded, with_steps
from slm_jax.data import (
    Corpus,
    DataConfig,
    Tokenizer,
    load_tokenizer,
    open_data,
    train_batches,
    valid_batches,
)
from slm_jax.errors import UserError
from slm_jax.models.flops import peak_flops, training_flops
from slm_jax.models.lm import LM, LMConfig
from slm_jax.models.loss import next_token_loss
from slm_jax.nn.moe import MoEConfig
from slm_jax.parallel import MeshConfig, local_rows, make_mesh, shard_batch
from slm_jax.train import folder
from slm_jax.train.checkpoint import CHECKPOINTS_FOLDER, restore_weights
from slm_jax.train.goodput import Goodput
from slm_jax.train.initial import check_source, with_weights_of
from slm_jax.train.loop import LoopConfig, train
from slm_jax.train.metrics import bits_per_byte
from slm_jax.train.optimizer import OptimizerConfig, ScheduleConfig
from slm_jax.train.serialize import from_json, to_json
from slm_jax.train.step import BatchShapes, Program, StepConfig, TrainState, compile_step
from slm_jax.train.tasks.lm import LMLossConfig, LMTask

# Fields that say where and how a run is watched, not what it computes: they may change on resuming.
_FREE = ("out", "overwrite", "mesh", "loop", "model.remat")


@dataclass(frozen=True)
class Experiment:
    """One training run. Equal configurations give equal losses, bit for bit on equal hardware."""

    model: LMConfig
    """The language model."""
    data: DataConfig = DataConfig()
    """Text and tokenizer."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate by step."""
    objective: LMLossConfig = LMLossConfig()
    """Loss."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Rows a step, over all devices and microbatches."""
    seq_len: int = 256
    """Tokens a row."""
    accumulate: int = 1
    """Microbatches a step."""
    ema_decay: float | None = None
    """Also keep, and evaluate, an exponential moving average of the weights."""
    tail_average: float | None = None
    """The same, but an average over about the last 1/(1 + this) of the steps so far: 8 is the last
    ninth. With a constant learning rate it makes a run good at every length."""
    eval_tokens: int | None = None
    """Held-out tokens an evaluation reads; all by default."""
    qat: QATConfig = QATConfig()
    """Train for fewer bits."""
    init_from: Path | None = None
    """Begin with the weights of another run, or of a Hugging Face folder, of the same model."""
    seed: int = 0
    """Source of all randomness: weights, data order, noise."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    loop: LoopConfig = LoopConfig()
    """Logging, evaluation, checkpoints."""
    out: Path = Path("runs/train")
    """Run folder. A run found there with the same configuration is resumed."""
    overwrite: bool = False
    """Delete what is in the run folder first."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must be between 0 and 1")
        if self.tail_average is not None and not 0 <= self.tail_average < math.inf:
            raise UserError(f"tail_average={self.tail_average} must be at least 0: 8 is usual")
        if self.ema_decay is not None and self.tail_average is not None:
            raise UserError(
                f"ema_decay={self.ema_decay} and tail_average={self.tail_average} are both given: "
                "choose one average"
            )
        if self.eval_tokens is not None and self.eval_tokens < 1:
            raise UserError(f"eval_tokens={self.eval_tokens} must be at least 1, or None for all")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must be at least 0 and below 2^32")


@dataclass(frozen=True)
class Result:
    """What a finished run measured.

    Attributes:
        valid_loss: nats a token on the held-out text.
        valid_bits_per_byte: the same in bits a byte.
        valid_loss_ema: nats a token of the averaged weights, if there are any.
        tokens: training tokens seen.
        tokens_per_second: median over the steps.
        compile_seconds: compiling the step; equal steps of one process are compiled once.
        memory_bytes: of the step on one device, from the compiler.
        out: run folder.
        host_share: share of a step that the process spends outside the compiled step; median.
        goodput: seconds by part, over all restarts (`slm_jax.train.goodput.PARTS`).
    """

    valid_loss: float
    valid_bits_per_byte: float
    valid_loss_ema: float | None
    tokens: int
    tokens_per_second: float
    compile_seconds: float
    memory_bytes: int
    out: str
    host_share: float = 0.0
    goodput: dict[str, float] = field(default_factory=dict)


def run(config: Experiment, corpus: Corpus | None = None) -> Result:
    """Trains, or resumes, or returns the result if the run folder holds it already.

    Args:
        config: what to run.
        corpus: the opened data of `config.data`, to share it between runs.

    Raises:
        UserError: on a configuration that cannot run, or a run folder of another one.
        DivergedError: if several steps in a row were bad, or an evaluation is not finite.
        PreemptedError: after SIGTERM or Ctrl-C, when the state is saved.
    """
    goodput = Goodput()
    corpus = corpus or open_data(config.data)
    if corpus.tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the "
            f"{corpus.tokenizer.vocab_size} tokens of {corpus.tokenizer.name}: raise it"
        )
    if config.qat.steps_before >= config.steps:
        raise UserError(
            f"qat.via={config.qat.via} at qat.via_steps={config.qat.via_steps} takes all of "
            f"steps={config.steps}: leave some for {config.qat.spec}"
        )
    identity = _identity(config, corpus)
    free = _free(config)
    found = folder.agree_on_folder(config.out, identity, free=free, overwrite=config.overwrite)
    if found is not None:
        return Result(**found)
    begun = (config.out / CHECKPOINTS_FOLDER).is_dir() and not config.overwrite
    if config.init_from is not None and not begun:
        check_source(config.init_from, config.model, corpus.tokenizer, out=config.out)
    mesh = make_mesh(config.mesh)
    with goodput.part("compile"):
        program = compile_program(config, mesh)
    batches = train_batches(
        corpus,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        seed=config.seed,
        rows=local_rows(mesh, config.batch_size),
    )
    # Last: a configuration that cannot run leaves no folder.
    folder.make_folder(config.out, identity, overwrite=config.overwrite)
    end = train(
        program,
        mesh,
        batches,
        folder=config.out,
        name="/".join(config.out.parts[-2:]),
        steps=config.steps,
        seed=config.seed,
        schedule=config.schedule,
        config=config.loop,
        evaluate=functools.partial(evaluate, config, corpus, mesh),
        derive=_derived(config, corpus, mesh),
        begin=functools.partial(_begin, config),
        facts={"config": identity},
        goodput=goodput,
    )
    result = Result(
        valid_loss=end.evaluation["valid_loss"],
        valid_bits_per_byte=end.evaluation["valid_bits_per_byte"],
        valid_loss_ema=end.evaluation.get("valid_loss_ema"),
        tokens=config.steps * config.batch_size * config.seq_len,
        tokens_per_second=end.per_second,
        compile_seconds=program.compile_seconds,
        memory_bytes=program.memory_bytes,
        out=str(config.out),
        host_share=end.host_share,
        goodput=goodput.write(),
    )
    return Result(**folder.write_result(config.out, asdict(result)))


def _begin(config: Experiment, state: TrainState) -> TrainState:
    """The state before the first step, from that of the seed."""
    if config.init_from is None:
        return state
    return with_weights_of(config.init_from, config.model, config.qat, state)


def find_result(config: Experiment, corpus: Corpus) -> Result | None:
    """The result of a run that is finished; `None` if its folder is free or holds a part of it.

    Raises:
        UserError: if the folder holds another run, and `config.overwrite` does not allow it.
    """
    identity = _identity(config, corpus)
    free = _free(config)
    found = folder.check_folder(config.out, identity, free=free, overwrite=config.overwrite)
    return None if found is None else Result(**found)


def _free(config: Experiment) -> tuple[str, ...]:
    """Fields that may change on resuming."""
    return (*_FREE, "accumulate") if rows_add_up(config.model) else _FREE


def rows_add_up(model: LMConfig) -> bool:
    """Whether a gradient is a sum over rows, so that microbatches change it by rounding only.

    Balance terms of experts are taken over a microbatch, and layers that repeat draw how often.
    """
    return model.recursion is None and not any(
        isinstance(layer.channel, MoEConfig) for layer in model.pattern
    )


def _identity(config: Experiment, corpus: Corpus) -> dict[str, Any]:
    """What a run folder says of its run."""
    given = to_json(config)
    # What a run does not use is not said: runs of before there was a choice are the same.
    if not config.qat.on:
        del given["qat"]
    if config.init_from is None:
        del given["init_from"]
    return given | {
        "data_fingerprint": corpus.fingerprint,
        "tokenizer_fingerprint": corpus.tokenizer.fingerprint,
    }


def step_inputs(config: Experiment) -> tuple[StepConfig, BatchShapes]:
    """What the step of a run is compiled from, apart from the mesh."""
    step = StepConfig(
        LMTask(config.model, config.objective),
        config.optimizer,
        config.accumulate,
        config.ema_decay,
        config.tail_average,
        config.qat,
    )
    shape = (config.batch_size, config.seq_len)
    ints = [(name, shape, np.int32) for name in ("tokens", "targets", "segments", "positions")]
    return step, (*ints, ("weights", shape, np.float32))


def compile_program(config: Experiment, mesh: Mesh) -> Program:
    """The compiled step of a run; runs that differ in seed or learning rate share it."""
    step, batch = step_inputs(config)
    with config.mesh.rules():
        return compile_step(step, mesh, batch)


def evaluate(config: Experiment, corpus: Corpus, mesh: Mesh, state: TrainState) -> dict[str, float]:
    """Held-out loss in nats a token and bits a byte, of the weights and of their average.

    Of a model trained for fewer bits it is the loss in these bits, at any time of the run.
    """
    batch_size = config.batch_size // config.accumulate
    batches = valid_batches(
        corpus,
        batch_size=batch_size,
        seq_len=config.seq_len,
        max_tokens=config.eval_tokens,
        rows=local_rows(mesh, batch_size),
    )
    score = _scorer(config.objective.chunk, config.qat)
    models = {"valid_loss": state.model}
    if state.ema is not None:
        models["valid_loss_ema"] = state.ema
    sums: dict[str, list[Any]] = {name: [] for name in models}
    for batch in batches:
        split = shard_batch(batch, mesh)
        for name, model in models.items():
            sums[name].append(score(model, split))
    out = {}
    for name, parts in sums.items():
        total, weight = np.sum(np.asarray(jax.device_get(parts), np.float64), axis=0)
        out[name] = float(total / weight)
    out["valid_bits_per_byte"] = bits_per_byte(out["valid_loss"], corpus.bytes_per_token)
    return out


@functools.cache
def _scorer(chunk: int | None, qat: QATConfig) -> Any:
    @jax.jit
    def score(model: LM, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, weight, _ = next_token_loss(rounded(model, qat), batch, chunk=chunk)
        return total, weight

    return score


def _derived(config: Experiment, corpus: Corpus, mesh: Mesh) -> Any:
    """Adds bits per byte, and MFU where the device's peak is known, to a step's record."""
    flops = training_flops(config.model, config.seq_len, remat="none")
    peak = peak_flops(mesh.devices.flat[0])

    def derive(values: dict[str, Any]) -> dict[str, Any]:
        nats = float(values["nll"])
        extra = {"bits_per_byte": bits_per_byte(nats, corpus.bytes_per_token)}
        if peak is not None:
            extra["mfu"] = flops * values["tokens_per_second"] / (peak * mesh.size)
        return values | extra

    return derive


def load_experiment(out: Path) -> Experiment:
    """The configuration of the run in `out`.

    Raises:
        UserError: if the folder holds no run.
    """
    data = folder.read_config(out, kind="Experiment")
    data = {k: v for k, v in data.items() if not k.endswith("_fingerprint")}
    # To run it again is to resume it, from where it is now.
    return from_json(Experiment, data | {"out": str(out), "overwrite": False})


def load_run_tokenizer(out: Path) -> Tokenizer:
    """The tokenizer that the run in `out` was trained with.

    Raises:
        UserError: if there is no run, or its tokenizer has changed since.
    """
    spec = load_experiment(out).data.tokenizer
    tokenizer = load_tokenizer(spec)
    if tokenizer.fingerprint != folder.read_config(out, kind="Experiment")["tokenizer_fingerprint"]:
        raise UserError(
            f"data.tokenizer={spec} is not what the run in {out} was trained with: put the file of "
            "that time back"
        )
    return tokenizer


def load_model(out: Path, *, ema: bool = False) -> tuple[LM, Experiment]:
    """The newest weights of the run in `out`, on the first device, and its configuration.

    Of a run that trains for fewer bits they are the numbers that its codes stand for.

    Raises:
        UserError: if there is no run, no checkpoint, or no average of the weights.
    """
    model, config = _trained(out, ema=ema)
    return (
        jax.jit(rounded, static_argnums=1)(model, config.qat) if config.qat.on else model
    ), config


def load_learned(out: Path, *, ema: bool = False) -> tuple[LM, Experiment]:
    """As `load_model` of a run that trains for fewer bits: the quantised model, with its codes.

    Raises:
        UserError: as `load_model`, or if the run trains floats.
    """
    model, config = _trained(out, ema=ema)
    if not config.qat.on:
        raise UserError(f"run={out} trains floats (qat.spec=None): there are no codes to load")
    return jax.jit(learned, static_argnums=1)(model, config.qat), config


def _trained(out: Path, *, ema: bool) -> tuple[LM, Experiment]:
    """The model as the optimiser has it: with step sizes, if they are trained."""
    config = load_experiment(out)
    if ema and config.ema_decay is None and config.tail_average is None:
        raise UserError(f"ema=True: the run in {out} keeps no average of its weights")
    return restore_weights(
        out, lambda key: with_steps(LM(config.model, key), config.qat), ema=ema
    ), config
