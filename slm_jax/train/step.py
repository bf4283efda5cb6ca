"""One optimiser step: a pure function of (state, batch, learning rate), compiled ahead of time."""

import functools
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slm_jax.compress.qat import QATConfig, rounded, with_steps
from slm_jax.errors import UserError
from slm_jax.nn.module import SparseTable, StepSize, is_variable
from slm_jax.parallel.rules import (
    batch_parts,
    current_rules,
    has_mesh,
    lead_spec,
    shardings,
    spec,
)
from slm_jax.train import guard
from slm_jax.train.compile_cache import keep_programs
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer
from slm_jax.train.task import Task

Batch = Mapping[str, jax.Array]

# Sets the noise of the steps apart from the initial weights: `split(key, n)[i]`, which made those,
# is `fold_in(key, i)`.
_NOISE = 1 << 31

# Matrix products by oneDNN, each by itself: a step is 1.1 times faster than with XLA's own choice
# (AVX-512). With LIBRARY_FUSION_TYPE_DOT, which fuses what follows a product too and is no faster,
# jaxlib 0.12 gives wrong results: x @ w * s by orders of magnitude.
ON_CPU: dict[str, bool | int | str] = (
    {
        "xla_cpu_use_onednn": True,
        "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
        "xla_cpu_prefer_vector_width": 512,
    }
    if platform.machine() in ("x86_64", "AMD64")
    else {}
)

# XLA:CPU takes six times as long for the same random bits at its highest level.
INIT_ON_CPU: dict[str, bool | int | str] = {"xla_backend_optimization_level": 2}


class TrainState(NamedTuple):
    """Everything a run is at one moment; a checkpoint is this and the data position.

    Attributes:
        step: `[]` int32, batches seen: optimiser steps taken and skipped.
        seed: `[]` uint32, source of all randomness together with `step`.
        model: float32 master weights.
        optimizer: optax state.
        ema: moving average of the model's weights, or `None`.
        carry: what the task takes from step to step, `[B, ...]`: row r is of row r of the batch.
        losses: what spikes of the loss are told by; `()` if they are not looked for.
    """

    step: jax.Array
    seed: jax.Array
    model: Any
    optimizer: optax.OptState
    ema: Any
    carry: Any
    losses: Any = ()


class StepConfig(NamedTuple):
    """What a compiled step depends on, apart from shapes and mesh. Hashable.

    Attributes:
        task: model and loss.
        optimizer: update rule without its learning rate.
        accumulate: microbatches a step; their gradients are summed.
        ema_decay: decay of an exponential moving average of the weights, or `None`.
        tail_average: exponent of a polynomial average in its place (`average_rate`), or `None`.
        qat: which weights the loss sees rounded, and to how many bits.
    """

    task: Task
    optimizer: OptimizerConfig
    accumulate: int = 1
    ema_decay: float | None = None
    tail_average: float | None = None
    qat: QATConfig = QATConfig()

    @property
    def averages(self) -> bool:
        """Whether an average of the weights is kept."""
        return self.ema_decay is not None or self.tail_average is not None


def init_state(config: StepConfig, seed: jax.Array) -> TrainState:
    """The state before the first step; traceable. `seed` is `[]` uint32."""
    model, carry = config.task.init(jax.random.key(seed))
    model = with_steps(model, config.qat)
    optimizer = make_optimizer(config.optimizer, model).init(model)
    # A copy: model and average are donated to the step as two buffers.
    ema = jax.tree.map(jnp.copy, model) if config.averages else None
    losses = () if config.optimizer.skip_sigma is None else guard.no_losses()
    return TrainState(jnp.zeros((), jnp.int32), seed, model, optimizer, ema, carry, losses)


def train_step(
    config: StepConfig, state: TrainState, batch: Batch, learning_rate: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Advances one optimiser step, or skips it.

    A step is skipped if its loss or gradient is not finite, or its loss a spike
    (`OptimizerConfig.skip_sigma`): all but `step` stays as it was, bit by bit. The batch is gone,
    and the next step has noise of its own.

    Args:
        config: task, optimiser, accumulation.
        state: the state before.
        batch: arrays `[B, ...]`; microbatch i holds rows i, i + accumulate, ..., so that each
            device keeps its own rows.
        learning_rate: `[]` float32, or `[2]`: of the weights, and of sparse tables.

    Returns:
        The state after, and the step's metrics: `loss` (the task's, balance terms included),
        `grad_norm` (before clipping), `skipped` (1 or 0), and the task's own.
    """
    task = config.task
    noise = jax.random.fold_in(jax.random.key(state.seed), _NOISE)
    key = jax.random.fold_in(noise, state.step)

    def objective(model: Any, micro: Batch, carry: Any, key: jax.Array) -> Any:
        model = rounded(model, config.qat, state.step)
        loss, aux, carry = task.loss(model, micro, carry, key)
        return loss.total, (loss.weight, aux, carry)

    gradient = jax.value_and_grad(objective, has_aux=True)
    if config.accumulate == 1:
        (total, (weight, aux, carry)), grads = gradient(state.model, batch, state.carry, key)
    else:
        n = config.accumulate

        def split(x: jax.Array) -> jax.Array:
            places = P(*lead_spec(x, 1)) if has_mesh() else None
            rows = jnp.reshape(x, (-1, n, *x.shape[1:]), out_sharding=places)
            return jnp.swapaxes(rows, 0, 1)

        def whole(x: jax.Array) -> jax.Array:
            rows = jnp.swapaxes(x, 0, 1)
            places = P(*lead_spec(rows, 1)) if has_mesh() else None
            return jnp.reshape(rows, (-1, *x.shape[2:]), out_sharding=places)

        def body(sums: Any, xs: Any) -> tuple[Any, Any]:
            grads, total, weight = sums
            (t, (w, aux, carry)), g = gradient(state.model, *xs)
            return (jax.tree.map(jnp.add, grads, g), total + t, weight + w), (w, aux, carry)

        zeros = (jax.tree.map(jnp.zeros_like, state.model), jnp.zeros(()), jnp.zeros(()))
        (grads, total, weight), (weights, auxes, carries) = jax.lax.scan(
            body,
            zeros,
            (*jax.tree.map(split, (batch, state.carry)), jax.random.split(key, n)),
        )
        carry = jax.tree.map(whole, carries)
        share = weights / jnp.maximum(weight, 1.0)
        aux = jax.tree.map(lambda a: jnp.tensordot(share, a, 1), auxes)

    scale = 1.0 / jnp.maximum(weight, 1.0)
    grads = jax.tree.map(lambda g: g * scale, grads)
    optimizer = make_optimizer(config.optimizer, state.model)
    direction, opt_state = optimizer.update(grads, state.optimizer, state.model)
    rate, table_rate = learning_rate if learning_rate.ndim else (learning_rate, learning_rate)

    def moved(old: nnx.Variable, d: nnx.Variable) -> nnx.Variable:
        own = table_rate if isinstance(old, SparseTable) else rate
        if isinstance(old, StepSize):
            return jax.tree.map(lambda p, d: p * jnp.exp(-own * d), old, d)
        return jax.tree.map(lambda p, d: p - own * d, old, d)

    model = jax.tree.map(moved, state.model, direction, is_leaf=is_variable)
    model = task.after_update(model, aux)
    ema = state.ema
    if config.averages:
        ema = _moving_average(state.ema, model, average_rate(config, state.step))
    loss, grad_norm = total * scale, optax.tree.norm(grads)
    bad, losses = guard.is_bad(loss, grad_norm), state.losses
    if config.optimizer.skip_sigma is not None:
        bad |= guard.is_spike(losses, loss, config.optimizer.skip_sigma)
        losses = guard.remember(losses, loss)
    after = state._replace(model=model, optimizer=opt_state, ema=ema, carry=carry, losses=losses)
    after = guard.unless(bad, after, state)._replace(step=state.step + 1)
    return after, {"loss": loss, "grad_norm": grad_norm, "skipped": bad.astype(jnp.int32), **aux}


def average_rate(config: StepConfig, step: jax.Array) -> float | jax.Array:
    """Share of the newest weights in their average.

    With `tail_average` = g it is (g + 1) / (t + g) after t steps: polynomial-decay averaging
    (Shamir and Zhang, arXiv 1212.1824). The average then holds about the last
    1 / (g + 1) of the steps at any length, so that under a constant learning rate one run gives
    the loss of every shorter run.

    Args:
        config: says which average.
        step: `[]` int32, steps taken before this one.
    """
    if config.tail_average is not None:
        return (config.tail_average + 1) / (step + 1 + config.tail_average)
    assert config.ema_decay is not None
    return 1 - config.ema_decay


def _moving_average(ema: Any, model: Any, rate: float | jax.Array) -> Any:
    """Ema + rate x (model - ema) for trained weights; buffers are taken as they are."""

    def one(old: nnx.Variable, new: nnx.Variable) -> nnx.Variable:
        if not isinstance(new, nnx.Param):
            return new
        return new.replace(jax.tree.map(lambda a, b: a + rate * (b - a), old[...], new[...]))

    return jax.tree.map(one, ema, model, is_leaf=is_variable)


class Program(NamedTuple):
    """A compiled step and what is known of it.

    Attributes:
        init: compiled `seed -> TrainState`.
        step: compiled `(state, batch, learning_rate) -> (state, metrics)`; donates the state. The
            learning rate is `[2]` if `OptimizerConfig.table_decay` is given, else `[]`.
        state: abstract state with shardings, for restoring.
        compile_seconds: wall time of tracing and compiling the step.
        memory_bytes: arguments, results and temporaries of the step on one device.
    """

    init: Callable[[np.uint32], TrainState]
    step: Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, jax.Array]]]
    state: TrainState
    compile_seconds: float
    memory_bytes: int


BatchShapes = tuple[tuple[str, tuple[int, ...], Any], ...]


class Lowered(NamedTuple):
    """A traced step that is not compiled yet.

    Attributes:
        step: the program of `Program.step`.
        jaxpr: what it was made of.
        state: abstract state with shardings.
        batch: abstract batch with shardings.
    """

    step: jax.stages.Lowered
    jaxpr: Any
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]


def lower_step(config: StepConfig, mesh: Mesh, batch: BatchShapes) -> Lowered:
    """Traces the step for a mesh, which may be of devices that are only described.

    Arguments and errors as of `compile_step`.
    """
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, spec(("batch",)))
        parts = batch_parts(mesh) * config.accumulate
        for name, shape, _ in batch:
            if shape[0] % parts:
                raise UserError(
                    f"batch_size={shape[0]} ({name}) is not a multiple of data x fsdp x expert x "
                    f"accumulate = {parts}: choose {parts * max(1, round(shape[0] / parts))}"
                )
        inputs = {n: jax.ShapeDtypeStruct(s, d, sharding=rows) for n, s, d in batch}
        abstract = jax.eval_shape(
            functools.partial(init_state, config), jax.ShapeDtypeStruct((), jnp.uint32)
        )
        places = shardings(abstract, mesh)._replace(
            carry=jax.tree.map(lambda _: rows, abstract.carry)
        )
        state = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, places
        )
        rates = () if config.optimizer.table_decay is None else (2,)
        traced = jax.jit(functools.partial(train_step, config), donate_argnums=0).trace(
            state, inputs, jax.ShapeDtypeStruct(rates, jnp.float32)
        )
        return Lowered(traced.lower(), traced.jaxpr, state, inputs)


def compile_step(config: StepConfig, mesh: Mesh, batch: BatchShapes) -> Program:
    """Compiles the step for a mesh and global batch shapes; equal arguments share one program.

    Args:
        config: task, optimiser, accumulation.
        mesh: an Explicit mesh.
        batch: name, global shape and dtype of every array of the batch.

    Raises:
        UserError: if the rows do not divide over the mesh and the microbatches, or an axis of
            the model does not divide over the mesh.
    """
    return _compile(config, mesh, batch, current_rules())


@functools.lru_cache(maxsize=4)
def _compile(
    config: StepConfig, mesh: Mesh, batch: BatchShapes, rules: tuple[tuple[str, Any], ...]
) -> Program:
    """As `compile_step`; `rules` only tells programs apart, tracing reads them where they are."""
    platform = mesh.devices.flat[0].platform
    on_cpu = platform == "cpu"
    keep_programs(platform)
    start = time.perf_counter()
    lowered = lower_step(config, mesh, batch)
    compiled = lowered.step.compile(ON_CPU if on_cpu else None)
    seconds = time.perf_counter() - start
    with jax.set_mesh(mesh):
        init = functools.partial(init_state, config)
        places = jax.tree.map(lambda leaf: leaf.sharding, lowered.state)
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        compiled_init = (
            jax.jit(init, out_shardings=places).lower(seed).compile(INIT_ON_CPU if on_cpu else None)
        )
    memory = compiled.memory_analysis()
    assert memory is not None
    used = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return Program(compiled_init, compiled, lowered.state, seconds, used)
