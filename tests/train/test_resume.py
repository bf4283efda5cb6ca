"""A run killed at any instant and started again gives bitwise what one left alone gives."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from slm_jax.exit_codes import PREEMPTED
from slm_jax.train.checkpoint import CHECKPOINTS_FOLDER
from slm_jax.train.experiment import load_model
from slm_jax.train.goodput import GOODPUT_FILE
from slm_jax.train.metrics import METRICS_FILE, read_metrics
from tests.train import tiny
from tests.train.crash_worker import STEPS

ROOT = Path(__file__).parent.parent.parent
_LONGEST = 300.0  # seconds a worker may take to come to the moment it is killed at


class Worker:
    """A process that trains in `out`."""

    def __init__(self, kind: str, devices: int, text: Path, out: Path) -> None:
        self.out = out
        self.log = out.with_name(f"{out.name}.txt")
        self.begun = time.time()
        self.lines_before = self.lines()
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.train.crash_worker", kind, str(text), str(out)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def lines(self) -> int:
        """Lines in the log of metrics; a resumed run first drops those after its checkpoint."""
        file = self.out / METRICS_FILE
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def writing(self) -> bool:
        """Whether there is a checkpoint that this process began and did not commit."""
        for path in (self.out / CHECKPOINTS_FOLDER).glob("*.orbax-checkpoint-tmp*"):
            try:
                if path.stat().st_mtime > self.begun:
                    return True
            except FileNotFoundError:  # committed between the two lines
                continue
        return False

    def finish(self) -> None:
        code = self.process.wait(_LONGEST)
        assert code == 0, self.log.read_text()

    def newest(self) -> int:
        """The number of the newest checkpoint."""
        return max(int(p.name) for p in (self.out / CHECKPOINTS_FOLDER).iterdir())

    def steps(self) -> int:
        """Steps in the log."""
        return sum("loss" in r for r in read_metrics(self.out))

    def kill(self, moment: str, rng: random.Random, start_up: float) -> bool:
        """Kills at a random moment of a kind; false if the process was done before."""
        delay, steps = rng.uniform(0.1, 1.0) * start_up, rng.randint(1, 6)

        def reached() -> bool:
            match moment:
                case "start-up":  # imports, compilation, restoring, the first steps
                    late = self.lines() >= self.lines_before + 3
                    return late or time.time() > self.begun + delay
                case "step" | "terminate":
                    return self.lines() >= self.lines_before + steps
                case "write":
                    return self.writing()
            return self.lines() >= STEPS + 2  # "end": all steps are logged, there is no result

        while self.process.poll() is None and not reached():
            assert time.time() < self.begun + _LONGEST, self.log.read_text()
            time.sleep(0.002)
        if moment == "terminate":
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(30) == PREEMPTED, self.log.read_text()
            assert self.newest() == self.steps()  # nothing is lost
            return True
        self.process.send_signal(signal.SIGKILL)
        code = self.process.wait()
        assert code in (0, -signal.SIGKILL), self.log.read_text()
        return code != 0


def records(out: Path) -> list[dict[str, Any]]:
    """All lines of the log without the one number that depends on the clock."""
    parsed = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in parsed]


def result(out: Path) -> dict[str, Any]:
    saved = json.loads((out / "result.json").read_text())
    clock = ("tokens_per_second", "compile_seconds", "host_share", "goodput", "out")
    return {k: v for k, v in saved.items() if k not in clock}


def assert_same_run(out: Path, reference: Path) -> None:
    got = records(out)
    assert [r["step"] for r in got if "loss" in r] == list(range(STEPS))
    assert [r["step"] for r in got if "valid_loss" in r] == [19, 39, 59]
    assert got == records(reference)  # floats are written with all their bits
    assert result(out) == result(reference)
    for ema in (False, True):
        models = [load_model(folder, ema=ema)[0] for folder in (out, reference)]
        for a, b in zip(*map(jax.tree.leaves, models), strict=True):
            np.testing.assert_array_equal(a, b)


def assert_time_is_accounted_for(out: Path, wall: float) -> None:
    """From the first start that came as far as training to the end, down times included."""
    saved = json.loads((out / GOODPUT_FILE).read_text())
    assert saved["steps"] == STEPS
    assert saved["starts"] > 1
    total = sum(saved["seconds"].values())
    assert sum(result_goodput(out).values()) == pytest.approx(total, rel=0.01)
    assert saved["until"] - saved["since"] == pytest.approx(total, rel=0.01)
    assert total < wall


def result_goodput(out: Path) -> dict[str, float]:
    return json.loads((out / "result.json").read_text())["goodput"]


def check_kills(kind: str, devices: int, moments: list[str], tmp_path: Path) -> None:
    """Kills a run at these moments, lets it finish, and compares it with an undisturbed one."""
    rng = random.Random(0)
    text, out, reference = (tmp_path / name for name in ("text", "killed", "whole"))
    tiny.write_text(text)
    undisturbed = Worker(kind, devices, text, reference)
    while not undisturbed.lines():  # from here on the program is in the cache
        assert undisturbed.process.poll() is None, undisturbed.log.read_text()
        time.sleep(0.02)
    start_up = time.time() - undisturbed.begun

    kills = uncommitted = 0
    begun = time.time()
    for moment in moments:
        worker = Worker(kind, devices, text, out)
        kills += worker.kill(moment, rng, start_up)
        uncommitted += worker.writing()
        if moment == "step":
            start_up = min(start_up, time.time() - worker.begun)
    # The last moment is close to the end: the process may win.
    assert kills >= len(moments) - 1
    assert uncommitted >= 1
    Worker(kind, devices, text, out).finish()
    assert_time_is_accounted_for(out, time.time() - begun)
    undisturbed.finish()
    assert_same_run(out, reference)


def test_killed_runs_give_the_same_bits(tmp_path: Path) -> None:
    moments = ["start-up", "step", "write", "terminate", "step", "end"]
    check_kills("dense", 1, moments, tmp_path)


@pytest.mark.slow
def test_killed_runs_give_the_same_bits_on_a_mesh(tmp_path: Path) -> None:
    moments = ["start-up", "step", "write", "terminate", "step", "start-up", "write"] * 3
    check_kills("hybrid", 8, [*moments, "end"], tmp_path)
