"""Loss and gradients on eight devices are those on one, and XLA never replicates to get there."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
COMPLAINT = "Involuntary full rematerialization"


@cache
def compare(*arguments: str) -> dict[str, tuple[list[dict], str]]:
    """Runs compare.py on eight fake devices: results and XLA's log for every architecture."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # The splits are the same at any level, and nothing here runs twice.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is not compiled is not logged
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, str(Path(__file__).parent / "compare.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logs = dict(part.split("\n", 1) for part in done.stderr.split("=== ")[1:])
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return {n: (r, logs[n]) for n, r in zip(logs, [*results, []], strict=True)}


ARCHITECTURES = ["dense", "moe", "moe_capacity", "mamba", "hybrid", "looped"]
# One process for the tests of every day: each architecture with weights gathered, and on the axes
# that do something of their own to it.
EVERY_DAY = (
    "dense:data8,fsdp8,data2-fsdp2-tensor2",
    "moe:data2-fsdp4,expert4-fsdp2",
    "moe_capacity:sequence2-expert2-tensor2",
    "mamba:sequence4-tensor2",
    "hybrid:fsdp4-tensor2",
    "looped:data2-fsdp4",
    "dense@ring:sequence4-tensor2",
    "control",
)
KERNELS = ("dense@tpu:data2-fsdp2-tensor2", "mamba@tpu:data2-fsdp2-tensor2", "control")
THE_OTHER_KERNELS = (
    "dense@tpu:data8,fsdp8",
    "mamba@tpu:data8,fsdp8,sequence4-tensor2",
    "moe@tpu:data8,fsdp8,data2-fsdp2-tensor2",
    "hybrid@tpu:data8,fsdp8,data2-fsdp2-tensor2",
    "control",
)
_ALL = "data8,fsdp8,data2-fsdp2-tensor2,data2-fsdp2-expert2,sequence2-fsdp2-tensor2"
_SPARSE = f"{_ALL},expert4-fsdp2,expert4-tensor2,expert2-sequence2-tensor2"
THE_REST = (
    f"dense:{_ALL},data2-fsdp4,sequence8",
    f"moe:{_SPARSE}",
    f"moe_capacity:{_SPARSE}",
    # Of 16 tokens each device has 4: the convolution reaches over 3.
    f"mamba:{_ALL},data2-fsdp4,sequence4-fsdp2",
    f"hybrid:{_SPARSE},sequence4-tensor2,sequence2-fsdp2-expert2",
    f"looped:{_ALL},sequence4-tensor2",
    "dense@ring:sequence8,sequence2-fsdp4",
    "hybrid@ring:sequence4-expert2,sequence2-data2-tensor2",
    "control",
)


def check(arguments: tuple[str, ...], architecture: str) -> None:
    results, log = compare(*arguments)[architecture]
    [meshes] = [a.partition(":")[2] for a in arguments if a.startswith(f"{architecture}:")]
    assert [r["mesh"] for r in results] == meshes.split(",")
    for r in results:
        assert r["loss"] == pytest.approx(r["loss_without_mesh"], rel=1e-5), r
        assert r["gradient_error"] < 1e-5, r
        assert r["gradient_split_as_weights"], r
    assert COMPLAINT not in log


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "dense@ring"])
def test_a_mesh_does_not_change_loss_or_gradients(architecture: str) -> None:
    check(EVERY_DAY, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "dense@ring", "hybrid@ring"])
def test_no_mesh_changes_loss_or_gradients(architecture: str) -> None:
    check(THE_REST, architecture)


@pytest.mark.parametrize("architecture", ["dense@tpu", "mamba@tpu"])
def test_tpu_kernels_on_a_mesh_do_not_change_loss_or_gradients(architecture: str) -> None:
    check(KERNELS, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["dense@tpu", "mamba@tpu", "moe@tpu", "hybrid@tpu"])
def test_tpu_kernels_on_no_mesh_change_loss_or_gradients(architecture: str) -> None:
    check(THE_OTHER_KERNELS, architecture)


def test_the_complaint_is_seen_when_there_is_one() -> None:
    assert COMPLAINT in compare(*EVERY_DAY)["control"][1]
