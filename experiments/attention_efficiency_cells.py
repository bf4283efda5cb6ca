"""The cells of `attention_efficiency`: a model timed here, or compiled for a slice."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.errors import UserError
from slm_jax.infer.step import decode, prefill, round_up
from slm_jax.models.files import read_json
from slm_jax.models.flops import forward_flops
from slm_jax.models.lm import LM, LMConfig, State
from slm_jax.plan import Serving, compile_run, estimated_seconds
from slm_jax.slices import Slice
from slm_jax.train.folder import write_json
from slm_jax.train.serialize import differences

Phase = Literal["prefill", "decode"]
CacheDtype = Literal["float32", "bfloat16", "int8"] | None

_WARM = 2  # decode steps before the clock starts


@dataclass(frozen=True)
class Timing:
    """How a model is timed.

    Attributes:
        batch: rows.
        chunk: tokens of a row that prefill reads at a time.
        new_tokens: decode steps in a round.
        cache_dtype: of keys and values; `None` is the compute dtype.
    """

    batch: int
    chunk: int
    new_tokens: int
    cache_dtype: CacheDtype


class Cells:
    """What was found so far, a line of JSON a cell; a cell that is there is not done again."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        """Opens the cells of a folder, which is made.

        Args:
            out: the folder.
            settings: what all cells share, as JSON.

        Raises:
            UserError: if the folder holds cells of other settings.
        """
        out.mkdir(parents=True, exist_ok=True)
        self._file = out / "cells.jsonl"
        known = out / "settings.json"
        if known.exists() and (changed := differences(read_json(known), settings)):
            raise UserError(
                f"out={out} holds cells of another study ({changed[0]}): choose another --out"
            )
        write_json(known, settings)
        lines = self._file.read_text().splitlines(keepends=True) if self._file.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole != lines:  # a kill has cut the last
            self._file.write_text("".join(whole))
        self._found = {_key(cell): cell for cell in map(json.loads, whole)}

    def get(self, **key: Any) -> dict[str, Any] | None:
        """The cell with these coordinates, or `None`."""
        return self._found.get(_key(key))

    def put(self, cell: dict[str, Any]) -> None:
        """Saves a cell."""
        with self._file.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        self._found[_key(cell)] = cell


def _key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell.get(name) for name in ("arm", "context", "round", "on", "phase"))


def timed(model: LM, phase: Phase, context: int, timing: Timing) -> dict[str, float]:
    """Reads a prompt of `context` tokens, or decodes behind so many.

    Returns:
        Seconds of a prefill, or of the fastest decode step: what makes the others slower is other
        work on these cores.
    """
    if phase == "prefill":
        return {"seconds": _prefill(model, context, timing)}
    return {"seconds": min(_decode(model, context, timing.new_tokens, timing))}


def warm_up(model: LM, phase: Phase, context: int, timing: Timing) -> None:
    """Compiles the programs that `timed` runs."""
    if phase == "prefill":
        _prefill(model, min(context, 2 * timing.chunk), timing, capacity=_capacity(context, timing))
    else:
        _decode(model, context, 1, timing)


def _prefill(model: LM, context: int, timing: Timing, capacity: int | None = None) -> float:
    shape = (timing.batch, context)
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=shape, dtype=np.int32)
    start = time.perf_counter()
    logits, _ = prefill(
        model,
        tokens,
        np.ones(shape, np.int32),
        capacity or _capacity(context, timing),
        dtype=timing.cache_dtype,
        chunk=timing.chunk,
    )
    logits.block_until_ready()
    return time.perf_counter() - start


def _decode(model: LM, context: int, steps: int, timing: Timing) -> list[float]:
    state = filled_state(model.config, context, timing)
    tokens = np.zeros(timing.batch, np.int32)
    seconds = []
    for place in range(context, context + _WARM + steps):
        start = time.perf_counter()
        logits, state = decode(model, tokens, np.full(timing.batch, place, np.int32), state)
        # A sampler has to see the logits before the next step begins.
        logits.block_until_ready()
        seconds.append(time.perf_counter() - start)
    return seconds[_WARM:]


def _capacity(context: int, timing: Timing) -> int:
    return round_up(context + _WARM + timing.new_tokens)


def filled_state(config: LMConfig, context: int, timing: Timing) -> State:
    """The state behind `context` tokens that nobody has read: small random numbers, full slots.

    How long a step takes does not depend on the numbers, and to read 32,768 tokens takes long.
    """
    capacity = _capacity(context, timing)

    def empty() -> State:
        model = LM(config, jax.random.key(0))
        return model.init_state(timing.batch, capacity, timing.cache_dtype)

    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jax.tree_util.keystr(path).endswith(".positions"):
            slots = np.arange(leaf.shape[-1])  # slot s has the last position p with p % slots == s
            last = context - 1 - (context - 1 - slots) % leaf.shape[-1]
            return jnp.broadcast_to(jnp.asarray(np.maximum(last, -1), leaf.dtype), leaf.shape)
        if leaf.dtype == jnp.int8:
            return jnp.asarray(rng.integers(-127, 128, leaf.shape, dtype=np.int8))
        return jnp.asarray(rng.random(leaf.shape, np.float32), leaf.dtype)

    filled: State = jax.tree_util.tree_map_with_path(fill, jax.eval_shape(empty))
    return filled


def compiled(
    config: LMConfig, phase: Phase, context: int, timing: Timing, where: Slice
) -> dict[str, Any]:
    """Compiles a program of generation for a slice; bytes and seconds are of one device.

    Returns:
        What was counted (`bytes`: weights and cache once; `flops` of the slice; `bounds` by both)
        and what the compiler says (`state`, `memory`, `estimate`), or `refusal` if it says no.
    """
    serving = Serving(config, phase, context, timing.batch, timing.cache_dtype)
    try:
        found = compile_run(serving, where)
    except UserError as error:  # the compiler is there (`check_compilers`): this is its answer
        return {"refusal": str(error)}
    flops = timing.batch * (
        prompt_flops(config, context) if phase == "prefill" else token_flops(config, context)
    )
    nbytes = found.arguments["weights"] + found.arguments["state"]
    device = where.device
    return {
        "refusal": found.refusal,
        "weights": found.arguments["weights"],
        "state": found.arguments["state"],
        "bytes": nbytes,
        "flops": flops,
        "bounds": {
            "memory": nbytes / device.bandwidth,
            "matrix units": flops / where.devices / device.flops,
        },
        "memory": found.device_bytes if found.fits else found.temporary_bytes,
        "temporary": found.temporary_bytes,
        "estimate": estimated_seconds(found, where),
        "sent": sum(c.sent for c in found.collectives),
        "kernels": sorted({call.name for call in found.pallas}),
        "compile_seconds": found.compile_seconds,
    }


def prompt_flops(config: LMConfig, context: int) -> float:
    """Operations of reading a prompt: causal, logits of its last token only."""
    one = forward_flops(config, context)
    return context * (one.total - one.head) + one.head


def token_flops(config: LMConfig, context: int) -> float:
    """Operations of the last of `context` tokens, which sees all of them or its window."""
    before = (context - 1) * forward_flops(config, context - 1).total if context > 1 else 0.0
    return context * forward_flops(config, context).total - before


def median_of(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of several rounds of a cell, and how far apart they lie: the range over the median."""
    values = [cell["seconds"] for cell in cells]
    middle = median(values)
    return {
        "rounds": len(values),
        "seconds": middle,
        "range": (max(values) - min(values)) / middle,
    }
