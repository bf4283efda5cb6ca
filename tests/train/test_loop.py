"""What the loop does when, seen through a program that writes down what is asked of it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.parallel import make_mesh
from slm_jax.train.checkpoint import Checkpoints
from slm_jax.train.loop import CHECKPOINTS_FOLDER, DivergedError, LoopConfig, train
from slm_jax.train.metrics import read_metrics
from slm_jax.train.optimizer import ScheduleConfig
from slm_jax.train.step import Program, TrainState


class Metric:
    """A number on a device: to read it is to wait for the step that makes it."""

    def __init__(self, step: int, value: float, events: list[str]) -> None:
        self._step, self._value, self._events = step, value, events

    def _read(self) -> float:
        if self._events[-1] != f"read {self._step}":
            self._events.append(f"read {self._step}")
        return self._value

    def __float__(self) -> float:
        return self._read()

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self._read(), dtype)


class Batches:
    def __init__(self, events: list[str]) -> None:
        self.position, self._events = 0, events

    def __next__(self) -> dict[str, np.ndarray]:
        self._events.append(f"batch {self.position}")
        self.position += 1
        return {"tokens": np.full((2, 4), self.position - 1, np.int32)}

    def get_state(self) -> dict[str, int]:
        return {"next_index": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["next_index"]


class Recorder:
    """Trains for nothing; the loss of step i is i, or NaN at `nan`."""

    def __init__(self, folder: Path, *, nan: int = -1) -> None:
        self.folder, self.nan, self.valid_loss = folder, nan, 1.0
        self.events: list[str] = ["start"]
        self.mesh = make_mesh(devices=jax.devices()[:1])
        self.state = TrainState(jnp.zeros((), jnp.int32), jnp.zeros(()), {}, {}, None, ())

    def step(self, state: TrainState, batch: Any, rate: Any) -> Any:
        step = int(state.step)
        assert np.asarray(batch["tokens"]).tolist() == [[step] * 4] * 2
        self.events.append(f"step {step}")
        loss = float("nan") if step == self.nan else float(step)
        metrics = {n: Metric(step, loss, self.events) for n in ("loss", "grad_norm")}
        return state._replace(step=state.step + 1), metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        self.events.append(f"evaluate {int(state.step)}")
        return {"valid_loss": self.valid_loss}

    def train(self, steps: int, **loop: Any) -> Any:
        self.folder.mkdir(exist_ok=True)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state
        )
        return train(
            Program(lambda seed: self.state, self.step, abstract, 0.0, 0),
            self.mesh,
            Batches(self.events),  # type: ignore[arg-type]
            folder=self.folder,
            name="test",
            steps=steps,
            seed=0,
            schedule=ScheduleConfig(learning_rate=0.5, shape="constant", warmup_steps=0),
            config=LoopConfig(quiet=True, **loop),
            evaluate=self.evaluate,
        )


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
    first = Recorder(tmp_path / "run", nan=4)
    with pytest.raises(DivergedError, match="step 4"):
        first.train(6, checkpoint_every=3)
    again = Recorder(tmp_path / "run")
    again.train(6, checkpoint_every=3)
    assert again.events[1:4] == ["batch 3", "step 3", "batch 4"]
    assert [r["loss"] for r in read_metrics(again.folder) if "loss" in r] == [0, 1, 2, 3, 4, 5]
    done = Recorder(tmp_path / "run")
    assert done.train(6).evaluation == {"valid_loss": 1.0}
    assert done.events[1:] == ["evaluate 6"]


@pytest.mark.parametrize("nan", [0, 2, 5])
def test_no_checkpoint_holds_a_diverged_step(tmp_path: Path, nan: int) -> None:
    recorder = Recorder(tmp_path / "run", nan=nan)
    with pytest.raises(DivergedError) as error:
        recorder.train(6, checkpoint_every=1)
    good = f"checkpoint {nan} is the last good one" if nan else "no checkpoint yet"
    for part in (f"at step {nan} ", "learning_rate=0.5", good, str(recorder.folder)):
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


def test_records_between_are_left_out(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run")
    recorder.train(6, log_every=4)
    assert [r["step"] for r in read_metrics(recorder.folder) if "loss" in r] == [0, 4, 5]
