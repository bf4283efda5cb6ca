import json
import os
import time
from pathlib import Path

import pytest

from slm_jax.train import goodput
from slm_jax.train.goodput import GOODPUT_FILE, PARTS, Goodput, describe
from tests.train.recorder import Recorder


class Clock:
    """Both clocks, moved by hand."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(goodput.time, "time", lambda: self.now)
        patch.setattr(goodput.time, "monotonic", lambda: self.now - 900.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def session(clock: Clock, folder: Path, first: int, last: int) -> dict[str, float]:
    """Steps of 10 s with a second for the batch; a checkpoint of 5 s every second step."""
    parts = Goodput()
    clock.now += 2.0
    with parts.part("compile"):
        clock.now += 30.0
    with parts.account(folder):
        with parts.part("restart"):
            clock.now += 4.0
        for step in range(first, last):
            parts.begin_step(step)
            with parts.part("data"):
                clock.now += 1.0
            clock.now += 9.0
            if step % 2:
                with parts.part("checkpoint"):
                    clock.now += 5.0
    return parts.write()


def test_parts_add_up_over_restarts(tmp_path: Path, clock: Clock) -> None:
    begun = clock.now
    assert session(clock, tmp_path, 0, 5) == {
        **{"other": 2.0, "compile": 30.0, "restart": 4.0},
        **{"data": 5.0, "step": 45.0, "checkpoint": 10.0},
    }
    clock.now += 100.0  # killed in step 4; the newest checkpoint is that after step 3
    seconds = session(clock, tmp_path, 4, 8)
    assert seconds["down"] == 100.0
    assert seconds["repeat"] == 9.0 * 1  # step 4 again
    assert seconds["step"] == 45.0 + 9.0 * 3
    assert sum(seconds.values()) == pytest.approx(clock.now - begun)
    saved = json.loads((tmp_path / GOODPUT_FILE).read_text())
    assert (saved["starts"], saved["seconds"]) == (2, seconds)
    assert describe(seconds).startswith("35 % between a stop and the next start, 26 % training, ")


def test_a_kill_loses_a_second_of_the_account(tmp_path: Path, clock: Clock) -> None:
    """It is written while the run goes on, not at its end; what is not written counts as down."""
    begun = clock.now
    parts = Goodput()
    killed = parts.account(tmp_path)
    killed.__enter__()
    for step in range(100):
        parts.begin_step(step)
        clock.now += 0.3
    after = Goodput()
    with after.account(tmp_path):
        seconds = after.write()
    assert 0 <= seconds["down"] < 2.0
    assert sum(seconds.values()) == pytest.approx(clock.now - begun)


@pytest.mark.parametrize("content", ["", '{"seconds": {"st', "[]", '{"seconds": {"lunch": 3.0}}'])
def test_a_damaged_account_is_said_and_begun_anew(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / GOODPUT_FILE).write_text(content)
    with Goodput().account(tmp_path):
        pass
    assert "cannot be read" in caplog.text
    assert json.loads((tmp_path / GOODPUT_FILE).read_text())["starts"] == 1


def test_the_loop_accounts_for_all_of_its_time_and_gives_signs_of_life(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run", nan=[4])
    begun = time.time()
    recorder.train(5, eval_every=3, checkpoint_every=2)
    first = time.time()
    beat = json.loads((tmp_path / "run" / "heartbeat-0.json").read_text())
    assert beat["step"] == 4
    assert beat["pid"] == os.getpid()
    assert begun < beat["time"] <= first
    end = Recorder(tmp_path / "run").train(9, eval_every=3)
    wall = time.time() - begun
    saved = json.loads((tmp_path / "run" / GOODPUT_FILE).read_text())
    assert saved["starts"] == 2
    assert set(saved["seconds"]) <= set(PARTS)
    assert {"step", "data", "restart", "evaluate", "checkpoint", "down"} <= set(saved["seconds"])
    assert sum(saved["seconds"].values()) == pytest.approx(wall, rel=0.01, abs=0.1)
    assert 0 < end.host_share <= 1
