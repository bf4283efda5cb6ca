import json
import math
from pathlib import Path

import ablate_architectures as ablate
import numpy as np
import pytest
from comparison import interval

from slm_jax import cli
from slm_jax.errors import UserError
from slm_jax.models.presets import summary
from slm_jax.train.metrics import read_metrics

ARGS = [
    *("--architectures", "dense", "mamba", "--width", "32", "--layers", "2"),
    *("--learning-rates", "3e-3", "1e-2", "--steps", "6", "--warmup-steps", "1"),
    *("--batch-size", "8", "--seq-len", "32", "--loop.quiet", "--reference-widths", "16", "24"),
]


@pytest.mark.parametrize("match", ["parameters", "flops"])
@pytest.mark.parametrize("width", [64, 96, 256])
def test_all_architectures_get_the_size_of_the_dense_reference(match: str, width: int) -> None:
    config = ablate.Ablation(match=match, width=width, layers=8)  # type: ignore[arg-type]
    built = ablate.models(config, vocab_size=257)
    assert list(built) == ["dense", "moe", "mamba", "hybrid"]
    sizes = {name: summary(model, config.seq_len) for name, model in built.items()}
    field = "total" if match == "parameters" else "training_flops"
    target = getattr(sizes["dense"], field)
    # The inner width of an expert is a whole number, and small in a small model.
    bound = 0.01 if width > 64 else 0.02
    for name, size in sizes.items():
        assert getattr(size, field) == pytest.approx(target, rel=bound), name
    assert built["dense"].d_model == width
    assert sizes["moe"].active < sizes["moe"].total


def test_a_size_no_width_reaches_is_refused() -> None:
    with pytest.raises(UserError, match="no width gives 10"):
        ablate.solve(ablate.ARCHITECTURES["dense"], 4, lambda m: summary(m, 64).total, 10)


def test_interval_is_student_t() -> None:
    # Two values 0.1 apart: t(0.975, 1) = 12.706 times the standard error 0.05.
    assert interval(np.array([1.0, 1.1])) == pytest.approx(12.706 * 0.05, rel=1e-3)
    assert math.isnan(interval(np.array([1.0])))


def test_ablation_runs_reports_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*ARGS, "--data.cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert cli.run(ablate.main, ablate.Ablation, args=args) == 0
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    assert {r["architecture"] for r in rows} == {"dense", "mamba"}
    assert [r["loss"] for r in rows] == sorted(r["loss"] for r in rows)
    for r in rows:
        assert r["seeds"] == 2
        assert len(r["grid"]) == 2
        assert r["best_learning_rate"] == float(min(r["grid"], key=r["grid"].get))
        assert 4 < r["loss"] < 5.8
        assert r["bits_per_byte"] == pytest.approx(r["loss"] / math.log(2), rel=1e-6)
        assert r["compile_seconds"] > 0
        assert r["memory_bytes"] > 4 * 3 * r["parameters"]  # weights and two moments at least
        records = read_metrics(Path(r["runs"][0]))
        assert [x["step"] for x in records if "nll" in x] == list(range(6))
        size = r["effective_size"]
        assert size["low"] <= size["median"] <= size["high"]
        assert 0 <= size["unreachable"] <= 1
    dense, mamba = (next(r for r in rows if r["architecture"] == n) for n in ("dense", "mamba"))
    # Keys and values: 2 x layers x heads x width x 4 bytes at any length; a scan's state is fixed.
    assert dense["state_bytes_per_token_1k"] == dense["state_bytes_per_token_32k"] == 2 * 2 * 16 * 4
    assert mamba["state_bytes_per_token_1k"] == 32 * mamba["state_bytes_per_token_32k"]
    text = (out / "report.md").read_text()
    assert "| dense |" in text
    assert "report.png" in text
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"

    before = {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")}
    assert len(before) == 12  # two architectures and two further dense sizes, 3 runs each
    capsys.readouterr()
    assert cli.run(ablate.main, ablate.Ablation, args=args) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")} == before

    assert cli.run(ablate.main, ablate.Ablation, args=[*args, "--steps", "7"]) == 2
    assert "steps: saved 6, given 7" in capsys.readouterr().err


def test_unknown_architecture_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(ablate.main, ablate.Ablation, args=["--architectures", "dense", "rnn"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: architectures='rnn' is unknown: choose from dense, moe")
    assert error.count("\n") == 1
