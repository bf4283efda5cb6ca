"""Runs on puzzles: measured, interrupted, finished, misfitting, on one and on eight devices."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from slm_jax.data.puzzles import ArcTasks, SudokuFiles, SudokuGenerated, open_puzzles
from slm_jax.data.puzzles.arc import decode_grid
from slm_jax.errors import UserError
from slm_jax.models.presets import dense
from slm_jax.models.trm import TRM
from slm_jax.models.trm_flops import training_flops
from slm_jax.nn.module import named_leaves
from slm_jax.parallel import MeshConfig, make_mesh
from slm_jax.train import trm_experiment as module
from slm_jax.train.experiment import Experiment
from slm_jax.train.loop import LoopConfig
from slm_jax.train.metrics import read_metrics
from slm_jax.train.optimizer import OptimizerConfig, ScheduleConfig
from slm_jax.train.progress import TrainProgress
from slm_jax.train.serialize import to_json
from slm_jax.train.tasks import trm
from slm_jax.train.trm_experiment import TRMExperiment, TRMResult, load_experiment, load_model, run
from tests.train import tiny_trm
from tests.train.tiny_trm import SUDOKU, experiment

TABLE = {
    "table_schedule": ScheduleConfig(0.01, "constant", 0),
    "optimizer": OptimizerConfig("adam_atan2", clip_norm=None, table_decay=0.1),
}
MEASURED = ("exact", "cell", "exact_ema", "cell_ema")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TRMExperiment, TRMResult]:
    """The standard run, on one device; copy its folder before changing it."""
    config = experiment(tmp_path_factory.mktemp("finished") / "run")
    with tiny_trm.one_device():
        return config, run(config)


def losses(out: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(out) if "loss" in r]


def test_a_run_measures_the_test_puzzles(finished: tuple[TRMExperiment, TRMResult]) -> None:
    config, result = finished
    test = open_puzzles(SUDOKU).test.batch(slice(None))
    for suffix, ema in (("", False), ("_ema", True)):
        model, loaded = load_model(config.out, ema=ema)
        assert loaded == config
        mesh = make_mesh(devices=jax.devices()[:1])
        scores = trm.accuracy(model, test, mesh, n_steps=3, batch_size=7)
        for name in ("exact", "cell"):
            got = getattr(result, f"{name}{suffix}")
            np.testing.assert_allclose(got, scores[name], atol=2 / 19 / 36)
            assert len(got) == 3
    assert result.arc_pass_2 is None
    assert result.steps == 6
    assert result.flops == 6 * 16 * training_flops(config.model)
    assert result.compile_seconds > 0
    assert result.memory_bytes > 0
    records = read_metrics(config.out)
    assert [r["step"] for r in records if "loss" in r] == list(range(6))
    assert sum(r["flops"] for r in records if "loss" in r) == result.flops
    (valid,) = [r for r in records if "exact_1" in r]
    assert {f"{name}_{k}{suffix}" for name in ("exact", "cell", "halt") for k in (1, 2, 3)
            for suffix in ("", "_ema")} <= valid.keys()  # fmt: skip


def test_a_finished_run_returns_its_result(
    finished: tuple[TRMExperiment, TRMResult], tmp_path: Path
) -> None:
    config, result = finished
    out = tmp_path / "copy"
    shutil.copytree(config.out, out)
    with mock.patch.object(module, "train") as train, mock.patch.object(module, "compile_step"):
        # Where it is and how it is watched may differ, what it computes may not.
        assert run(replace(config, out=out, loop=LoopConfig(log_every=3))) == result
        for changes, says in (
            ({"seed": 1}, "seed: saved 0, given 1"),
            ({"steps": 7}, "steps: saved 6, given 7"),
            ({"data": replace(SUDOKU, seed=1)}, "data.seed: saved 0, given 1"),
        ):
            with pytest.raises(UserError, match=says):
                run(replace(config, out=out, **changes))  # type: ignore[arg-type]
    train.assert_not_called()


def test_an_interrupted_run_goes_on_with_the_same_numbers(
    finished: tuple[TRMExperiment, TRMResult], tmp_path: Path
) -> None:
    config, result = finished
    out = tmp_path / "stopped"

    def stop(self: TrainProgress, done: int, loss: float, rate: float) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with (
        tiny_trm.one_device(),
        mock.patch.object(TrainProgress, "update", stop),
        pytest.raises(KeyboardInterrupt),
    ):
        run(replace(config, out=out))
    assert not (out / "result.json").exists()
    begun, _ = load_model(out, ema=False)  # of the checkpoint after four steps
    with tiny_trm.one_device():
        again = run(replace(config, out=out))
    assert losses(out) == losses(config.out)
    assert len(losses(out)) == 6
    for name in MEASURED:
        assert getattr(again, name) == getattr(result, name)
    ended, whole = (load_model(folder, ema=False)[0] for folder in (out, config.out))
    jax.tree.map(np.testing.assert_array_equal, ended, whole)
    assert not same(begun, ended)


def same(a: TRM, b: TRM) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def test_raw_and_averaged_weights_are_loaded(finished: tuple[TRMExperiment, TRMResult]) -> None:
    config, _ = finished
    raw, averaged = (load_model(config.out, ema=ema)[0] for ema in (False, True))
    assert not same(raw, averaged)
    for model in (raw, averaged):
        assert all(x.devices() == {jax.devices()[0]} for x in jax.tree.leaves(model))
    # What is fixed is not averaged.
    for name in ("y_init", "z_init"):
        a, b = (np.asarray(named_leaves(m)[name].get_value()) for m in (raw, averaged))
        np.testing.assert_array_equal(a, b)


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    out = tiny_trm.write_run(experiment(tmp_path / "raw", ema_decay=None))
    load_model(out, ema=False)
    with pytest.raises(UserError, match=r"ema=True: the run in .*raw keeps no average"):
        load_model(out, ema=True)
    (tmp_path / "lm").mkdir()
    config = json.dumps(to_json(Experiment(dense(16, 1, 2, d_ff=32))))
    (tmp_path / "lm" / "config.json").write_text(config)
    with pytest.raises(UserError, match="trains a language model: give a run that trains a recur"):
        load_experiment(tmp_path / "lm")
    with pytest.raises(UserError, match="give the folder of a training run"):
        load_experiment(tmp_path / "none")


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(
    finished: tuple[TRMExperiment, TRMResult], tmp_path: Path
) -> None:
    config, one = finished
    split = run(replace(config, out=tmp_path / "run", mesh=MeshConfig(data=4, fsdp=2)))
    np.testing.assert_allclose(losses(Path(split.out)), losses(config.out), rtol=1e-5)
    assert np.ptp(losses(config.out)) > 1e-2
    np.testing.assert_allclose(one.cell, split.cell, atol=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": tiny_trm.model(9)}, "model.vocab_size=9: the puzzles of sudoku-6x6 have 8"),
        ({"model": tiny_trm.model(8, 81)}, "model.seq_len=81: the puzzles of .* have 36"),
        ({"batch_size": 12}, r"batch_size=12 .* is not a multiple of data x fsdp"),
    ],
)
def test_a_misfit_of_model_and_data_leaves_no_folder(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(experiment(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": tiny_trm.model(n_puzzle_ids=1)}, "table_schedule=None: .* needs one"),
        (
            {"model": tiny_trm.model(n_puzzle_ids=1), "table_schedule": ScheduleConfig()},
            "optimizer.table_decay=None: .* needs one",
        ),
        ({"table_schedule": ScheduleConfig()}, "table_schedule=.*must not have one"),
        ({"optimizer": TABLE["optimizer"]}, "optimizer.table_decay=0.1: .*must not have one"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be between 0 and 1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        experiment(Path("unused"), **changes)


def test_other_puzzles_in_the_same_files_are_another_run(tmp_path: Path) -> None:
    def write(seed: int) -> None:
        made = open_puzzles(SudokuGenerated(6, 20, 4, 8, seed))
        for part, puzzles in (("train", made.train), ("test", made.test)):
            rows = [
                "".join(str(max(0, int(t) - 1)) for t in tokens)
                for pair in zip(puzzles.inputs, puzzles.labels, strict=True)
                for tokens in pair
            ]
            lines = [f"{a},{b}\n" for a, b in zip(rows[::2], rows[1::2], strict=True)]
            (tmp_path / f"{part}.csv").write_text("puzzle,solution\n" + "".join(lines))

    write(0)
    data = SudokuFiles(tmp_path / "train.csv", tmp_path / "test.csv", None, 4, None)
    config = experiment(tmp_path / "run", data=data)
    tiny_trm.write_run(config)
    with mock.patch.object(module, "compile_program"), mock.patch.object(module, "train") as train:
        train.side_effect = InterruptedError  # it would have gone on
        with pytest.raises(InterruptedError):
            run(config)
        write(1)
        with pytest.raises(UserError, match=r"holds another run \(data_fingerprint: "):
            run(config)


def test_arc_from_files_to_the_official_score(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def task(n_test: int) -> dict[str, Any]:
        pairs = [
            {k: rng.integers(0, 10, (2, 3)).tolist() for k in ("input", "output")}
            for _ in range(2 + n_test)
        ]
        return {"train": pairs[:2], "test": pairs[2:]}

    training, evaluation = tmp_path / "training.json", tmp_path / "evaluation.json"
    training.write_text(json.dumps({"a": task(1)}))
    evaluation.write_text(json.dumps({"b": task(1), "c": task(2)}))
    data = ArcTasks((training,), evaluation, n_variants=3, n_valid=2)
    few = experiment(
        tmp_path / "few", data=data, model=tiny_trm.model(12, 900, n_puzzle_ids=12), **TABLE
    )
    with pytest.raises(UserError, match=r"n_puzzle_ids=12: .* has ids below 13; raise it"):
        run(few)
    config = replace(few, out=tmp_path / "run", steps=2, batch_size=8)
    model = tiny_trm.model(12, 900, n_puzzle_ids=13, mixer="attention")
    config = replace(config, model=model)
    with tiny_trm.one_device():
        result = run(config)
    assert result.arc_pass_2 in (0.0, 0.25, 0.5, 0.75, 1.0)
    rates = [r["table_learning_rate"] for r in read_metrics(config.out) if "loss" in r]
    assert rates == [0.01, 0.01]

    # What is asked is every test in every variant; answer all of b, and one test of c, rightly in
    # two of its four variants, which is more votes than any of the wrong grids has.
    arc = open_puzzles(data).arc
    assert arc is not None
    labels = arc.asked.labels
    task_of = [arc.variants.task_of(i) for i in arc.asked.puzzle_ids]
    first_test = labels[task_of.index("c")]
    asked: list[TRM] = []

    def answer(model: TRM, puzzles: Any, *args: Any, **arguments: Any) -> trm.Answers:
        asked.append(model)
        said = rng.integers(2, 12, labels.shape).astype(np.uint8)
        for row, puzzle_id in enumerate(arc.asked.puzzle_ids):
            grid = arc.variants.undo(puzzle_id, decode_grid(labels[row]))
            known = task_of[row] == "b" or np.array_equal(grid, decode_grid(first_test))
            if known and puzzle_id in arc.variants.ids(task_of[row])[:2]:
                said[row] = labels[row]
        return trm.Answers(said, np.zeros(len(said), np.float32))

    (config.out / "result.json").unlink()
    with tiny_trm.one_device(), mock.patch.object(trm, "answer", answer):
        assert run(config).arc_pass_2 == (1 + 1 / 2) / 2
    (model_asked,) = asked
    assert same(model_asked, load_model(config.out, ema=True)[0])
