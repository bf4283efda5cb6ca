"""Compiles cases for a TPU that is not there, in a child process.

A child, because libtpu reads its flags once a process, wants `JAX_PLATFORMS=cpu` to be set before
jax starts, and ends the process when its simulator meets what it cannot follow.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slm_kernels.aot.targets import TARGETS, find_libtpu

_TIMEOUT = 1200  # seconds a child may take


@dataclass(frozen=True)
class Job:
    """One program: a case at a shape.

    Attributes:
        case: a key of `slm_kernels.cases.CASES`.
        shape: size of each axis.
        implementation: of the operation, or `"jax"` for the kernel that jax ships.
        backward: forward and backward.
        kernel: compile nothing but this one of the program's Pallas calls, operands in HBM.
        blocks: block sizes by kernel, instead of those that the kernels choose.
    """

    case: str
    shape: Mapping[str, int]
    implementation: str = "tpu"
    backward: bool = False
    kernel: int | None = None
    blocks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class PallasCall:
    """What a `pallas_call` says of itself.

    Attributes:
        name: given by its author.
        flops: of its cost estimate, or 0.
        transcendentals: likewise.
        bytes: likewise.
        split: whether an axis of its grid is parallel, so that two cores share it.
        runs: how often the scans around it run it.
    """

    name: str
    flops: float
    transcendentals: float
    bytes: float
    split: bool
    runs: int


@dataclass(frozen=True)
class Record:
    """What came of a job.

    Attributes:
        job: the job.
        seconds: wall clock of tracing and compiling.
        error: why there is no program, or empty.
        hlo: the optimised program as text.
        temp_bytes: HBM that the program needs beside arguments and results.
        calls: its Pallas calls.
    """

    job: Job
    seconds: float = 0.0
    error: str = ""
    hlo: str = ""
    temp_bytes: int = 0
    calls: Sequence[PallasCall] = field(default_factory=tuple)


def compile_jobs(target: str, jobs: Sequence[Job], flags: Sequence[str] = ()) -> list[Record]:
    """Compiles every job for one device of `target`.

    Args:
        target: a key of `TARGETS`.
        jobs: what to compile.
        flags: of libtpu (`LIBTPU_INIT_ARGS`).

    Returns:
        One record a job, in order. A job that ends the child is a record with its error, and the
        next one starts a child of its own.

    Raises:
        ValueError: if the target is unknown.
        FileNotFoundError: if libtpu is not installed.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is unknown: choose from {', '.join(TARGETS)}")
    environment = child_environment(flags)
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        request, out = Path(folder) / "request.json", Path(folder) / "records.jsonl"
        while len(records) < len(jobs):
            rest = jobs[len(records) :]
            request.write_text(json.dumps({"target": target, "jobs": [asdict(j) for j in rest]}))
            out.write_text("")
            start = time.perf_counter()
            child = subprocess.run(
                [sys.executable, "-m", "slm_kernels.aot.compile", str(request), str(out)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                check=False,
            )
            lines = out.read_text().splitlines()
            records += [_record(job, line) for job, line in zip(rest, lines, strict=False)]
            if len(lines) < len(rest):
                seconds = time.perf_counter() - start
                records.append(Record(rest[len(lines)], seconds, _why(child.stderr)))
    return records


def _record(job: Job, line: str) -> Record:
    fields = json.loads(line)
    return Record(job, **{**fields, "calls": [PallasCall(**c) for c in fields.get("calls", ())]})


def _why(stderr: str) -> str:
    """The line of a dead child's output that says what happened."""
    told = re.search(r"Static LLO profiling of .*? failed: .*", stderr) or re.search(
        r"^(?:[\w.]*(?:Error|Exception): |F\d{4} .*\] ).*", stderr, re.M
    )
    return told.group() if told else f"the compiler ended without a word: {stderr[-300:]}"


def _pallas_equations(jaxpr: Any, runs: int = 1) -> Iterator[tuple[Any, int]]:
    """Every Pallas call in a jaxpr, nested ones too, with how often scans run it."""
    from jax.extend.core import jaxprs_in_params

    for equation in jaxpr.eqns:
        # The second is what the kernels for Hopper (`plgpu.kernel`) are traced to.
        if equation.primitive.name in ("pallas_call", "mpmd_map"):
            yield equation, runs
            continue
        inside = runs * equation.params["length"] if equation.primitive.name == "scan" else runs
        for inner in jaxprs_in_params(equation.params):
            yield from _pallas_equations(inner, inside)


def _describe(equation: Any, runs: int) -> PallasCall:
    cost = equation.params["cost_estimate"]
    semantics = getattr(equation.params["compiler_params"], "dimension_semantics", None) or ()
    return PallasCall(
        name=equation.params["name"] or equation.params["jaxpr"].debug_info.func_name.lstrip("_"),
        flops=cost.flops if cost else 0,
        transcendentals=cost.transcendentals if cost else 0,
        bytes=cost.bytes_accessed if cost else 0,
        split=any("parallel" in str(axis).lower() for axis in semantics),
        runs=runs,
    )


def pallas_calls(jaxpr: Any) -> list[PallasCall]:
    """What the Pallas calls of a jaxpr, nested ones too, say of themselves."""
    return [_describe(*found) for found in _pallas_equations(jaxpr)]


def child_environment(flags: Sequence[str] = ()) -> dict[str, str]:
    """The environment of a process that compiles for a TPU that is not there.

    Args:
        flags: of libtpu (`LIBTPU_INIT_ARGS`).

    Raises:
        FileNotFoundError: if libtpu is not installed.
    """
    environment = {
        **os.environ,
        # Last, so that the folder of libtpu hides no installed package.
        "PYTHONPATH": os.pathsep.join(
            [*filter(None, [os.environ.get("PYTHONPATH")]), str(find_libtpu())]
        ),
        "LIBTPU_INIT_ARGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # no cloud to ask which machine this is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two children may compile at a time
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # a program from the cache leaves no dump
    }
    environment.pop("XLA_FLAGS", None)  # those of the CPU tests
    return environment


def _compile(target: str, job: Job) -> dict[str, Any]:
    """Runs in the child: the fields of a record."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from slm_kernels import block_sizes
    from slm_kernels.cases import CASES

    start = time.perf_counter()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[target].topology)
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())

    def place(arrays: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), arrays
        )

    try:
        # The abstract mesh tells Pallas which chip it compiles for.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), block_sizes.trying(job.blocks):
            function, arguments = CASES[job.case].build(job.shape, job.implementation, job.backward)
            program = jax.jit(function).trace(**place(arguments))
            equations = list(_pallas_equations(program.jaxpr.jaxpr))
            if job.kernel is not None:
                equation = equations[job.kernel][0]
                options = equation.primitive.get_bind_params(equation.params)
                bound = functools.partial(equation.primitive.bind, **options)
                program = jax.jit(bound).trace(*place([x.aval for x in equation.invars]))
            compiled = program.lower(lowering_platforms=("tpu",)).compile()
    except Exception as e:
        message = str(e).strip().splitlines() or [""]
        return {
            "seconds": time.perf_counter() - start,
            "error": f"{type(e).__name__}: {' '.join(message[:3])[:500]}",
        }
    return {
        "seconds": time.perf_counter() - start,
        "hlo": compiled.as_text(),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "calls": [asdict(_describe(*e)) for e in equations],
    }


def main(request: str, out: str) -> None:
    """The child: reads the request, appends a line of JSON a job."""
    wanted = json.loads(Path(request).read_text())
    with Path(out).open("a") as f:
        for job in wanted["jobs"]:
            print(json.dumps(_compile(wanted["target"], Job(**job))), file=f, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
