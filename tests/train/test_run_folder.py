"""One folder is one run: resumed, finished, refused or overwritten, never mixed up."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.parallel import MeshConfig
from slm_jax.train import experiment as module
from slm_jax.train.experiment import Experiment, load_model, run
from slm_jax.train.loop import CHECKPOINTS_FOLDER, DivergedError, LoopConfig
from slm_jax.train.metrics import read_metrics
from slm_jax.train.optimizer import OptimizerConfig, ScheduleConfig
from slm_jax.train.serialize import to_json
from slm_jax.train.tasks.lm import LMLossConfig
from tests.train import tiny
from tests.train.conftest import FinishedRun, MakeExperiment


@pytest.fixture
def copy(finished: FinishedRun, tmp_path: Path) -> Experiment:
    """The finished run in a folder of its own."""
    out = tmp_path / "run"
    shutil.copytree(finished.config.out, out)
    return dataclasses.replace(finished.config, out=out)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(config: Experiment) -> str:
    with pytest.raises(UserError) as error:
        run(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_finished_run_is_not_trained_again(finished: FinishedRun, copy: Experiment) -> None:
    before = files(copy.out)
    with mock.patch.object(module, "train") as train, mock.patch.object(module, "compile_step"):
        assert run(copy) == finished.result
    train.assert_not_called()
    assert files(copy.out) == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 7}, "(steps: saved 6, given 7)"),
        ({"seed": 1, "steps": 7}, "(steps: saved 6, given 7 and 1 more)"),
        ({"schedule": ScheduleConfig(0.02, warmup_steps=2)}, "(schedule.learning_rate: saved 0.01"),
        ({"model": tiny.model("moe")}, "(model.pattern.0.channel.type: saved MLPConfig, given MoE"),
        ({"ema_decay": None}, "(ema_decay: saved 0.9, given None)"),
        ({"optimizer": OptimizerConfig("lion")}, "(optimizer.name: saved adamw, given lion)"),
    ],
)
def test_another_run_is_refused_by_field(
    copy: Experiment, changes: dict[str, Any], says: str
) -> None:
    before = files(copy.out)
    message = refusal(dataclasses.replace(copy, **changes))
    assert message.startswith(f"out={copy.out} holds another run {says[:-1]}")
    assert "--overwrite" in message
    assert files(copy.out) == before


def test_other_text_in_the_same_files_is_another_run(copy: Experiment, tmp_path: Path) -> None:
    text = tmp_path / "text"
    same = tiny.write_text(text)
    config = json.loads((copy.out / "config.json").read_text())
    config["data"] = json.loads(json.dumps(to_json(same)))
    (copy.out / "config.json").write_text(json.dumps(config))
    copy = dataclasses.replace(copy, data=same)
    run(copy)
    (text / "digits.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n' * 50)
    assert "data_fingerprint: saved" in refusal(copy)


def test_where_and_how_it_is_watched_may_change(finished: FinishedRun, copy: Experiment) -> None:
    changed = dataclasses.replace(
        copy, mesh=MeshConfig(data=8, fsdp=1), loop=LoopConfig(log_every=3, quiet=True)
    )
    assert run(changed) == finished.result


def test_foreign_folder_is_refused(make_experiment: MakeExperiment) -> None:
    config = make_experiment(overwrite=True)
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("years")
    assert "is not empty and holds no run" in refusal(config)
    assert files(config.out) == {"thesis.tex": b"years"}


def test_overwrite_does_not_delete_a_downloaded_model(make_experiment: MakeExperiment) -> None:
    """It has a config.json, too."""
    config = make_experiment(overwrite=True)
    config.out.mkdir()
    (config.out / "config.json").write_text('{"model_type": "llama"}')
    (config.out / "model.safetensors").write_text("weights")
    before = files(config.out)
    assert "config.json of something else" in refusal(config)
    assert "config.json of something else" in refusal(dataclasses.replace(config, overwrite=False))
    assert files(config.out) == before


def test_overwrite_begins_again(finished: FinishedRun, copy: Experiment) -> None:
    (copy.out / "checkpoints" / "notes.txt").write_text("mine")
    again = run(dataclasses.replace(copy, overwrite=True))
    assert not (copy.out / "checkpoints" / "notes.txt").exists()
    assert again.valid_loss == finished.result.valid_loss
    drop = {"tokens_per_second"}
    losses = [
        [{k: v for k, v in r.items() if k not in drop} for r in read_metrics(c.out)]
        for c in (copy, finished.config)
    ]
    assert losses[0] == losses[1]


def test_configuration_that_cannot_run_leaves_folders_alone(
    copy: Experiment, make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    before = files(copy.out)
    bad = dataclasses.replace(copy, batch_size=12, overwrite=True)
    assert "batch_size=12" in refusal(bad)
    assert files(copy.out) == before
    new = make_experiment(batch_size=12, out=tmp_path / "new")
    assert "batch_size=12" in refusal(new)
    assert not new.out.exists()


@pytest.mark.parametrize("left", ["config.tmp", None])
def test_run_killed_as_it_began_is_started_again(
    finished: FinishedRun, make_experiment: MakeExperiment, left: str | None
) -> None:
    """Between making the folder, writing the configuration and naming it."""
    config = make_experiment()
    config.out.mkdir()
    if left:
        (config.out / left).write_text('{"type": "Exper')
    assert run(config).valid_loss == finished.result.valid_loss


def test_run_killed_before_its_result_was_whole(finished: FinishedRun, copy: Experiment) -> None:
    whole = (copy.out / "result.json").read_text()
    (copy.out / "result.json").unlink()
    (copy.out / "result.tmp").write_text(whole[:20])
    records = read_metrics(copy.out)
    result = run(copy)
    assert result.valid_loss == finished.result.valid_loss
    assert result.valid_loss_ema == finished.result.valid_loss_ema
    assert read_metrics(copy.out) == records
    assert not (copy.out / "result.tmp").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b""),
        ("config.json", b'{"type": "Experiment", "model"'),
        ("config.json", b"\xff\xfe\x00"),
        ("config.json", b"[1, 2]"),
        ("result.json", b'{"valid_loss": 1.0'),
    ],
)
def test_damaged_file_is_one_line(copy: Experiment, name: str, content: bytes) -> None:
    (copy.out / name).write_bytes(content)
    message = refusal(copy)
    assert str(copy.out / name) in message
    assert "cannot be read" in message
    if name == "config.json":
        with pytest.raises(UserError, match="cannot be read"):
            load_model(copy.out)


def test_divergence_names_the_step_and_the_last_good_checkpoint(
    make_experiment: MakeExperiment,
) -> None:
    config = make_experiment(
        schedule=ScheduleConfig(learning_rate=1e12, shape="constant", warmup_steps=0),
        loop=LoopConfig(checkpoint_every=1, quiet=True),
    )
    with pytest.raises(DivergedError) as error:
        run(config)
    records = read_metrics(config.out)
    logged = [r for r in records if not r["skipped"]]
    step = len(logged)
    assert [r["skipped"] for r in records[step:]] == [1, 1, 1]
    assert f"at step {step + 2} with learning_rate=1e+12, bad step 3" in str(error.value)
    assert f"checkpoint {step} is the last good one" in str(error.value)
    assert all(np.isfinite(r["loss"]) for r in logged)
    for average in (False, True):
        model, _ = load_model(config.out, ema=average)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(model))
    assert (config.out / CHECKPOINTS_FOLDER / str(step)).is_dir()
    assert not (config.out / "result.json").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "steps=0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"tail_average": -1.0, "ema_decay": None}, "tail_average=-1.0 must be at least 0"),
        ({"tail_average": 8.0}, "ema_decay=0.9 and tail_average=8.0 are both given"),
        ({"eval_tokens": 0}, "eval_tokens=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_impossible_values_are_refused_at_once(
    make_experiment: MakeExperiment, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        make_experiment(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"model": dataclasses.replace(tiny.model("dense"), vocab_size=256)},
            ["model.vocab_size=256", "257 tokens of byte"],
        ),
        ({"batch_size": 12}, ["batch_size=12", "data x fsdp x expert x accumulate = 8", "choose"]),
        ({"batch_size": 24, "accumulate": 2}, ["batch_size=24", "= 16: choose"]),
        ({"mesh": MeshConfig(data=3)}, ["8 device(s)"]),
        (
            {"model": dataclasses.replace(tiny.model("dense"), d_model=20)},
            ["of size 20 is not a multiple of", "fsdp=8"],
        ),
        ({"objective": LMLossConfig(chunk=5)}, ["chunk=5", "seq_len=16", "divisor"]),
        ({"seq_len": 4000}, ["seq_len=4000"]),
    ],
)
def test_configurations_that_cannot_run_say_why(
    make_experiment: MakeExperiment, changes: dict[str, Any], says: list[str]
) -> None:
    message = refusal(make_experiment(**changes))
    for part in says:
        assert part in message
