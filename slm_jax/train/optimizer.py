"""Optimisers and learning-rate schedules by name."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from slm_jax.errors import UserError
from slm_jax.nn.module import SparseTable, StepSize, is_variable, named_leaves
from slm_jax.nn.parametrization import UpdateScale, update_scale
from slm_jax.parallel.rules import has_mesh


@dataclass(frozen=True)
class OptimizerConfig:
    """Everything about the update but its size (`ScheduleConfig`)."""

    name: Literal["adamw", "adam_atan2", "muon", "lion"] = "adamw"
    """adamw, adam_atan2 (arXiv 2407.05872, as TRM's authors run it), lion (arXiv 2302.06675), or
    muon: orthogonalised momentum for the matrices of the layers, scaled to Adam's update size
    (arXiv 2502.16982), Adam with Nesterov's look-ahead for the rest."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate; never on norms, biases, A_log, D or dt bias."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment (Lion: of the momentum)."""
    eps: float = 1e-8
    """Added to the root of the second moment (adam_atan2 has none)."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; larger ones are scaled down."""
    skip_sigma: float | None = None
    """Also skip steps whose loss is this many standard deviations above the mean of the last 128
    (6 is usual); steps whose loss or gradient is not finite always are."""
    table_decay: float | None = None
    """Weight decay of sparse tables (puzzle embeddings), which sign-SGD moves at a learning rate
    of their own; `None` for models without any."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate by step."""

    learning_rate: float = 1e-3
    """Peak."""
    shape: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: half a cosine, flat then linear (warm-up stable decay), or flat."""
    warmup_steps: int = 100
    """Steps of linear growth from 0."""
    final_fraction: float = 0.1
    """Last learning rate over the peak (cosine and wsd)."""
    decay_fraction: float = 0.2
    """Share of all steps that wsd spends in its decay."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate={self.learning_rate} must be positive")
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps={self.warmup_steps} must not be negative")

    def __call__(self, step: int, total_steps: int) -> float:
        """The learning rate of optimiser step `step` (from 0) of `total_steps`."""
        peak, last = self.learning_rate, self.learning_rate * self.final_fraction
        if step < self.warmup_steps:
            return peak * (step + 1) / (self.warmup_steps + 1)
        if self.shape == "constant":
            return peak
        begin = self.warmup_steps
        if self.shape == "wsd":
            begin = max(begin, round(total_steps * (1 - self.decay_fraction)))
        progress = min(max((step - begin) / max(total_steps - begin, 1), 0.0), 1.0)
        if self.shape == "wsd":
            return peak + (last - peak) * progress
        return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(config: OptimizerConfig, model: Any) -> optax.GradientTransformation:
    """The update direction, to be multiplied by minus the learning rate.

    Args:
        config: which optimiser.
        model: the model, abstract or not: its variables say what is decayed and what is a matrix.

    Returns:
        An optax transformation whose updates are `direction + weight_decay * parameter`, with
        the direction of each weight times its `slm_jax.nn.parametrization.UpdateScale`. Sparse
        tables are left to `_table_rule`: neither clipped nor counted in the norm that clips.

    Raises:
        UserError: if the model has sparse tables and `table_decay` is not given.
    """
    dense = _dense_rule(config, model)
    if not any(isinstance(v, SparseTable) for v in named_leaves(model).values()):
        return dense
    if config.table_decay is None:
        raise UserError(
            "table_decay=None: the model has puzzle embeddings, so give their weight decay "
            "(0.1 in the paper's ARC runs)"
        )
    tables = _map_variables(lambda v: isinstance(v, SparseTable), model)
    others = _map_variables(lambda v: not isinstance(v, SparseTable), model)
    # In functions: a module can be called, and optax calls what can be called.
    return optax.chain(
        optax.masked(dense, lambda _: others),
        optax.masked(_table_rule(config.table_decay), lambda _: tables),
    )


def _dense_rule(config: OptimizerConfig, model: Any) -> optax.GradientTransformation:
    """The rule of everything but sparse tables."""
    decayed = _map_variables(
        lambda v: isinstance(v, nnx.Param) and v.get_metadata().get("decay", True), model
    )
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    scaled = any(update_scale(v) != UpdateScale() for v in named_leaves(model).values())
    if scaled and config.name not in ("lion", "adam_atan2"):
        # Adam of g / s is Adam of g with an eps of s x eps.
        parts.append(_scale_each(lambda v: 1 / update_scale(v).eps))
    match config.name:
        case "adamw":
            parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
        case "adam_atan2":
            parts.append(_scale_by_adam_atan2(config.b1, config.b2))
        case "lion":
            parts.append(optax.scale_by_lion(config.b1, config.b2))
        case "muon":
            parts.append(_muon(config, model))
    if scaled:  # the update, and not the decay after it: see slm_jax.nn.parametrization
        parts.append(_scale_each(functools.partial(_update_factor, config.name)))
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    return optax.chain(*parts)


def _scale_by_adam_atan2(b1: float, b2: float) -> optax.GradientTransformation:
    """atan2(m, sqrt(v) / sqrt(1 - b2^t)) / (1 - b1^t): Adam without eps (arXiv 2407.05872).

    As in the package that TRM's authors use: the correction of the first moment stands outside
    the arc tangent, and there is no factor 4/pi.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
        first = 1 / (1 - b1**count)
        second = jax.lax.rsqrt(1 - b2**count)
        direction = jax.tree.map(lambda m, v: first * jnp.arctan2(m, jnp.sqrt(v) * second), mu, nu)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _table_rule(decay: float) -> optax.GradientTransformation:
    """sign(g) + decay x p on the rows that were read, nothing on the others; no state.

    A row was read if any of its gradient is not zero: gradients of tables are kept dense.
    """

    def one(g: jax.Array, p: jax.Array) -> jax.Array:
        read = jnp.max(jnp.abs(g), axis=-1, keepdims=True) > 0
        return jnp.where(read, jnp.sign(g) + decay * p, 0.0)

    def update(grads: Any, params: Any = None) -> Any:
        return jax.tree.map(one, grads, params)

    return optax.stateless(update)


def _map_variables(f: Any, model: Any) -> Any:
    """`model` with the value of every variable replaced by `f(variable)`."""
    return jax.tree.map(lambda v: v.replace(f(v)), model, is_leaf=is_variable)


def _scale_each(factor: Callable[[nnx.Variable], float]) -> optax.GradientTransformation:
    """Multiplies every update by the `factor` of its variable."""

    def update(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(
            lambda v: v.replace(v.get_value() * factor(v)), updates, is_leaf=is_variable
        )

    return optax.stateless(update)


def _update_factor(optimizer: str, v: nnx.Variable) -> float:
    scale = update_scale(v)
    muon = isinstance(v, StepSize) or _muon_axes(v) is not None
    return scale.muon if optimizer == "muon" and muon else scale.adam


def _muon_axes(v: nnx.Variable) -> MuonDimensionNumbers | None:
    """Which axes of a layer's matrix are inputs and outputs; the others are batches of it."""
    metadata = v.get_metadata()
    n_in, n_out = metadata.get("matrix", (0, 0))
    if not n_in or {"vocab", "experts"} & set(metadata["axes"]):
        return None
    ndim = len(v.get_value().shape)
    outs = tuple(range(ndim - n_out, ndim))
    return MuonDimensionNumbers(tuple(range(ndim - n_out - n_in, ndim - n_out)), outs)


def _muon(config: OptimizerConfig, model: Any) -> optax.GradientTransformation:
    dimensions = _map_variables(_muon_axes, model)
    muon = optax.contrib.muon(
        learning_rate=1.0,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        # In a function: a module can be called, and optax calls what can be called.
        muon_weight_dimension_numbers=lambda _: dimensions,
        consistent_rms=0.2,
    )
    positive = optax.chain(muon, optax.scale(-1.0))

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        if not has_mesh():
            return positive.update(grads, state, params)
        # It reshapes split axes, which Explicit types refuse; results go back to their places.
        places = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (grads, state))
        return jax.sharding.auto_axes(positive.update, out_sharding=places)(grads, state, params)

    return optax.GradientTransformation(positive.init, update)
