import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trm_sudoku as study
from comparison import interval
from trm_report import Measured, verdict

from slm_jax import cli
from slm_jax.data.puzzles import SudokuGenerated, open_puzzles
from slm_jax.errors import UserError
from slm_jax.train.metrics import read_metrics
from slm_jax.train.trm_experiment import run, step_flops
from slm_jax.train.trm_presets import TRM_PRESETS
from tests.train import tiny_trm

NAMES = ["recursion", "direct-2", "layers-4"]
ARGS = [
    *("--arms", *NAMES, "--model.d-model", "8", "--model.n-heads", "1", "--model.n-layers", "1"),
    *("--model.ff-multiple", "8"),
    *("--data.n-train", "40", "--data.n-valid", "8", "--data.n-test", "20", "--steps", "6"),
    *("--learning-rates", "1e-2", "2e-2", "--seeds", "2", "--n-supervision", "2"),
    *("--batch-size", "8", "--warmup-steps", "1", "--evaluations", "2", "--quiet"),
]


def test_interval_is_student_t() -> None:
    # Two values 0.1 apart: t(0.975, 1) = 12.706 times the standard error 0.05.
    assert interval(np.array([0.8, 0.9])) == pytest.approx(12.706 * 0.05, rel=1e-3)
    # Three: t(0.975, 2) = 4.303, standard deviation 0.1.
    assert interval(np.array([0.7, 0.8, 0.9])) == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert interval(np.array([0.5, 0.5, 0.5])) == 0
    assert math.isnan(interval(np.array([0.8])))


@pytest.mark.parametrize(
    ("difference", "half", "says"),
    [
        (0.2, 0.1, "holds"),
        (0.1, 0.1, "direction only: the interval holds 0"),
        (0.1, 0.2, "direction only: the interval holds 0"),
        (0.1, math.nan, "direction only: the interval holds 0"),
        (-0.1, 0.2, "not seen: the interval holds 0"),
        (-0.2, 0.1, "the opposite holds"),
        (0.0, 0.0, "not seen: the interval holds 0"),
    ],
)
def test_verdicts(difference: float, half: float, says: str) -> None:
    assert verdict(difference, half) == says


def test_arms_and_claims_fit_together() -> None:
    config = study.TRMSudoku()
    assert config.arms[0] == "recursion"
    assert set(config.arms) <= study.ARMS.keys()
    assert {c.more for c in study.CLAIMS} == {"recursion"}
    assert {c.less for c in study.CLAIMS} == study.ARMS.keys() - {"recursion"}
    runs = {name: study.experiment(config, name, 2e-3, 0) for name in study.ARMS}
    first = runs["recursion"]
    total = first.steps * step_flops(first)
    for name, one in runs.items():
        assert abs(one.steps * step_flops(one) / total - 1) < 0.5 / one.steps + 1e-9, name
        if name != "recursion":
            assert (one.model, one.objective) != (first.model, first.objective), name
            assert one.schedule == first.schedule, name
            assert one.data == first.data, name
    depth = {n: Measured(n, r.model, 0, {}, []).depth for n, r in runs.items()}
    assert depth["recursion"] == depth["layers-4"] == depth["single-z"] == 2 * 2 * 4
    assert (depth["direct-2"], depth["direct-8"]) == (2, 8)
    assert runs["direct-2"].objective.n_supervision == runs["direct-8"].objective.n_supervision == 1


def test_the_preset_is_the_recursion_arm() -> None:
    preset = TRM_PRESETS["sudoku-6x6"]
    arm = study.experiment(study.TRMSudoku(), "recursion", 2e-3, 0)
    assert replace(preset, loop=arm.loop, out=arm.out) == arm


def test_the_study_runs_reports_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    args = [*ARGS, "--out", str(out)]
    with tiny_trm.one_device():
        assert cli.run(study.main, study.TRMSudoku, args=args) == 0
    lines = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    arms = {line["arm"]: line for line in lines if line["kind"] == "arm"}
    claims = [line for line in lines if line["kind"] == "claim"]
    assert list(arms) == NAMES
    for row in arms.values():
        per_step = row["flops"] / row["steps"]
        assert abs(row["flops"] - arms["recursion"]["flops"]) <= per_step / 2
        assert row["grid"].keys() == {"0.01", "0.02"}
        # The rate is the one that solves most, or has most cells right, of other puzzles.
        scores = {}
        for rate in row["grid"]:
            log = read_metrics(out / row["arm"] / f"lr{rate}-seed0")
            n = len(row["seeds"][0]["exact"])
            last = [r for r in log if "exact_1" in r][-1]
            scores[float(rate)] = (last[f"exact_{n}_ema"], last[f"cell_{n}_ema"])
        assert row["learning_rate"] == max(scores, key=lambda rate: scores[rate])
        assert len(row["seeds"]) == 2
        assert row["averaged"] == np.mean([s["exact_ema"][-1] for s in row["seeds"]])
    assert [len(arms[name]["seeds"][0]["exact"]) for name in NAMES] == [2, 1, 2]
    assert arms["direct-2"]["steps"] > 2 * arms["recursion"]["steps"]
    assert arms["layers-4"]["depth"] == arms["recursion"]["depth"]
    assert [line["claim"] for line in claims] == [
        "recursion above direct-2",
        "recursion above layers-4",
        "recursion: averaged above raw weights",
        "recursion: 2 supervision steps above 1",
    ]
    for line in claims:
        assert line["difference"] == pytest.approx(np.mean(line["by_seed"]))
        assert line["verdict"] == verdict(line["difference"], line["half_width"])
    text = (out / "report.md").read_text()
    assert "| direct-2 |" in text
    assert "| recursion above direct-2 |" in text
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"

    before = {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")}
    assert len(before) == 3 * 3  # arms; two rates, and one of them on a second seed
    capsys.readouterr()
    with tiny_trm.one_device():
        assert cli.run(study.main, study.TRMSudoku, args=args) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")} == before
    assert cli.run(study.main, study.TRMSudoku, args=[*args, "--steps", "7"]) == 2
    assert "steps: saved 6, given 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("recurse",)}, "arms='recurse' is unknown: choose from recursion, direct-2"),
        ({"arms": ()}, "must not be empty"),
        ({"learning_rates": ()}, "must not be empty"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        *(
            (
                {"model": replace(study.TRMSudoku().model, n_latent_steps=n)},
                f"model.n_latent_steps={n} with the arm layers-4, which halves n",
            )
            for n in (1, 4)
        ),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        study.TRMSudoku(**changes)


@pytest.mark.slow
def test_recursion_solves_what_a_direct_network_of_equal_flops_does_not(tmp_path: Path) -> None:
    config = study.TRMSudoku(
        data=SudokuGenerated(n_test=200), steps=1500, evaluations=1, quiet=True, out=tmp_path
    )
    splits = open_puzzles(config.data)
    with tiny_trm.one_device():  # eight on the cores of one machine are slow
        recursion, direct = (
            run(study.experiment(config, name, 2e-3, 0), splits)
            for name in ("recursion", "direct-2")
        )
    assert recursion.exact_ema is not None
    assert direct.exact_ema is not None
    assert recursion.flops == pytest.approx(direct.flops, rel=1e-3)
    assert recursion.exact_ema[-1] >= 0.8
    assert direct.exact_ema[-1] <= 0.4
    assert recursion.exact_ema[-1] >= recursion.exact_ema[0]
