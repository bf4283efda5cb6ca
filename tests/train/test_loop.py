"""What the loop does when, seen through a program that writes down what is asked of it."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.train.checkpoint import CHECKPOINTS_FOLDER, Checkpoints
from slm_jax.train.loop import DivergedError, LoopConfig
from slm_jax.train.metrics import read_metrics
from slm_jax.train.step import TrainState
from tests.train.recorder import Recorder


def test_metrics_are_read_while_the_next_step_runs(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run")
    recorder.train(5)
    assert recorder.events[1:] == [
        *("batch 0", "step 0"),
        *("batch 1", "step 1", "read 0"),
        *("batch 2", "step 2", "read 1"),
        *("batch 3", "step 3", "read 2"),
        *("batch 4", "step 4", "read 3"),
        *("read 4", "evaluate 5"),
    ]


def test_before_an_evaluation_or_a_checkpoint_all_is_read(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run")
    recorder.train(5, eval_every=2, checkpoint_every=3)
    order = [e for e in recorder.events if not e.startswith("batch")]
    assert order[1:] == [
        *("step 0", "step 1", "read 0", "read 1", "evaluate 2"),
        *("step 2", "read 2"),  # checkpoint 3
        *("step 3", "read 3", "evaluate 4", "step 4", "read 4", "evaluate 5"),
    ]
    records = read_metrics(recorder.folder)
    assert [r["step"] for r in records if "loss" in r] == [0, 1, 2, 3, 4]
    assert [r["step"] for r in records if "valid_loss" in r] == [1, 3, 4]
    with Checkpoints(recorder.folder / CHECKPOINTS_FOLDER, read_only=True) as checkpoints:
        assert checkpoints.latest() == 5


def test_evaluates_after_chosen_steps(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run")
    recorder.train(6, eval_every=4, eval_steps=(1, 4, 9))
    assert [e for e in recorder.events if "evaluate" in e] == [f"evaluate {n}" for n in (1, 4, 6)]
    assert [r["step"] for r in read_metrics(recorder.folder) if "valid_loss" in r] == [0, 3, 5]
    with pytest.raises(UserError, match=r"eval_steps=\(3, 0\): each must be at least 1"):
        LoopConfig(eval_steps=(3, 0))


def test_resumes_at_the_step_and_the_batch(tmp_path: Path) -> None:
    first = Recorder(tmp_path / "run", nan=[4])
    with pytest.raises(DivergedError, match="step 4"):
        first.train(6, checkpoint_every=3, max_skipped=1)
    again = Recorder(tmp_path / "run")
    again.train(6, checkpoint_every=3)
    assert again.events[1:4] == ["batch 3", "step 3", "batch 4"]
    assert [r["loss"] for r in read_metrics(again.folder) if "loss" in r] == [0, 1, 2, 3, 4, 5]
    done = Recorder(tmp_path / "run")
    assert done.train(6).evaluation == {"valid_loss": 1.0}
    assert done.events[1:] == ["evaluate 6"]


@pytest.mark.parametrize("nan", [0, 2, 5])
def test_no_checkpoint_holds_a_diverged_step(tmp_path: Path, nan: int) -> None:
    recorder = Recorder(tmp_path / "run", nan=range(nan, 9))
    with pytest.raises(DivergedError) as error:
        recorder.train(9, checkpoint_every=1)
    good = f"checkpoint {nan} is the last good one" if nan else "no checkpoint yet"
    where = f"at step {nan + 2} with learning_rate=0.5, bad step 3 in a row"
    for part in (where, good, str(recorder.folder)):
        assert part in str(error.value)
    with Checkpoints(recorder.folder / CHECKPOINTS_FOLDER, read_only=True) as checkpoints:
        assert checkpoints.latest() == (nan or None)


def test_what_diverged_in_its_last_step_is_no_result(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run")
    recorder.valid_loss = float("inf")
    with pytest.raises(DivergedError, match=r"valid_loss=inf at step 2 .* checkpoint 2"):
        recorder.train(3, checkpoint_every=2)
    with Checkpoints(recorder.folder / CHECKPOINTS_FOLDER, read_only=True) as checkpoints:
        assert checkpoints.latest() == 2


def test_a_few_bad_steps_are_skipped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No checkpoint is written between them: they must not push out the good ones."""
    recorder = Recorder(tmp_path / "run", nan=[2, 3, 5, 7])
    recorder.train(8, checkpoint_every=2, log_every=4, keep_checkpoints=9)
    records = [r for r in read_metrics(recorder.folder) if "skipped" in r]
    assert [r["step"] for r in records if r["skipped"]] == [2, 3, 5, 7]
    assert [r["step"] for r in records if not r["skipped"]] == [0, 4]
    assert all(("loss" in r) != r["skipped"] for r in records)
    for step in (2, 3, 5, 7):
        assert f"step {step} is skipped: loss=nan, grad_norm=nan" in caplog.text
    steps = {int(p.name) for p in (recorder.folder / CHECKPOINTS_FOLDER).iterdir()}
    assert steps == {2, 5, 7, 8}  # 4 waits for a good step, 6 for another; 8 is the end


def test_a_step_that_moves_data_by_itself_is_refused(tmp_path: Path) -> None:
    class Careless(Recorder):
        def step(self, state: TrainState, batch: Any, rate: Any) -> Any:
            jnp.add(rate, np.ones(3, np.float32))
            return super().step(state, batch, rate)

    with pytest.raises(Exception, match="isallowed host-to-device transfer"):
        Careless(tmp_path / "run").train(1)


def test_records_between_are_left_out(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run")
    recorder.train(6, log_every=4)
    assert [r["step"] for r in read_metrics(recorder.folder) if "loss" in r] == [0, 4, 5]
