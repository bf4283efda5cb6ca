"""Slices of TPUs, nodes of GPUs and fake CPUs: what they are, and what a run chooses on them.

Both are read from `tpu_configs/`, a file a kind of chip; peak rates are those of `slm_kernels.aot`.
"""

from slm_jax.slices.choices import (
    accumulate_for,
    apply_choices,
    check_hardware,
    choices_of,
    compiler_flags,
    prepare_process,
    process_environment,
    row_parts,
)
from slm_jax.slices.kind import Choices, Kind
from slm_jax.slices.slice import Slice, find_slice, slice_names

__all__ = [
    "Choices",
    "Kind",
    "Slice",
    "accumulate_for",
    "apply_choices",
    "check_hardware",
    "choices_of",
    "compiler_flags",
    "find_slice",
    "prepare_process",
    "process_environment",
    "row_parts",
    "slice_names",
]
