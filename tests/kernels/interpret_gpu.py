"""What jax's interpreter of Mosaic GPU kernels lacks: a left operand of wgmma in registers."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
from jax.experimental.pallas import mosaic_gpu as plgpu
from slm_kernels.pallas import interpreted

_wgmma = gpu_callbacks.wgmma


@gpu_callbacks.fail_on_exception
def _wgmma_registers(
    *,
    token: jax.Array,
    thread: Any,
    mesh_location: Any,
    acc_allocation_key_as_array: jax.Array,
    a_allocation_key_as_array: jax.Array,
    b_allocation_key_as_array: jax.Array,
    b_transforms: tuple[Any, ...],
    source_info: Any = None,
    **_: Any,
) -> jax.Array:
    memory = gpu_callbacks._get_shared_memory()
    note = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)
    acc_key, b_key = (
        gpu_callbacks.HostAllocationKey.from_array(key)
        for key in (acc_allocation_key_as_array, b_allocation_key_as_array)
    )
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(b_transforms))
    whole, part = memory.access(acc_key, ()), memory.access(b_key, transforms)
    acc, _, _ = memory.get_buffer_content(acc_key, whole, thread, logging_info=note)
    b, _, _ = memory.get_buffer_content(b_key, part, thread, logging_info=note)
    acc = acc + np.matmul(np.asarray(a_allocation_key_as_array), b, dtype=acc.dtype)
    memory.store_buffer_content(acc_key, whole, acc, thread, logging_info=note)
    return token


def _either(**operands: Any) -> jax.Array:
    in_registers = operands["a_allocation_key_as_array"].ndim == 2  # a key to memory is a vector
    return (_wgmma_registers if in_registers else _wgmma)(**operands)


@contextlib.contextmanager
def interpreted_gpu(**params: Any) -> Iterator[None]:
    """Runs the GPU kernels traced inside on the CPU; races are errors, memory starts as NaN."""
    params = {"detect_races": True, "uninitialized_memory": "nan"} | params
    with (
        mock.patch.object(gpu_callbacks, "wgmma", _either),
        interpreted(plgpu.InterpretGPUParams(**params)),
    ):
        yield
