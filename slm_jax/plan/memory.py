"""A lower bound of a step's memory, without a compiler: for leaving out what cannot fit."""

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from slm_jax.parallel import MESH_AXES
from slm_jax.parallel.rules import shardings
from slm_jax.plan.program import Run
from slm_jax.slices import row_parts
from slm_jax.train import experiment, trm_experiment
from slm_jax.train.experiment import Experiment
from slm_jax.train.step import StepConfig, init_state


def least_bytes(run: Run, devices: int) -> int:
    """Bytes of one device that every program of the step needs at one moment.

    State and batch are there throughout. Beside them are, at the end of the backward pass, the
    gradients, in the compute dtype at least; at its beginning, what `jax.checkpoint` keeps, the
    input of every period of layers, and with microbatches the sums of gradients.

    Args:
        run: the configuration.
        devices: how many the mesh is of.

    Raises:
        UserError: if an axis of the model does not divide over the mesh.
    """
    sizes = dict(zip(MESH_AXES, run.mesh.resolve(devices), strict=True))
    same: Any = replace(run, accumulate=1)  # neither changes the state: one trace a mesh
    same = replace(same, model=replace(same.model, remat="none"))
    if isinstance(run, Experiment):
        step, batch = experiment.step_inputs(same)
    else:
        step, batch = trm_experiment.step_inputs(same)
    state, weights, carry = _state_bytes(step, tuple(sizes.items()))
    shards = row_parts(run.mesh, devices)
    rows = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for _, shape, dtype in batch) // shards
    gradients = weights * jnp.dtype(run.model.dtype).itemsize // 4  # masters are float32
    saved = 0
    if isinstance(run, Experiment) and run.model.recursion is None:
        model = run.model
        tokens = run.batch_size * run.seq_len // (shards * run.accumulate * sizes["sequence"])
        dtype = jnp.dtype(model.residual_dtype or model.dtype)
        periods = model.n_layers // len(model.pattern)
        saved = tokens * model.d_model * dtype.itemsize * periods
    state += carry // shards
    return state + rows + (weights + saved if run.accumulate > 1 else max(gradients, saved))


@functools.lru_cache(maxsize=256)
def _state_bytes(step: StepConfig, sizes: tuple[tuple[str, int], ...]) -> tuple[int, int, int]:
    """Bytes of one device: the state without its carry, its weights; and of the whole carry."""
    mesh: Any = AbstractMesh(
        tuple(n for _, n in sizes),
        tuple(name for name, _ in sizes),
        axis_types=(AxisType.Explicit,) * len(sizes),
    )
    abstract = jax.eval_shape(
        functools.partial(init_state, step), jax.ShapeDtypeStruct((), jnp.uint32)
    )
    places = shardings(abstract._replace(carry=()), mesh)
    parts = abstract._asdict()
    whole = {
        name: _nbytes(parts[name], getattr(places, name)) for name in ("model", "optimizer", "ema")
    }
    return sum(whole.values()), whole["model"], _nbytes(abstract.carry, None)


def _nbytes(tree: Any, places: Any) -> int:
    arrays = jax.tree.leaves(tree)
    split = jax.tree.leaves(places) if places is not None else [None] * len(arrays)
    return sum(
        math.prod(a.shape if s is None else s.shard_shape(a.shape)) * a.dtype.itemsize
        for a, s in zip(arrays, split, strict=True)
    )
