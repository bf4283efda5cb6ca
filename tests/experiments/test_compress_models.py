"""The study of quantisation and pruning: its cells, its statistics, and a run on a tiny model."""

import json
from pathlib import Path

import compress_models as study
import numpy as np
import pytest
from compression_cells import Cell, cells_of
from compression_report import Found, best_within, bootstrap, frontier, in_words, interaction

from slm_jax import cli
from slm_jax.errors import UserError

GRID = dict(
    quantisers=("rtn", "smoothquant"),
    pruners=("wanda", "structured"),
    sparsities=(0.3, 0.5),
    bits=(8, 3),
    group=32,
    both=(("gptq",), ("wanda",), (0.5,)),
)


def test_cells_are_there_once_and_corners_before_combinations() -> None:
    names = [cell.name for cell in cells_of(**GRID)]
    assert names == [
        *("dense", "rtn-w8", "rtn-w3g32", "smoothquant-w8a8", "smoothquant-w3a8"),
        *("gptq-w8", "gptq-w3g32"),  # the factorial's corners, though nobody asked for them
        *("wanda-0.3", "wanda-0.5", "wanda-0.5+gptq-w8", "wanda-0.5+gptq-w3g32"),
        *("structured-0.3", "structured-0.5"),
    ]
    for cell in cells_of(**GRID):
        assert cell.both == ("+" in cell.name)
        if cell.both:
            assert {one.name for one in cell.alone} <= set(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantisers": ("gtpq",)}, "quantisers='gtpq' does not exist: choose from gptq"),
        ({"pruners": ("wand",)}, "pruners='wand' does not exist: choose from wanda"),
        ({"bits": (5,)}, "bits=5 has no format: choose from 8, 4, 3"),
        ({"sparsities": (1.0,)}, "sparsity=1 must be at least 0 and below 1"),
        ({"models": ("gpt",)}, "models='gpt' does not exist"),
        ({"eval_tokens": 0}, "eval_tokens=0 must be at least 1"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        study.Compression(**changes)


def test_the_bootstrap_is_that_of_a_mean() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.normal(1, 2, 400), np.full(400, 256.0)
    mean, low, high = bootstrap(values, weights, 4000)
    assert mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.1)
    # A window of no weight is as if it were not there.
    more = np.append(values, 1e9), np.append(weights, 0.0)
    assert bootstrap(*more, 100)[0] == pytest.approx(mean)


def found(cell: Cell, nbytes: int, losses: np.ndarray) -> Found:
    data = {"losses": losses, "weights": np.full(len(losses), 8), "bytes": nbytes, "seconds": 0}
    return Found("tiny", cell, data)


@pytest.mark.parametrize(
    ("excess", "verdict"), [(0.1, "worse together"), (-0.1, "better together"), (0.0, "adds up")]
)
def test_interaction_is_what_the_sum_of_both_does_not_explain(excess: float, verdict: str) -> None:
    rng = np.random.default_rng(0)
    dense = 2 + rng.normal(0, 1, 64)  # windows differ more than methods
    q, p = 0.2 + rng.normal(0, 0.02, (2, 64))
    both = Cell("rtn", "w4g32", "wanda", 0.5)
    row = interaction(
        found(both, 1, dense + q + p + excess + rng.normal(0, 0.02, 64)),
        *(found(c, 1, dense + d) for c, d in zip(both.alone, (q, p), strict=True)),
        found(Cell(), 1, dense),
        2000,
    )
    assert row["verdict"] == verdict
    assert row["low"] < row["interaction"] < row["high"]
    assert row["interaction"] == pytest.approx(excess, abs=0.02)
    assert row["both"] == pytest.approx(row["quantised"] + row["pruned"] + row["interaction"])


def test_frontier_and_words_follow_the_numbers() -> None:
    losses = np.full(16, 2.0)
    q, p = Cell("rtn", "w8"), Cell(pruner="wanda", sparsity=0.5)
    cells = [
        found(Cell(), 1000, losses),
        found(q, 500, losses + 0.1),
        found(p, 450, losses + 0.3),
        found(Cell("rtn", "w4g32"), 280, losses + 0.2),
        found(Cell(pruner="wanda", sparsity=0.9), 260, losses + 3),
        found(Cell("rtn", "w4g32", "wanda", 0.5), 200, losses + 0.5),
    ]
    assert [f.nbytes for f in frontier(cells)] == [200, 280, 500, 1000]
    assert best_within(cells, "pruned", 500).cell == p
    assert best_within(cells, "quantised", 100) is None
    words = in_words("tiny", cells, 100)
    assert words[0].startswith(
        "tiny: of 3 smaller models on the frontier 2 are quantised, 0 pruned, 1 both (rtn 2,"
    )
    assert "at most 0.5 of the dense bytes: quantised +0.100 (rtn-w8), pruned +0.300" in words[1]
    assert "quantised wins by 0.200 (0.200 to 0.200)" in words[1]
    assert "at most 0.25 of the dense bytes: both +0.500 (wanda-0.5+rtn-w4g32)." in words[3]
    assert words[4] == "tiny: nothing is smaller than 0.200 of the dense bytes."
    assert len(words) == 5  # and smaller budgets are not gone through


ARGS = [
    *("--models", "moe", "--width", "16", "--layers", "1", "--steps", "3", "--quiet"),
    *("--train-batch", "8", "--seq-len", "32", "--eval-tokens", "200", "--batch-size", "8"),
    *("--calibration-tokens", "256", "--quantisers", "rtn", "--bits", "4", "--group", "8"),
    *("--pruners", "structured", "--sparsities", "0.5", "--both-pruners", "wanda"),
    *("--both-sparsities", "0.5", "--both-quantisers", "rtn", "--draws", "50"),
]


@pytest.mark.slow
def test_the_study_runs_reports_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    args = [*ARGS, "--data.cache-dir", str(tmp_path / "cache"), "--out", str(out)]
    assert cli.run(study.main, study.Compression, args=args) == 0
    lines = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    cells = {line["cell"]: line for line in lines if line["kind"] == "cell"}
    assert list(cells) == ["dense", "rtn-w4g8", "structured-0.5", "wanda-0.5", "wanda-0.5+rtn-w4g8"]
    dense = cells["dense"]
    saved = json.loads((out / "moe/cells/dense.json").read_text())
    assert sum(saved["weights"]) == 200
    assert dense["loss"] == pytest.approx(
        np.average(saved["losses"], weights=saved["weights"]), rel=1e-9
    )
    assert dense["rise"] == 0
    assert 4 < dense["loss"] < 6
    assert dense["zeros"] == 0
    assert cells["wanda-0.5"]["zeros"] > 0.4  # routers stay
    # A bit a weight and half of them in 16 bits, of the matrices but the embedding.
    assert 0.5 < cells["wanda-0.5"]["bytes"] / dense["bytes"] < 0.8
    assert cells["wanda-0.5+rtn-w4g8"]["bytes"] < cells["rtn-w4g8"]["bytes"]
    assert cells["rtn-w4g8"]["bytes"] < 0.6 * dense["bytes"]  # 8 bits for the embedding
    assert cells["structured-0.5"]["parameters"] < 0.7 * dense["parameters"]
    [both] = [line for line in lines if line["kind"] == "interaction"]
    assert both["both"] == pytest.approx(cells["wanda-0.5+rtn-w4g8"]["rise"])
    assert both["interaction"] == pytest.approx(both["both"] - both["quantised"] - both["pruned"])
    text = (out / "report.md").read_text()
    assert "| wanda-0.5+rtn-w4g8 |" in text
    assert "- moe: of " in text
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"

    before = {p: p.stat().st_mtime_ns for p in out.glob("moe/cells/*-*.json")}
    assert len(before) == 4
    (out / "moe/cells/rtn-w4g8.json").unlink()
    capsys.readouterr()
    assert cli.run(study.main, study.Compression, args=args) == 0
    after = {p: p.stat().st_mtime_ns for p in out.glob("moe/cells/*-*.json")}
    changed = [p.name for p in before if before[p] != after[p]]
    assert changed == ["rtn-w4g8.json"]  # what was missing, and nothing else
    assert cli.run(study.main, study.Compression, args=[*args, "--eval-tokens", "100"]) == 2
    error = capsys.readouterr().err
    assert "holds cells of another study (eval_tokens: saved 200, given 100)" in error


def test_smollm2_without_its_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--models", "smollm2", "--smollm2", str(tmp_path / "no.gguf"), "--out", str(tmp_path)]
    assert cli.run(study.main, study.Compression, args=args) == 2
    assert "is no file: run `make smollm2`" in capsys.readouterr().err
