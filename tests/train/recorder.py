"""A program for the loop that trains nothing and writes down what is asked of it."""

from collections.abc import Container
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.parallel import make_mesh
from slm_jax.train.loop import LoopConfig, train
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

    def __int__(self) -> int:
        return int(self._read())

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
    """Trains for nothing; the loss of step i is i, or NaN if i is in `nan`."""

    def __init__(self, folder: Path, *, nan: Container[int] = ()) -> None:
        self.folder, self.nan, self.valid_loss = folder, nan, 1.0
        self.events: list[str] = ["start"]
        self.mesh = make_mesh(devices=jax.devices()[:1])
        self.state = TrainState(jnp.zeros((), jnp.int32), jnp.zeros(()), {}, {}, None, ())

    @jax.transfer_guard("allow")  # it computes by itself
    def step(self, state: TrainState, batch: Any, rate: Any) -> Any:
        step = int(state.step)
        assert np.asarray(batch["tokens"]).tolist() == [[step] * 4] * 2
        self.events.append(f"step {step}")
        bad = step in self.nan
        loss = float("nan") if bad else float(step)
        metrics = {n: Metric(step, loss, self.events) for n in ("loss", "grad_norm")}
        metrics["skipped"] = Metric(step, float(bad), self.events)
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
