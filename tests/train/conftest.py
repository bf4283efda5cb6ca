from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from slm_jax.data import DataConfig
from slm_jax.train import experiment
from slm_jax.train.experiment import Experiment, Result
from slm_jax.train.loop import Finished, train
from slm_jax.train.step import TrainState
from tests.train import tiny

MakeExperiment = Callable[..., Experiment]


class FinishedRun(NamedTuple):
    config: Experiment
    result: Result
    state: TrainState


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "documents")


@pytest.fixture
def make_experiment(text: DataConfig, tmp_path: Path) -> MakeExperiment:
    """Experiments whose run folder is `tmp_path / "run"`."""

    def make(kind: str = "dense", **changes: Any) -> Experiment:
        return tiny.experiment(kind, text, **{"out": tmp_path / "run", **changes})

    return make


@pytest.fixture(scope="session")
def finished(text: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The standard experiment, run once on fsdp=8; copy its folder before changing it."""
    config = tiny.experiment("dense", text, tmp_path_factory.mktemp("finished") / "run")
    ends: list[Finished] = []

    def keep_state(*args: Any, **arguments: Any) -> Finished:
        ends.append(train(*args, **arguments))
        return ends[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "train", keep_state)
        result = experiment.run(config)
    return FinishedRun(config, result, ends[0].state)
