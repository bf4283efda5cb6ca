"""The programs of generation, prefill and decode, traced for devices that are not there."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slm_jax.errors import UserError
from slm_jax.infer.step import decode, prefill
from slm_jax.models.lm import LM, LMConfig, State
from slm_jax.parallel import MeshConfig, shardings


@dataclass(frozen=True)
class Serving:
    """One program of generation, for `compile_run`."""

    model: LMConfig
    """The model. Its matrices are held in its compute dtype, the rest in float32."""
    phase: Literal["prefill", "decode"]
    """Read a whole prompt of `context` tokens in one go, or one more token behind so many."""
    context: int
    """Tokens that the caches hold."""
    batch: int = 1
    """Rows."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Of keys and values; `None` is the compute dtype."""
    mesh: MeshConfig = MeshConfig(fsdp=1, tensor=-1)
    """Devices along each axis; by default heads, widths and vocabulary are split over all."""

    def __post_init__(self) -> None:
        if self.phase not in ("prefill", "decode"):
            raise UserError(f"phase={self.phase!r} is not known: choose prefill or decode")
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")


class LoweredServing(NamedTuple):
    """A program of generation before it is compiled.

    Attributes:
        step: the traced and lowered program.
        jaxpr: what was traced.
        weights: shapes, dtypes and shardings of the model.
        state: likewise of the caches: decode reads them, prefill makes them.
        batch: likewise of tokens and their positions.
    """

    step: Any
    jaxpr: Any
    weights: LM
    state: State
    batch: tuple[jax.ShapeDtypeStruct, ...]


def lower_serving(serving: Serving, mesh: Mesh) -> LoweredServing:
    """Traces the program for a mesh, which may be of devices that are only described.

    Raises:
        UserError: if an axis of the model does not divide over the mesh.
    """
    config = serving.model

    def ids(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P()))

    with jax.set_mesh(mesh):
        model = jax.eval_shape(lambda: _held(LM(config, jax.random.key(0))))
        weights = jax.tree.map(
            lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
            model,
            shardings(model, mesh),
        )
        whole = jax.jit(
            partial(
                prefill,
                capacity=serving.context,
                dtype=serving.cache_dtype,
                chunk=serving.context,
            )
        )
        prompt = ids(serving.batch, serving.context)
        made: tuple[Any, State] = jax.eval_shape(whole, weights, prompt, prompt)
        state = made[1]
        if serving.phase == "prefill":
            batch: tuple[jax.ShapeDtypeStruct, ...] = (prompt, prompt)
            traced = whole.trace(weights, *batch)
        else:
            batch = (ids(serving.batch), ids(serving.batch))
            traced = decode.trace(weights, *batch, state)
        return LoweredServing(traced.lower(), traced.jaxpr, weights, state, batch)


def _held(model: LM) -> LM:
    """The model as it is served: what weight decay applies to, the matrices, in compute dtype."""
    dtype = jnp.dtype(model.config.dtype)

    def one(leaf: nnx.Variable) -> nnx.Variable:
        if not leaf.get_metadata().get("decay", False):
            return leaf
        return leaf.replace(leaf.get_value().astype(dtype))

    out: LM = jax.tree.map(one, model, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return out
