"""What launchers are given: golden texts, fields that must hold on every slice, scripts that run.

A golden file is what its command prints: `slm launch ... --dry-run > tests/launch/golden/NAME`.
"""

import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from slm_jax import cli
from slm_jax.errors import UserError
from slm_jax.exit_codes import DIVERGED, MISTAKE
from slm_jax.launch import LAUNCHERS, Job, render, submit
from slm_jax.launch.gke import manifest
from slm_jax.launch.job import FINAL
from slm_jax.slices import find_slice, slice_names

GOLDEN = Path(__file__).parent / "golden"
COMMANDS = {
    "gke.yaml": "llama-3.2-1b --on tpu-v5e-256 --with gke --image us-docker.pkg.dev/p/slm/slm:1 "
    "--zone us-west4-a --cluster pods --spot --steps 1000 --out runs/llama",
    "queued-resources.sh": "mamba-2.8b --on tpu-v6e-16 --with queued-resources --project p "
    "--zone us-east5-b --spot --restarts 5 --setup 'cd slm_jax && make setup ACCELERATOR=tpu'",
    "skypilot-tpu.yaml": "tiny-moe --on tpu-v5p-64 --with skypilot --name moe-1 --accumulate 2",
    "skypilot-gpu.yaml": "tiny-dense --on h100-16 --with skypilot --setup 'make setup'",
    "slurm.sh": "tiny-dense --on h100-16 --with slurm --sbatch=--time=1-0 --loop.wandb",
    "experiment.sh": "experiments/mup_transfer.py --on h200-1 --with slurm --seeds 2",
}


@pytest.mark.parametrize(("file", "words"), COMMANDS.items())
def test_golden_texts(file: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", *shlex.split(words), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said == (GOLDEN / file).read_text()
    if file.endswith(".sh"):
        subprocess.run(["bash", "-n"], input=said, text=True, check=True)
    else:
        assert yaml.safe_load(said)


def _job(where: str, **changes: Any) -> Job:
    job = Job("job", ("slm", "train", "tiny-dense"), find_slice(where), image="slm:1")
    return replace(job, **changes)


ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}


@pytest.mark.parametrize("name", [*slice_names("tpu"), "tpu-v5e-16x2"])
def test_a_jobset_asks_for_every_chip_of_a_slice(name: str) -> None:
    job = _job(name)
    read = yaml.safe_load(render("gke", job))
    assert read == manifest(job)
    (group,) = read["spec"]["replicatedJobs"]
    one = group["template"]["spec"]
    pod = one["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert group["replicas"] == job.where.slices
    assert one["parallelism"] == one["completions"]
    assert one["completions"] * group["replicas"] == job.where.hosts
    assert chips * job.where.hosts == job.where.chips
    assert container["resources"]["requests"] == container["resources"]["limits"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    sizes = [int(n) for n in shape.split("x")]
    assert len(sizes) == (2 if job.where.chip in ("v5e", "v6e") else 3)
    accelerator = pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]
    assert accelerator == ACCELERATORS[job.where.chip]
    # A pod that fails ends the job, and the JobSet starts all again, unless the code is final.
    assert (one["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    (rule,) = one["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
    assert rule["onExitCodes"]["containerName"] == container["name"]
    codes = rule["onExitCodes"]["values"]
    assert {MISTAKE, DIVERGED} == set(codes) == set(FINAL)
    policy = read["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 100
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize("launcher", ["queued-resources", "skypilot"])
def test_several_slices_are_for_gke(launcher: str) -> None:
    with pytest.raises(UserError, match="on='tpu-v5e-16x2' is 2 slices: choose --with gke"):
        render(launcher, _job("tpu-v5e-16x2"))
    assert "--num-slices=2" in render("gke", _job("tpu-v5e-16x2"))


@pytest.mark.parametrize("name", slice_names("gpu"))
def test_slurm_starts_a_process_a_gpu(name: str) -> None:
    job = _job(name)
    text = render("slurm", job)
    given = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in text.splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    assert int(given["nodes"]) * int(given["gpus-per-node"]) == job.where.chips
    assert given["ntasks-per-node"] == given["gpus-per-node"]
    assert int(given["gpus-per-node"]) <= 8


def _tools(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which these commands are scripts."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}


def _run(text: str, environment: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash"],
        input=text,
        text=True,
        capture_output=True,
        env=environment,
        cwd=folder,
        check=False,
    )


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (0, 0, False),
        (2, 0, False),
        (44, 0, False),
        (42, 0, True),
        (43, 1, True),
        (134, 0, True),
        (1, 0, True),
        (42, 2, False),
    ],
)
def test_slurm_starts_again_what_may_pass(
    tmp_path: Path, code: int, restarts: int, again: bool
) -> None:
    environment = _tools(
        tmp_path / "bin",
        srun=f'echo "$XLA_PYTHON_CLIENT_MEM_FRACTION $@" >> srun.log; exit {code}',
        scontrol='echo "$@" >> scontrol.log',
    )
    environment |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    done = _run(render("slurm", _job("h100-16", restarts=2)), environment, tmp_path)
    assert done.returncode == code
    assert (tmp_path / "srun.log").read_text() == "0.95 --wait=120 slm train tiny-dense\n"
    asked = tmp_path / "scontrol.log"
    assert asked.exists() == again
    assert not again or asked.read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("codes", "runs"),
    [((0,), 1), ((42, 43, 134, 0), 4), ((2,), 1), ((42, 44, 0), 2), ((42,) * 9, 4)],
)
def test_a_host_of_queued_resources_starts_again_what_may_pass(
    tmp_path: Path, codes: tuple[int, ...], runs: int
) -> None:
    # The host: what ssh would run there is run here, without waiting.
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    environment = _tools(
        tmp_path / "bin",
        gcloud='case "$*" in\n*describe*) echo ACTIVE ;;\n*ssh*) for w; do case $w in --command=*)'
        ' bash -c "${w#--command=}" ;; esac; done ;;\n*) echo "$@" > asked.log ;; esac',
        slm='echo "$@" >> slm.log; code=$(head -n 1 codes); sed -i 1d codes; exit $code',
        sleep=":",
        nohup='"$@"; echo $? > ended.log',
    )
    text = render(
        "queued-resources", _job("tpu-v5e-16", restarts=3, setup='echo "$USER" > setup.log')
    )
    # In the foreground, so that it has ended.
    done = _run(
        text.replace("< /dev/null &\n", "< /dev/null\n"), environment | {"USER": "u"}, tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "slm.log").read_text() == "train tiny-dense\n" * runs
    assert int((tmp_path / "ended.log").read_text()) == codes[runs - 1]
    assert (tmp_path / "setup.log").read_text() == "u\n"
    asked = (tmp_path / "asked.log").read_text()
    assert "create job --node-id=job --accelerator-type=v5litepod-16" in asked
    assert "--runtime-version=v2-alpha-tpuv5-lite" in asked


def test_the_tool_gets_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = _tools(
        tmp_path / "bin", kubectl=f'echo "$@"; cat > {tmp_path}/given; exit $(cat {tmp_path}/code)'
    )
    monkeypatch.setenv("PATH", environment["PATH"])
    (tmp_path / "code").write_text("0")
    job = _job("tpu-v5e-16")
    submit("gke", job)
    assert (tmp_path / "given").read_text() == render("gke", job)
    (tmp_path / "code").write_text("3")
    with pytest.raises(UserError, match="kubectl apply -f - ended with exit code 3"):
        submit("gke", job)


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    for name, launcher in LAUNCHERS.items():
        where = "h100-8" if "gpu" in launcher.platforms else "tpu-v5e-16"
        with pytest.raises(UserError, match=f"with='{name}' needs {launcher.tool}, which is not"):
            submit(name, _job(where))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("tiny-dense --on tpu-v5e-16", "with=None: say where and by what"),
        ("tiny-dense --with gke", "on=None"),
        ("tiny-dense --on tpu-v5e-16 --with ray", "with='ray' does not exist: choose from"),
        ("tiny-dense --on tpu-v5e-16 --with slurm", "choose gke, queued-resources, skypilot"),
        ("tiny-dense --on h100-8 --with gke", "choose skypilot, slurm"),
        ("tiny-dense --on cpu-8 --with slurm", "run `slm train` here instead"),
        ("tiny-dense --on tpu-v5e-16 --with gke", "image=None: GKE runs containers"),
        ("tiny-dense --on tpu-tpu7x-8 --with queued-resources", "by GKE only: choose --with gke"),
        ("tiny-dense --on tpu-tpu7x-8 --with skypilot", "by GKE only: choose --with gke"),
        ("tiny-dense --on h100-8 --with slurm --name A_b", "name='A_b': give at most 40"),
        ("tiny-dense --on h100-8 --with slurm --restarts -1", "restarts=-1 must be at least 0"),
        ("tiny-dence --on h100-8 --with slurm", "preset='tiny-dence' does not exist"),
        ("tiny-dense --on h100-8 --with slurm --steps 0", "steps=0 must be at least 1"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", *words.split(), "--dry-run"]) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert not said.out
