"""Where Pallas kernels run: compiled on the accelerator, or interpreted on a CPU by tests."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

_interpret: ContextVar[Any] = ContextVar("slm_kernels_interpret", default=False)


@contextlib.contextmanager
def interpreted(params: Any = None) -> Iterator[None]:
    """Runs the TPU kernels that are traced inside on the CPU, step by step.

    Args:
        params: what `pallas_call(interpret=...)` takes; by default memory starts as NaN and races
            between memory accesses are errors.
    """
    if params is None:
        params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    token = _interpret.set(params)
    # A program traced before, or outside, must not be taken for this one.
    jax.clear_caches()
    try:
        yield
    finally:
        _interpret.reset(token)
        jax.clear_caches()


def interpret() -> Any:
    """What a kernel passes as `pallas_call(interpret=...)`."""
    return _interpret.get()
