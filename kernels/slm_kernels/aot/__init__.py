"""Compiling TPU kernels ahead of time, and simulating them, on a machine without a TPU."""

from slm_kernels.aot.compile import Job, Record, compile_jobs
from slm_kernels.aot.targets import CHIPS, TARGETS, Target, find_libtpu, libtpu_version

__all__ = [
    "CHIPS",
    "TARGETS",
    "Job",
    "Record",
    "Target",
    "compile_jobs",
    "find_libtpu",
    "libtpu_version",
]
