"""Searches block sizes: compiles every candidate without the device and keeps the fastest."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax

from slm_kernels import block_sizes
from slm_kernels.aot import TARGETS, Job, compile_jobs, libtpu_version, simulate
from slm_kernels.aot.compile import pallas_calls
from slm_kernels.block_sizes import Entry, Key, Sizes
from slm_kernels.cases import CASES


def search(case: str, target: str, shape: Mapping[str, int], backward: bool) -> Entry:
    """Simulates the candidates of the case's kernel, prints them and stores the fastest.

    Args:
        case: a key of `CASES`.
        target: a key of `TARGETS`.
        shape: size of each axis.
        backward: of the kernel that computes the gradients, instead of the forward one.

    Returns:
        What was stored.

    Raises:
        ValueError: if the case declares no candidates, or none of them could be simulated.
        FileNotFoundError: if libtpu is not installed.
    """
    if not CASES[case].blocks:
        some = ", ".join(name for name, c in CASES.items() if c.blocks)
        raise ValueError(f"kernel={case!r} has no block sizes to search: choose from {some}")
    function, arguments = CASES[case].build(shape, "tpu", backward)
    with block_sizes.asked() as keys:
        calls = pallas_calls(jax.make_jaxpr(function)(**arguments).jaxpr)
    name = calls[-1].name  # the forward kernel comes first
    entry = _fastest(Job(case, shape, "tpu", backward, len(calls) - 1), name, keys, target)
    block_sizes.write([*block_sizes.read(), entry])
    return entry


def _fastest(job: Job, name: str, keys: list[Key], target: str) -> Entry:
    candidates = CASES[job.case].blocks[name]
    jobs = [
        Job(job.case, job.shape, "tpu", job.backward, job.kernel, {name: sizes})
        for sizes in candidates
    ]
    with tempfile.TemporaryDirectory() as folder:
        records = compile_jobs(target, jobs, simulate.cycles_flags(Path(folder)))
    found: list[tuple[int, Sizes]] = []
    of = f"{job.case} " + ",".join(f"{axis}={n}" for axis, n in job.shape.items())
    print(f"{name} of {of} on {target}")
    for sizes, record in zip(candidates, records, strict=True):
        cycles = sum(o.cycles or 0 for o in simulate.operations(record.hlo) if o.pallas)
        text = f"{cycles:,} cycles, {cycles / TARGETS[target].clock * 1e6:,.1f} us"
        print(f"  {dict(sizes)}: {text if cycles else record.error or 'not simulated'}", flush=True)
        if cycles:
            found.append((cycles, sizes))
    if not found:
        raise ValueError(f"{name} of {of}: none of its block sizes could be simulated")
    cycles, sizes = min(found, key=lambda one: one[0])
    key = next(key for key in keys if key.kernel == name)
    return Entry(key, target, sizes, of, cycles, libtpu_version())
