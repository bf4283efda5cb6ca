"""Compiles a step of a run, or of generation, for devices that are not there, in a child process.

A child, because libtpu wants `JAX_PLATFORMS=cpu` and its flags before jax starts, and the caller
has devices of its own.
"""

import hashlib
import importlib.metadata
import json
import math
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

from slm_kernels.aot import compile as aot
from slm_kernels.aot import find_libtpu, simulate
from slm_kernels.aot.gpu import describe_gpus, gpu_environment
from slm_kernels.aot.gpu_targets import GPUS

import slm_jax
from slm_jax.errors import UserError
from slm_jax.plan.collectives import Collective, read_collectives
from slm_jax.plan.serving import Serving, lower_serving
from slm_jax.slices import Slice, compiler_flags
from slm_jax.train import experiment, trm_experiment
from slm_jax.train.experiment import Experiment
from slm_jax.train.serialize import from_json, to_json
from slm_jax.train.trm_experiment import TRMExperiment

Run = Experiment | TRMExperiment

_RUNS: dict[str, Any] = {c.__name__: c for c in (Experiment, TRMExperiment, Serving)}
_TIMEOUT = 3600  # seconds a compilation may take
# What of slm_jax decides what is compiled and what is read off it.
_SOURCES = (
    "models", "nn", "parallel", "compress", "train", "plan/program.py", "plan/collectives.py"
)  # fmt: skip
_SERVING_SOURCES = ("infer", "plan/serving.py")
_KEPT = Path(".cache/plan")


@dataclass(frozen=True)
class Compiled:
    """What the compiler said of a step. Bytes are of one device.

    Attributes:
        arguments: what the step is given, by class: weights, optimizer, average, carry, batch; of
            generation weights, state (of prefill: what it leaves behind) and batch.
        argument_bytes: all of it as the chip lays it out, padding included; 0 if it did not fit.
        new_bytes: results that take no argument's place.
        temporary_bytes: what it needs beside them; if it did not fit, all that it needs.
        code_bytes: the program.
        fits: whether there is a program.
        refusal: why there is none.
        collectives: of a step.
        cycles: XLA's estimate for its own operations (not those of `pallas`, nor collectives), or
            `None` if a loop has no known length, or on a GPU.
        pallas: Pallas calls of a step.
        trace_seconds: wall time of tracing.
        compile_seconds: wall time of compiling.
    """

    arguments: Mapping[str, int]
    argument_bytes: int = 0
    new_bytes: int = 0
    temporary_bytes: int = 0
    code_bytes: int = 0
    fits: bool = True
    refusal: str = ""
    collectives: Sequence[Collective] = ()
    cycles: int | None = None
    pallas: Sequence[aot.PallasCall] = field(default_factory=tuple)
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def device_bytes(self) -> int:
        """Memory of a step."""
        return self.argument_bytes + self.new_bytes + self.temporary_bytes + self.code_bytes


def compile_run(run: Run | Serving, where: Slice, *, kept: Path | None = _KEPT) -> Compiled:
    """Compiles the step of a run, or a program of generation, for a slice, with its flags.

    Args:
        run: the configuration; `run.mesh` is resolved on the devices.
        where: the devices.
        kept: folder of results by what they depend on, sources included; `None` keeps none.

    Raises:
        UserError: if the compiler is not installed, the run does not divide over the mesh, or the
            compiler gives up for another reason than memory.
    """
    limit, flags = where.hbm, compiler_flags(where)
    try:
        if where.platform == "tpu":
            environment, compiler = aot.child_environment(), _libtpu_version()
        else:
            environment, compiler = gpu_environment(), "cuda"
    except FileNotFoundError as e:
        raise UserError(str(e)) from None
    given = to_json(run)
    # What has no influence on the program.
    same = {"seed": 0, "steps": 1, "out": "runs/plan", "overwrite": False}
    request = {
        "run": given | {name: value for name, value in same.items() if name in given},
        "topology": where.topology,
        "slices": where.slices,
        "chip_config": where.kind.chip_config,
        "flags": flags,
    }
    path = None if kept is None else kept / f"{_key(request, compiler)}.json"
    if path is None or not path.exists():
        answer = _ask(request, environment | flags)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Whole or not at all: others may read it.
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(answer))
            part.replace(path)
    else:
        answer = json.loads(path.read_text())
    found = _read(answer)
    used = found.device_bytes
    if found.fits and used > limit:  # no compiler of GPU programs refuses one
        return Compiled(
            found.arguments,
            temporary_bytes=used,
            fits=False,
            refusal=f"{used} bytes of {limit:.0f}",
            trace_seconds=found.trace_seconds,
            compile_seconds=found.compile_seconds,
        )
    return found


def _libtpu_version() -> str:
    found = importlib.metadata.distributions(path=[str(find_libtpu())])
    (version,) = {d.version for d in found if d.name == "libtpu"}
    return version


def _key(request: Mapping[str, Any], compiler: str) -> str:
    """Hash of all that decides what the answer is."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode())
    digest.update(f"{importlib.metadata.version('jax')} {compiler}".encode())
    package, kernels = Path(slm_jax.__file__).parent, Path(aot.__file__).parents[1]
    names = _SOURCES + (_SERVING_SOURCES if request["run"]["type"] == "Serving" else ())
    for part in (*(package / name for name in names), kernels):
        for source in sorted(part.rglob("*.py")) if part.is_dir() else [part]:
            name = source.relative_to(part.parent).as_posix()
            digest.update(name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:32]


def _ask(request: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs the child."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "request.json", Path(folder) / "answer.json"
        given.write_text(json.dumps(request))
        try:
            child = subprocess.run(
                [sys.executable, "-m", "slm_jax.plan.program", str(given), str(out)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"the compiler took more than {_TIMEOUT} s: plan a smaller run"
            ) from None
        if not out.exists():
            last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
            raise UserError(f"the compiler ended without an answer: {last[0][:300]}")
        answer: dict[str, Any] = json.loads(out.read_text())
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def _read(answer: Mapping[str, Any]) -> Compiled:
    collectives = [Collective(**c) for c in answer.get("collectives", ())]
    pallas = [aot.PallasCall(**c) for c in answer.get("pallas", ())]
    return Compiled(**{**answer, "collectives": collectives, "pallas": pallas})


def refusal_bytes(message: str) -> int | None:
    """Bytes that a program needed which libtpu refused for its memory; `None`: another reason.

    It says "Used 17.2G of 15.75G hbm", or earlier "the total memory required for HLO temporaries
    (20.80G) exceeds available HBM (15.75G)".
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    told = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message) or re.search(
        r"\(([\d.]+)([KMGT])\) exceeds available HBM", message
    )
    return None if told is None else round(float(told[1]) * 1024 ** (" KMGT".index(told[2])))


def _describe(topology: str, slices: int, chip_config: str | None) -> Sequence[Any]:
    """Devices that are not there."""
    from jax.experimental import topologies

    kind, _, shape = topology.partition(":")
    if kind in GPUS:
        _, nodes, number = map(int, shape.split("x"))
        return describe_gpus(kind, number, nodes)
    config: dict[str, Any] = {} if chip_config is None else {"chip_config_name": chip_config}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology, num_slices=slices, **config
    ).devices


def _lower(run: Run | Serving, mesh: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The lowered program, its jaxpr, and what it is given by class."""
    from slm_jax.train.step import lower_step

    if isinstance(run, Serving):
        serving = lower_serving(run, mesh)
        return serving.step, serving.jaxpr, {
            "weights": serving.weights, "state": serving.state, "batch": serving.batch
        }  # fmt: skip
    if isinstance(run, Experiment):
        step, batch = experiment.step_inputs(run)
    else:
        step, batch = trm_experiment.step_inputs(run)
    lowered = lower_step(step, mesh, batch)
    state = lowered.state
    return lowered.step, lowered.jaxpr, {
        "weights": state.model, "optimizer": state.optimizer, "average": state.ema,
        "carry": state.carry, "batch": lowered.batch,
    }  # fmt: skip


def _compile(
    run: Run | Serving, topology: str, slices: int, chip_config: str | None
) -> dict[str, Any]:
    """Runs in the child: the fields of `Compiled`."""
    import jax

    from slm_jax.parallel import make_mesh

    mesh = make_mesh(run.mesh, _describe(topology, slices, chip_config))
    start = time.perf_counter()
    with run.mesh.rules():
        step, jaxpr, arguments = _lower(run, mesh)
    traced = time.perf_counter()

    def nbytes(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        sizes = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
        return sum(sizes)

    answer: dict[str, Any] = {
        "arguments": {name: nbytes(tree) for name, tree in arguments.items()},
        "trace_seconds": traced - start,
    }
    try:
        compiled = step.compile()
    except jax.errors.JaxRuntimeError as e:
        needed = refusal_bytes(str(e))
        if needed is None:
            raise
        seconds = time.perf_counter() - traced
        return answer | {
            "fits": False,
            "refusal": str(e).splitlines()[0][:300],
            "temporary_bytes": needed,
            "compile_seconds": seconds,
        }
    seconds = time.perf_counter() - traced
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert hlo is not None
    cycles = None
    try:
        if mesh.devices.flat[0].platform == "tpu":  # GPUs are simulated by nothing
            cycles = sum(
                op.runs * (op.cycles or 0) for op in simulate.operations(hlo) if not op.pallas
            )
    except ValueError:
        pass
    return answer | {
        "argument_bytes": memory.argument_size_in_bytes,
        "new_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "collectives": [asdict(c) for c in read_collectives(hlo, mesh.size)],
        "cycles": cycles,
        "pallas": [asdict(c) for c in aot.pallas_calls(jaxpr)],
        "compile_seconds": seconds,
    }


def main(given: str, out: str) -> None:
    """The child: reads the request, writes the answer or a mistake of the user's."""
    request = json.loads(Path(given).read_text())
    kind: Any = _RUNS[request["run"]["type"]]
    try:
        run = from_json(kind, request["run"])
        answer = _compile(run, *(request[k] for k in ("topology", "slices", "chip_config")))
    except UserError as e:
        answer = {"error": str(e)}
    except Exception as e:
        message = " ".join(str(e).split()) or "no message"
        answer = {"error": f"the compiler refused the step: {type(e).__name__}: {message[:500]}"}
    Path(out).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
