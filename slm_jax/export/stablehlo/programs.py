"""The programs of a model: an empty state, prefill and decode, for any batch and cache length.

Weights are arguments, so one program serves every checkpoint of a configuration. The programs are
plain XLA for every platform: kernels written for one device are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from slm_jax.models.lm import LM
from slm_jax.nn.module import named_leaves

PLATFORMS = ("cpu", "cuda", "tpu")

MULTIPLE, MOST = 16, 112
"""Tokens of a row that one call of prefill reads: a multiple of the first, at most the second.
Kernels are chosen for 128 tokens or more, a question that a symbol cannot answer."""

_FIXED = 64  # tokens of a row where the length cannot be a symbol


@dataclass(frozen=True)
class Programs:
    """What is exported of a model.

    Attributes:
        start: `[b, c]` bool, of which the shape alone counts, to the state of b rows before the
            first token, with room for c: a list of arrays.
        prefill: weights by path, tokens `[b, s]` int32, positions `[b, s]` int32 (-1 is padding,
            on the left), state; to logits after the last token `[b, vocab]` float32, and the state.
        decode: the same with s = 1.
        multiple: s of prefill is a multiple of this,
        most: and at most this.
        least_room: c is at least this.
    """

    start: export.Exported
    prefill: export.Exported
    decode: export.Exported
    multiple: int
    most: int
    least_room: int


def export_programs(model: LM) -> Programs:
    """Exports a model, quantised or not, abstract or not; nothing is computed.

    The batch is a symbol, and so is the length of what prefill reads, unless a layer has to know
    it (experts of limited capacity): then it is 64.
    """
    windows = [w for w in (getattr(c.mixer, "window", None) for c in model.config.pattern) if w]
    # A ring must be known to hold all tokens of a call, or no more than them.
    most = min([MOST, *(w for w in windows if w > MULTIPLE)]) // MULTIPLE * MULTIPLE
    room = max([MOST + MULTIPLE, *windows])
    with _any_device():
        start = export.export(jax.jit(_start(model)), platforms=PLATFORMS)(
            jax.ShapeDtypeStruct(_symbols("b, c", f"c >= {room}"), jnp.bool_)
        )
        decode = _export_step(model, "1", room)
        try:
            prefill = _export_step(model, f"{MULTIPLE}*n", room, f"n <= {most // MULTIPLE}")
        except (jax.errors.InconclusiveDimensionOperation, TypeError):
            prefill = _export_step(model, str(_FIXED), room)
            return Programs(start, prefill, decode, _FIXED, _FIXED, room)
    return Programs(start, prefill, decode, MULTIPLE, most, room)


def _any_device() -> Any:
    """A device with no kernels of its own, whatever this machine has."""
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def _symbols(dims: str, *constraints: str) -> tuple[Any, ...]:
    return tuple(export.symbolic_shape(dims, constraints=constraints))


def _start(model: LM) -> Callable[..., Any]:
    def start(room: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(model.init_state(*room.shape))

    return start


def _step(model: LM) -> Callable[..., Any]:
    tree, names = jax.tree.structure(model), list(named_leaves(model))
    states = jax.tree.structure(_state_of(model, 1, 1))

    def step(
        weights: dict[str, jax.Array], tokens: jax.Array, positions: jax.Array, state: Any
    ) -> tuple[jax.Array, list[jax.Array]]:
        whole = jax.tree.unflatten(tree, [weights[name] for name in names])
        x, _, new = whole.hidden(
            tokens,
            positions=positions,
            segments=(positions >= 0).astype(jnp.int32),
            state=jax.tree.unflatten(states, state),
        )
        return whole.logits(x[:, -1:])[:, 0], jax.tree.leaves(new)

    return step


def _export_step(model: LM, length: str, room: int, *constraints: str) -> export.Exported:
    if jax.tree.leaves(_state_of(model, 1, room)) == jax.tree.leaves(_state_of(model, 1, room + 1)):
        batch, n = _symbols(f"b, {length}", *constraints)
        state = _state_of(model, batch, room)
    else:  # a symbol must occur in a shape
        batch, capacity, n = _symbols(f"b, c, {length}", f"c >= {room}", *constraints)
        state = _state_of(model, batch, capacity)
    leaves = named_leaves(model).items()
    weights = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in leaves}
    ids = jax.ShapeDtypeStruct((batch, n), jnp.int32)
    step = jax.jit(_step(model), donate_argnums=3)
    return export.export(step, platforms=PLATFORMS)(weights, ids, ids, jax.tree.leaves(state))


def _state_of(model: LM, batch: Any, capacity: Any) -> Any:
    return jax.eval_shape(lambda: model.init_state(batch, capacity))
