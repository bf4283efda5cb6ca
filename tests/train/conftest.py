from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from slm_jax.data import DataConfig
from slm_jax.train import experiment as module
from slm_jax.train.experiment import Experiment, Result, run
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
    with mock.patch.object(module, "train", side_effect=module.train) as train:
        ends = []
        train.side_effect = lambda *a, f=train.side_effect, **k: ends.append(f(*a, **k)) or ends[0]
        result = run(config)
    return FinishedRun(config, result, ends[0].state)
