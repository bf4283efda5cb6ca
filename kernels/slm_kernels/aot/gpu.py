"""Compiles cases for a GPU that is not there, and reads what ptxas and the machine code say.

jax's CUDA plugin compiles for a described GPU without a driver, in a child process that is told to
keep off other devices; Mosaic GPU leaves there the PTX of each Pallas kernel.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slm_kernels.aot.compile import Job
from slm_kernels.aot.gpu_targets import (
    GPU_TARGETS,
    GPUS,
    GpuTarget,
    Kernel,
    find_cuda,
    read_kernel,
    tools,
)
from slm_kernels.cases.case import Work

_TIMEOUT = 1200  # seconds a child may take


@dataclass(frozen=True)
class GpuRecord:
    """What came of a job.

    Attributes:
        job: the job.
        seconds: wall clock of tracing and compiling.
        error: why there is no program, or empty.
        hlo: the optimised program as text.
        temp_bytes: HBM that the program needs beside arguments and results.
        kernels: its Pallas kernels.
    """

    job: Job
    seconds: float = 0.0
    error: str = ""
    hlo: str = ""
    temp_bytes: int = 0
    kernels: Sequence[Kernel] = field(default_factory=tuple)


def compile_for_gpu(target: str, jobs: Sequence[Job]) -> list[GpuRecord]:
    """Compiles every job for `target`, in one child process.

    Args:
        target: a key of `GPU_TARGETS`.
        jobs: what to compile; `Job.kernel` is not used.

    Returns:
        One record a job, in order; jobs after one that ended the child have its error.

    Raises:
        ValueError: if the target is unknown.
        FileNotFoundError: if the compiler is not installed.
    """
    if target not in GPU_TARGETS:
        raise ValueError(f"target={target!r} is unknown: choose from {', '.join(GPU_TARGETS)}")
    environment = gpu_environment()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        request, out, dumps = work / "request.json", work / "records.jsonl", work / "dumps"
        request.write_text(json.dumps({"target": target, "jobs": [asdict(j) for j in jobs]}))
        out.write_text("")
        dumps.mkdir()
        environment |= {
            "MOSAIC_GPU_DUMP_TO": str(dumps),
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_RESOURCES": "1",
        }
        child = subprocess.run(
            [sys.executable, "-m", "slm_kernels.aot.gpu", str(request), str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        records = []
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        for job, fields in zip(jobs, lines, strict=False):
            dumped = fields.pop("dumped", ())
            kernels = [read_kernel(dumps / ptx, dumps / said, target) for ptx, said in dumped]
            records.append(GpuRecord(job, **fields, kernels=kernels))
        dead = f"the compiler ended without a word: {child.stderr[-300:]}"
        return records + [GpuRecord(job, error=dead) for job in jobs[len(records) :]]


def gpu_environment() -> dict[str, str]:
    """Of a child process that compiles for a GPU which is not there.

    Raises:
        FileNotFoundError: if the compiler is not installed.
    """
    folder = find_cuda()
    paths = [os.environ.get("PYTHONPATH"), str(folder) if folder is not None else None]
    environment = {
        **os.environ,
        # Last, so that the folder of the plugin hides no installed package.
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": f"{tools()}{os.pathsep}{os.environ.get('PATH', '')}",
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # which want a driver
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # a program from the cache leaves no dump
    }
    environment.pop("XLA_FLAGS", None)  # those of the CPU tests
    return environment


def describe_gpus(target: str, number: int, nodes: int = 1) -> Sequence[Any]:
    """The devices of nodes with so many GPUs each, in a process of `gpu_environment`.

    Args:
        target: a key of `GPUS`.
        number: GPUs of a node.
        nodes: how many are joined by a network.
    """
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=target,
        topology=f"1x{nodes}x{number}",
        target_config=GPUS[target].describe(),
    ).devices


LIMITS = (
    "nothing is simulated: instructions count once however often they run; there are no cycles",
    "floor: the largest of matrix flops, HBM bytes and exponentials, each at the chip's peak",
    "registers are those at the start: the warpgroups that compute then take 240, the copier 24",
)

_COUNTED = {"HGMMA": "wgmma", "UTMALDG": "TMA in", "UTMASTG": "TMA out", "MUFU": "MUFU"}


def table(record: GpuRecord, work: Work, target: GpuTarget) -> str:
    """The kernels of a record as aligned text, and the least time of the whole."""
    head = ["kernel", "registers", "spills st/ld", "shared", "instructions", *_COUNTED.values()]
    lines = [head] + [
        [
            k.name,
            str(k.registers),
            f"{k.spill_stores}/{k.spill_loads} B",
            f"{k.shared / 1024:.0f} KiB",
            str(sum(k.operations.values())),
            *(str(k.operations.get(name, 0)) for name in _COUNTED),
        ]
        for k in record.kernels
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    bounds = {
        "wgmma": work.flops / target.flops,
        "HBM": work.bytes / target.bandwidth,
        "MUFU": work.transcendentals / target.transcendentals,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    text.append(
        f"whole: least {work.bytes / 1e6:,.2f} MB, {work.flops / 1e9:,.1f} Gflop: floor "
        f"{bounds[bound] * 1e6:,.1f} us ({bound}); {record.temp_bytes / 1e6:,.2f} MB beside "
        "arguments and results"
    )
    text += [f"{k.name}: ptxas warns {', '.join(k.warnings)}" for k in record.kernels if k.warnings]
    return "\n".join(text)


def profile(
    case: str, target: str, shape: Mapping[str, int], implementation: str, backward: bool
) -> GpuRecord:
    """Compiles one program.

    Raises:
        ValueError: if the program does not compile.
        FileNotFoundError: if the compiler is not installed.
    """
    record = compile_for_gpu(target, [Job(case, shape, implementation, backward)])[0]
    if record.error:
        raise ValueError(f"kernel={case!r} does not compile for {target}: {record.error}")
    return record


def _compile(target: str, job: Job) -> dict[str, Any]:
    """Runs in the child: the fields of a record, and the names of the PTX files."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from slm_kernels.cases import CASES

    start = time.perf_counter()
    dumps = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    before = set(dumps.iterdir())
    mesh = Mesh(np.array(describe_gpus(target, 1)), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())
    try:
        # The abstract mesh tells Pallas which chip it compiles for.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            function, arguments = CASES[job.case].build(job.shape, job.implementation, job.backward)
            placed = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), arguments
            )
            compiled = jax.jit(function).lower(**placed).compile()
    except Exception as e:
        message = str(e).strip().splitlines() or [""]
        return {
            "seconds": time.perf_counter() - start,
            "error": f"{type(e).__name__}: {' '.join(message[:3])[:500]}",
        }
    memory = compiled.memory_analysis()
    assert memory is not None
    new = [p.name for p in set(dumps.iterdir()) - before]
    return {
        "seconds": time.perf_counter() - start,
        "hlo": compiled.as_text(),
        "temp_bytes": memory.temp_size_in_bytes,
        "dumped": _pairs(new),
    }


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Files of PTX and of resources that belong together: NAME_NUMBER.ending, numbered apart."""
    found: dict[tuple[str, str], list[tuple[int, str]]] = collections.defaultdict(list)
    for file in names:
        if kernel := re.fullmatch(r"(.*)_(\d+)\.(ptx|resources\.txt)", file):
            found[kernel[1], kernel[3]].append((int(kernel[2]), file))
    kernels = [name for name, ending in found if ending == "ptx"]
    pairs = [
        (ptx, said)
        for name in kernels
        for ptx, said in zip(
            sorted(found[name, "ptx"]), sorted(found[name, "resources.txt"]), strict=True
        )
    ]
    return [(ptx, said) for (_, ptx), (_, said) in sorted(pairs)]


def main(request: str, out: str) -> None:
    """The child: reads the request, appends a line of JSON a job."""
    wanted = json.loads(Path(request).read_text())
    with Path(out).open("a") as f:
        for job in wanted["jobs"]:
            print(json.dumps(_compile(wanted["target"], Job(**job))), file=f, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
