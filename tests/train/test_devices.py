"""The number of devices, how they are meshed, and microbatches do not change a run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from slm_jax.data import DataConfig
from slm_jax.models.recursion import RecursionConfig
from slm_jax.parallel import MeshConfig, make_mesh
from slm_jax.train import experiment
from slm_jax.train.experiment import Experiment, run
from slm_jax.train.metrics import read_metrics
from tests.train import tiny
from tests.train.conftest import FinishedRun

COMPARED = ("loss", "grad_norm", "nll", "bits_per_byte", "valid_loss", "valid_loss_ema")


def curves(config: Experiment) -> dict[str, list[float]]:
    records = read_metrics(config.out)
    return {name: [r[name] for r in records if name in r] for name in COMPARED}


def run_on_one_device(config: Experiment, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setattr(experiment, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))
    config = dataclasses.replace(config, mesh=MeshConfig())
    run(config)
    return config


@pytest.fixture(scope="module")
def reference(text: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The curves of the standard experiment on one device."""
    out = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        return curves(run_on_one_device(tiny.experiment("dense", text, out), patch))


def assert_same_curves(got: dict[str, list[float]], want: dict[str, list[float]]) -> None:
    assert len(got["loss"]) == 6
    for name in COMPARED:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)


def test_fsdp(reference: Any, finished: FinishedRun) -> None:
    assert_same_curves(curves(finished.config), reference)


@pytest.mark.parametrize(
    ("mesh", "accumulate"), [(MeshConfig(data=8, fsdp=1), 1), (MeshConfig(data=2, fsdp=4), 2)]
)
def test_meshes(
    mesh: MeshConfig, accumulate: int, reference: Any, make_experiment: Callable[..., Experiment]
) -> None:
    config = make_experiment(mesh=mesh, accumulate=accumulate)
    run(config)
    assert_same_curves(curves(config), reference)


@pytest.mark.slow
def test_all_devices_repeat_layers_as_often(
    make_experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recursion = RecursionConfig(1, 1, repeats=2, sampling="uniform", backward=2)
    model = tiny.model("dense", recursion=recursion)
    config = make_experiment(model=model, out=tmp_path / "eight")
    run(config)
    alone = run_on_one_device(dataclasses.replace(config, out=tmp_path / "one"), monkeypatch)
    assert_same_curves(curves(config), curves(alone))
    drawn = [
        [r["recursion_runs"] for r in read_metrics(c.out) if "recursion_runs" in r]
        for c in (config, alone)
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


def test_microbatches(
    reference: Any,
    make_experiment: Callable[..., Experiment],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = run_on_one_device(make_experiment(accumulate=4), monkeypatch)
    assert_same_curves(curves(config), reference)
    batches = [r["loss"] for r in read_metrics(config.out) if "loss" in r]
    assert np.ptp(batches) > 0.1  # it learns: the runs had room to differ
