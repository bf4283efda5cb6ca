"""Signals and hanging steps: how a run ends that somebody, or nobody, waits for."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from slm_jax.exit_codes import HANGING, PREEMPTED
from slm_jax.train.checkpoint import CHECKPOINTS_FOLDER, Checkpoints
from slm_jax.train.metrics import read_metrics
from slm_jax.train.stop import PreemptedError, StopSignals
from slm_jax.train.watchdog import Watchdog
from tests.train.recorder import Recorder


class Signalled(Recorder):
    """Gets a signal in the step, or in the evaluation, after so many steps."""

    def __init__(self, folder: Path, *, step: int = -1, evaluation: int = -1) -> None:
        super().__init__(folder)
        self._step, self._evaluation = step, evaluation

    def step(self, state, batch, rate):  # type: ignore[no-untyped-def]
        if int(state.step) == self._step:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(state, batch, rate)

    def evaluate(self, state):  # type: ignore[no-untyped-def]
        if int(state.step) == self._evaluation:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the signal did not interrupt the evaluation")
        return super().evaluate(state)


def newest(recorder: Recorder) -> int | None:
    with Checkpoints(recorder.folder / CHECKPOINTS_FOLDER, read_only=True) as checkpoints:
        return checkpoints.latest()


@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_signal_saves_after_the_step_and_loses_nothing(
    tmp_path: Path, step: int, capfd: pytest.CaptureFixture[str]
) -> None:
    stopped = Signalled(tmp_path / "run", step=step)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError) as end:
        stopped.train(6, checkpoint_every=4)
    assert end.value.code == PREEMPTED == 42
    assert signal.getsignal(signal.SIGTERM) is before
    assert newest(stopped) == step + 1
    out, err = capfd.readouterr()
    assert "SIGTERM: saving after this step" in err
    assert f"stopped after step {step + 1}" in out
    again = Recorder(tmp_path / "run")
    assert again.train(6, checkpoint_every=4).evaluation == {"valid_loss": 1.0}
    assert [r["loss"] for r in read_metrics(again.folder) if "loss" in r] == [0, 1, 2, 3, 4, 5]
    assert [r["step"] for r in read_metrics(again.folder) if "valid_loss" in r] == [5]
    if step < 5:
        assert again.events[1:3] == [f"batch {step + 1}", f"step {step + 1}"]


@pytest.mark.parametrize("done", [2, 4])
def test_an_evaluation_is_left_and_made_up_for(tmp_path: Path, done: int) -> None:
    """It may take longer than whoever sent the signal waits."""
    stopped = Signalled(tmp_path / "run", evaluation=done)
    with pytest.raises(PreemptedError):
        stopped.train(4, eval_every=2)
    assert newest(stopped) == done
    twice = Signalled(tmp_path / "run", evaluation=done)
    with pytest.raises(PreemptedError):
        twice.train(4, eval_every=2)
    again = Recorder(tmp_path / "run")
    again.train(4, eval_every=2)
    assert again.events[1] == f"evaluate {done}"
    records = read_metrics(again.folder)
    assert [r["step"] for r in records] == [0, 1, 1, 2, 3, 3]
    assert ["valid_loss" in r for r in records] == [False, False, True] * 2


def test_a_second_signal_ends_the_process_at_once() -> None:
    with StopSignals() as signals:
        assert not signals.requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested(2)
        for number in (signal.SIGTERM, signal.SIGINT):
            assert signal.getsignal(number) is signal.SIG_DFL


def test_signals_are_left_alone_in_other_threads() -> None:
    asked: list[bool] = []

    def run() -> None:
        with StopSignals() as signals:
            asked.append(signals.requested(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [False]


def test_a_hanging_process_shows_its_stacks_and_ends() -> None:
    program = """
import time
from slm_jax.train.watchdog import Watchdog

def wait_for_the_batch():
    time.sleep(100)

with Watchdog(0.5) as watchdog:
    watchdog.beat(7)
    wait_for_the_batch()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == HANGING == 43
    assert "error: step 7 is not done after 0.5 s (loop.hang_limit)" in done.stderr
    assert "in wait_for_the_batch" in done.stderr


def test_a_stalled_input_is_noticed_by_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noticed = threading.Event()
    monkeypatch.setattr(Watchdog, "_end", lambda self: noticed.set())

    class Stalled(Recorder):
        def step(self, state, batch, rate):  # type: ignore[no-untyped-def]
            if int(state.step) == 2:
                assert noticed.wait(60)
            return super().step(state, batch, rate)

    Stalled(tmp_path / "run").train(3, hang_limit=0.2)
    assert noticed.is_set()


def test_evaluations_may_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noticed = threading.Event()
    monkeypatch.setattr(Watchdog, "_end", lambda self: noticed.set())

    class Slow(Recorder):
        def evaluate(self, state):  # type: ignore[no-untyped-def]
            assert not noticed.wait(2.6)
            return super().evaluate(state)

    Slow(tmp_path / "run").train(1, hang_limit=2.0)
