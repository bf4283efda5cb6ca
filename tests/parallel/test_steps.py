"""Training on any mesh, or in microbatches, is training on one device; what is sent is known."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.test_equality import COMPLAINT, ROOT

# Collectives of one step by run. `WRITE_GOLDEN=1 pytest -m "slow or not slow" <this file>` writes
# what it finds in their place.
GOLDEN = Path(__file__).parent / "golden" / "collectives.json"
MESHES = ("data8", "fsdp8", "tensor4-data2", "expert4-fsdp2", "sequence4-tensor2")
RUNS = {
    "dense": (*MESHES, "one/4", "fsdp8/4"),
    "moe": (*MESHES, "one/4", "expert4-fsdp2/4"),
    "mamba": (*MESHES, "one/4"),
    "hybrid": (*MESHES, "one/4", "sequence2-expert2-tensor2"),
    "trm": (*MESHES[:-1], "one/4"),
    "dense+w4g8": ("fsdp8", "tensor4-data2", "one/4"),
    "moe+w4": ("expert4-fsdp2",),
}


@cache
def train(steps: int, architecture: str, meshes: tuple[str, ...]) -> dict[str, dict]:
    """Runs steps.py on eight fake devices: results by mesh, with what XLA logged."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is not compiled is not logged
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    script = Path(__file__).parent / "steps.py"
    command = [sys.executable, str(script), str(steps), f"{architecture}:{','.join(meshes)}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logs = [part.split("\n", 1)[1] for part in done.stderr.split("=== ")[1:]]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return {m: r | {"log": log} for m, r, log in zip(meshes, results, logs, strict=True)}


def check(architecture: str, mesh: str, found: dict[str, dict]) -> None:
    got, want = found[mesh], found["one/1" if "/" in mesh else "one"]
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-5)
    np.testing.assert_allclose(got["grad_norm"], want["grad_norm"], rtol=1e-4)
    assert COMPLAINT not in got["log"]
    if mesh.startswith("one"):
        assert got["collectives"] == []
    else:
        assert_golden(f"{architecture} {mesh}", got["collectives"])


def assert_golden(name: str, found: list) -> None:
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    counts = {f"{kind} of {group}": count for kind, group, count in found}
    if os.environ.get("WRITE_GOLDEN"):
        golden = golden | {name: counts}
        lines = (f"{json.dumps(k)}: {json.dumps(golden[k])}" for k in sorted(golden))
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert golden.get(name) == counts


def test_three_steps_of_every_layer_on_a_mesh_of_every_kind() -> None:
    found = train(3, "hybrid", ("one", "sequence2-expert2-tensor2"))
    check("hybrid", "sequence2-expert2-tensor2", found)


@pytest.mark.slow
def test_three_steps_with_rounded_activations() -> None:
    """Not more: sooner or later a last bit decides how an activation is rounded."""
    found = train(3, "moe+w8a8", ("one", "tensor4-data2"))
    check("moe+w8a8", "tensor4-data2", found)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", list(RUNS))
def test_twenty_steps_on_every_mesh(architecture: str) -> None:
    found = train(20, architecture, ("one", "one/1", *RUNS[architecture]))
    losses = found["one"]["loss"]
    assert losses[-1] < 0.98 * losses[0], losses  # it learns: the runs had room to differ
    for mesh in RUNS[architecture]:
        check(architecture, mesh, found)
