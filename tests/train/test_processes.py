"""Several processes on this machine train what one process trains, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from slm_jax.exit_codes import LOST
from slm_jax.parallel import MeshConfig, make_mesh
from slm_jax.train import experiment, trm_experiment
from slm_jax.train.metrics import read_metrics
from tests.train import process_worker, tiny
from tests.train.process_worker import BATCH_SIZE, Spec

ROOT = Path(__file__).parent.parent.parent
HEARTBEAT = 10
LONGEST = 400.0  # seconds a job may take; the machine may be busy
# What an error of ours, and the abort of jax, end a process with whose job is broken.
ENDED_BY_LOSS = (LOST, -signal.SIGABRT)
COMPARED = ("loss", "grad_norm", "valid_loss", "valid_loss_ema")


class Job:
    """Processes on the loopback interface that run one `Spec`."""

    def __init__(
        self, folder: Path, n_processes: int, n_devices: int, spec: dict[str, Any]
    ) -> None:
        self.logs = [folder / f"{Path(spec['out']).name}.log.{i}" for i in range(n_processes)]
        self.began = time.monotonic()
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={n_devices}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "SLM_WAIT_SECONDS": "100",
            "SLM_HEARTBEAT_SECONDS": str(HEARTBEAT),
        }
        if n_processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
                "JAX_NUM_PROCESSES": str(n_processes),
            }
        self.processes = []
        for i, log in enumerate(self.logs):
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.train.process_worker", json.dumps(spec)],
                        cwd=ROOT,
                        env=environment | ({"JAX_PROCESS_ID": str(i)} if n_processes > 1 else {}),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def ends(self) -> list[tuple[int, float]]:
        """Exit code of each process, and seconds from the end of the first to its own."""
        ended: dict[int, tuple[int, float]] = {}
        while len(ended) < len(self.processes):
            for i, process in enumerate(self.processes):
                if i not in ended and process.poll() is not None:
                    ended[i] = process.returncode, time.monotonic()
            assert time.monotonic() < self.began + LONGEST, self.text()
            time.sleep(0.02)
        first = min(at for _, at in ended.values())
        return [(ended[i][0], ended[i][1] - first) for i in range(len(self.processes))]

    def finish(self) -> None:
        codes = [code for code, _ in self.ends()]
        assert codes == [0] * len(codes), self.text()

    def text(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in self.logs)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


StartJob = Callable[..., Job]


@pytest.fixture
def start_job(tmp_path: Path) -> Iterator[StartJob]:
    """Jobs in `tmp_path`: start_job("name", processes, devices of each, fields of the spec)."""
    jobs = []
    text = tmp_path / "text"

    def start(name: str, n_processes: int, n_devices: int, **spec: Any) -> Job:
        if not text.exists():
            tiny.write_text(text)
        fields = {"text": str(text), "out": str(tmp_path / name), **spec}
        jobs.append(Job(tmp_path, n_processes, n_devices, fields))
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()


def curves(out: Path) -> dict[str, list[float]]:
    records = read_metrics(out)
    assert [r["step"] for r in records if "loss" in r] == list(range(6))
    return {name: [r[name] for r in records if name in r] for name in COMPARED}


def assert_same_curves(out: Path, reference: Path) -> None:
    got, want = curves(out), curves(reference)
    for name in COMPARED:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
    assert np.ptp(want["loss"]) > 0.1  # it learns: the runs had room to differ


def rows_read(out: Path) -> dict[tuple[int, int], str]:
    """A digest of every row of every step that any process of a job has read."""
    found: dict[tuple[int, int], str] = {}
    for file in out.parent.glob(f"{out.name}.rows.*"):
        for line in file.read_text().splitlines():
            step, rows = json.loads(line)
            for row, digest in rows.items():
                assert found.setdefault((step, int(row)), digest) == digest
    return found


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The same run in this process, on some of its devices; returns its folder."""

    def run(n_devices: int, **spec: Any) -> Path:
        def mesh(config: MeshConfig) -> Mesh:
            return make_mesh(config, jax.devices()[:n_devices])

        for module in (experiment, trm_experiment):
            monkeypatch.setattr(module, "make_mesh", mesh)
        out = tmp_path / "here"
        process_worker.run(Spec(str(tmp_path / "text"), str(out), **spec))
        return out

    return run


def names_lost(process: int, log: str) -> bool:
    """Whether a log says which process is gone: in our words, or in those of jax."""
    ours = (f"no sign of life from process {process} ", f"process {process} is gone")
    jaxs = re.search(rf"unhealthy \(stopped sending heartbeats\):\n{process}\n", log)
    return any(text in log for text in ours) or bool(jaxs) or (not process and "leader" in log)


def test_two_processes_train_as_one(
    start_job: StartJob, run_here: Callable[..., Path], tmp_path: Path
) -> None:
    two = start_job("two", 2, 1, mesh={"fsdp": 2})
    two.finish()
    one = run_here(2, mesh={"fsdp": 2})
    assert_same_curves(tmp_path / "two", one)
    assert rows_read(tmp_path / "two") == rows_read(one)
    assert len(rows_read(one)) == 6 * BATCH_SIZE
    first, second = (log.read_text() for log in two.logs)
    assert "all is well" in first
    assert "held-out loss" in first
    assert not second.strip()  # only process 0 prints


@pytest.mark.slow
def test_a_tensor_axis_over_processes(
    start_job: StartJob, run_here: Callable[..., Path], tmp_path: Path
) -> None:
    start_job("two", 2, 1, mesh={"tensor": 2}).finish()
    one = run_here(2, mesh={"tensor": 2})
    assert_same_curves(tmp_path / "two", one)
    first, second = ((tmp_path / f"two.rows.{i}").read_text() for i in range(2))
    assert first == second  # both hold all rows
    assert rows_read(tmp_path / "two") == rows_read(one)


@pytest.mark.slow
def test_a_reasoner_on_two_processes(
    start_job: StartJob, run_here: Callable[..., Path], tmp_path: Path
) -> None:
    start_job("two", 2, 1, mesh={"data": 2}, puzzles=True).finish()
    one = run_here(2, mesh={"data": 2}, puzzles=True)
    losses = [[r["loss"] for r in read_metrics(p) if "loss" in r] for p in (tmp_path / "two", one)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert len(losses[0]) == 6
    results = [json.loads((p / "result.json").read_text()) for p in (tmp_path / "two", one)]
    for name in ("exact", "cell", "exact_ema", "cell_ema"):
        assert results[0][name] == pytest.approx(results[1][name], abs=1e-6), name


@pytest.mark.slow
def test_killed_process_ends_the_job_and_more_processes_go_on(
    start_job: StartJob, run_here: Callable[..., Path], tmp_path: Path
) -> None:
    mesh = {"data": 2, "fsdp": 2}
    killed = start_job("run", 2, 2, mesh=mesh, fault="kill")
    (other, seconds), (victim, _) = killed.ends()
    assert victim == -signal.SIGKILL
    assert other in ENDED_BY_LOSS, killed.text()
    assert seconds < HEARTBEAT + 15
    assert names_lost(1, killed.logs[0].read_text()), killed.text()
    assert not (tmp_path / "run" / "result.json").exists()
    start_job("run", 4, 1, mesh=mesh).finish()
    only_after = json.loads((tmp_path / "run.rows.3").read_text().splitlines()[0])
    assert only_after[0] == 2  # from the newest checkpoint
    one = run_here(4, mesh=mesh)
    assert_same_curves(tmp_path / "run", one)
    assert rows_read(tmp_path / "run") == rows_read(one)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "victim"), [("kill", 0), ("stop", 1)])
def test_lost_process_ends_the_job(
    start_job: StartJob, tmp_path: Path, fault: str, victim: int
) -> None:
    job = start_job("run", 2, 1, mesh={"fsdp": 2}, fault=fault, victim=victim)
    if fault == "stop":
        while job.processes[0].poll() is None:  # nothing ends a stopped process but SIGKILL
            assert time.monotonic() < job.began + LONGEST, job.text()
            time.sleep(0.02)
        stopped = (tmp_path / "run.rows.1").stat().st_mtime  # after its last batch
        seconds = time.time() - stopped
        job.processes[1].kill()
        ((code, _), _) = job.ends()
    else:
        _, (code, seconds) = job.ends()
    assert code in ENDED_BY_LOSS, job.text()
    assert seconds < HEARTBEAT + 15
    assert names_lost(victim, job.logs[1 - victim].read_text()), job.text()


@pytest.mark.slow
def test_stalled_input_ends_the_job(start_job: StartJob, tmp_path: Path) -> None:
    limit = 20
    job = start_job("run", 2, 1, mesh={"fsdp": 2}, fault="stall", hang_limit=limit)
    codes = [code for code, _ in job.ends()]
    seconds = time.time() - (tmp_path / "run.stalled").stat().st_mtime
    assert codes == [43, 43], job.text()
    assert limit < seconds < limit + 5
    said = job.logs[1].read_text()
    assert f"step 3 is not done after {limit} s" in said
    assert "in __next__" in said  # the stack shows where


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_ends_all(start_job: StartJob, tmp_path: Path) -> None:
    job = start_job("run", 2, 1, mesh={"fsdp": 2}, fault="term", steps=40, checkpoint_every=0)
    assert [code for code, _ in job.ends()] == [42, 42], job.text()
    (saved,) = (int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit())
    assert 3 < saved < 40
    start_job("run", 2, 1, mesh={"fsdp": 2}, steps=40).finish()
    steps = [r["step"] for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert steps == list(range(40))


@pytest.mark.slow
def test_exception_in_one_process_ends_all(start_job: StartJob) -> None:
    job = start_job("run", 2, 1, mesh={"fsdp": 2}, fault="raise")
    (first, after), (second, also_after) = job.ends()
    assert (first, second) == (1, 1), job.text()
    assert max(after, also_after) < 5
    assert "process 1 failed: bad record" in job.logs[0].read_text()
    assert "RuntimeError: bad record" in job.logs[1].read_text()


@pytest.mark.slow
def test_processes_of_different_runs_refuse(start_job: StartJob, tmp_path: Path) -> None:
    job = start_job("run", 2, 1, mesh={"fsdp": 2}, differs=True)
    assert [code for code, _ in job.ends()] == [2, 2], job.text()
    for log in job.logs:
        assert "process 1 has another seed than process 0" in log.read_text()
    assert not (tmp_path / "run").exists()
