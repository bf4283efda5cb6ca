"""What generation runs on the device: prefill, decode, and rows put into a running batch."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from slm_jax.infer.sampling import Sampling, penalised, sample
from slm_jax.models.early_exit import step_until_sure
from slm_jax.models.lm import LM, State
from slm_jax.parallel.rules import batch_parts, has_mesh, spec

CHUNK = 512
"""Tokens of a row that prefill reads at a time, unless told otherwise."""

# Prompt and cache lengths are rounded up to this, so that few programs are compiled.
_ROUND = 16


def round_up(n: int, multiple: int = _ROUND) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


def left_pad(rows: list[np.ndarray], chunk: int = CHUNK) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as one array that ends with everyone's last token.

    Args:
        rows: `[length]` integer arrays.
        chunk: of prefill.

    Returns:
        Tokens and segments (0 = padding, 1 = prompt), `[B, S]` int32; S is a multiple of 16, or
        of `chunk` if it is longer.
    """
    length = round_up(max(len(row) for row in rows))
    if length > chunk:
        length = round_up(length, chunk)
    tokens, segments = np.zeros((2, len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        segments[i, length - len(row) :] = 1
    return tokens, segments


def prefill(
    model: LM,
    tokens: jax.Array | np.ndarray,
    segments: jax.Array | np.ndarray,
    capacity: int,
    *,
    dtype: Any = None,
    spare: int = 0,
    chunk: int = CHUNK,
) -> tuple[jax.Array, State]:
    """Reads the prompts, `chunk` tokens of every row at a time: memory does not grow with them.

    The chunks add up to one pass over the whole prompt, but for experts of limited capacity
    (`dispatch="capacity"`), where each chunk has room of its own.

    Args:
        model: the language model.
        tokens: `[B, S]` int32, padded on the left.
        segments: `[B, S]` int32, 0 = padding, 1 = prompt.
        capacity: tokens of a row that the state can hold, padding not counted.
        dtype: of the cache, as in `LM.init_state`; "int8" is a quantised one.
        spare: the last tokens of a row that may be taken back (`LM.init_state`).
        chunk: tokens of a row read at a time.

    Returns:
        Logits after the last token `[B, V]` float32, and the state.
    """
    positions = _positions(segments)
    first = slice(None, chunk)
    dtype = jnp.dtype(dtype or model.config.dtype)
    logits, state = _begin(
        model, tokens[:, first], positions[:, first], segments[:, first], capacity, dtype, spare
    )
    for start in range(chunk, tokens.shape[1], chunk):
        part = slice(start, start + chunk)
        logits, state = _go_on(model, tokens[:, part], positions[:, part], segments[:, part], state)
    return logits, state


@jax.jit
def _positions(segments: jax.Array) -> jax.Array:
    """Padding gets negative positions, which see and are seen by nothing."""
    return jnp.cumsum(segments, axis=1) - 1


@partial(jax.jit, static_argnames=("capacity", "dtype", "spare"))
def _begin(
    model: LM,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    capacity: int,
    dtype: jnp.dtype,
    spare: int,
) -> tuple[jax.Array, State]:
    empty = model.init_state(tokens.shape[0], capacity, dtype, spare=spare)
    return _read(model, tokens, positions, segments, empty)


def _read(
    model: LM, tokens: jax.Array, positions: jax.Array, segments: jax.Array, state: State
) -> tuple[jax.Array, State]:
    tokens, positions, segments = over_devices(tokens, positions, segments)
    x, _, new = model.hidden(tokens, positions=positions, segments=segments, state=state)
    assert new is not None
    return model.logits(x[:, -1:])[:, 0], new


_go_on = jax.jit(_read, donate_argnames="state")


@partial(jax.jit, donate_argnames="state")
def decode(
    model: LM, tokens: jax.Array, positions: jax.Array, state: State
) -> tuple[jax.Array, State]:
    """Reads one more token a row.

    Args:
        model: the language model.
        tokens: `[B]` int32.
        positions: `[B]` int32, where they stand in their rows; -1 is a row that no one reads.
        state: from `prefill` or the last call; its buffers are reused and it is gone afterwards.

    Returns:
        Logits of the next token `[B, V]` float32, and the new state.
    """
    tokens, positions = over_devices(tokens[:, None], positions[:, None])
    logits, _, new = model(tokens, positions=positions, state=state)
    assert new is not None
    return logits[:, 0], new


@partial(jax.jit, donate_argnames="state")
def decode_until_sure(
    model: LM, tokens: jax.Array, positions: jax.Array, state: State, threshold: jax.Array
) -> tuple[jax.Array, State, jax.Array]:
    """As `decode`, through as many layers as each row needs (`slm_jax.models.early_exit`).

    Returns:
        What `decode` does, and the layers that each row took, `[B]` int32.
    """
    tokens, positions = over_devices(tokens[:, None], positions[:, None])
    return step_until_sure(model, tokens, positions, state, threshold)


@partial(jax.jit, static_argnames="sampling", donate_argnames="seen")
def draw(
    logits: jax.Array,
    sampling: Sampling,
    keys: jax.Array,
    rows: jax.Array,
    drawn: jax.Array,
    seen: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """One token a row.

    Args:
        logits: `[B, V]` float32.
        sampling: how to draw.
        keys: `[n]` PRNG keys,
        rows: and which of them each row draws with, `[B]` int32.
        drawn: `[B]` int32, tokens that the row has drawn so far.
        seen: `[B, V]` bool, the tokens that it has; `None` where nothing is penalised.

    Returns:
        `[B]` int32, and `seen` with them.
    """
    logits = on_all_devices(logits)
    tokens = sample(penalised(logits, seen, sampling), sampling, keys[rows], drawn)
    if seen is not None:
        seen = seen | (jnp.arange(seen.shape[1]) == tokens[:, None])
    return tokens, seen


def over_devices(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Splits rows as those of a training batch, where they divide evenly."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if not has_mesh() or len(arrays[0]) % batch_parts(mesh):
        return arrays
    rows = spec(("batch",))[0]
    return tuple(jax.reshard(a, P(rows, *(None,) * (a.ndim - 1))) for a in arrays)


def on_all_devices(x: jax.Array) -> jax.Array:
    """All of `x` on every device: what is drawn from a row is one decision."""
    return jax.reshard(x, P(*(None,) * x.ndim)) if has_mesh() else x


def tokens_seen(rows: list[np.ndarray], vocab_size: int, sampling: Sampling) -> np.ndarray | None:
    """Which tokens each prompt has: `[B, V]` bool, or `None` where nothing is penalised."""
    if not sampling.penalises:
        return None
    seen = np.zeros((len(rows), vocab_size), bool)
    for i, row in enumerate(rows):
        seen[i, row] = True
    return seen


@partial(jax.jit, donate_argnames="batch")
def put_row(batch: Any, row: Any, slot: jax.Array) -> Any:
    """Replaces one row of a running batch.

    Args:
        batch: a tree of arrays whose first axis is that of the rows; in a `State`'s "blocks", whose
            first axis is that of the layers, it is the second.
        row: the same with one row.
        slot: `[]` int32, which row is replaced.
    """

    def one(path: Any, old: jax.Array, new: jax.Array) -> jax.Array:
        axis = 1 if jax.tree_util.DictKey("blocks") in path else 0
        shape = [-1 if i == axis else 1 for i in range(old.ndim)]
        return jnp.where((jnp.arange(old.shape[axis]) == slot).reshape(shape), new, old)

    return jax.tree_util.tree_map_with_path(one, batch, row)
