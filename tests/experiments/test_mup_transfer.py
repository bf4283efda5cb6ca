import json
import math
from pathlib import Path

import mup_transfer as transfer
import pytest
from mup_report import Curve, row, shift, verdict

from slm_jax import cli
from slm_jax.errors import UserError

ARGS = [
    *("--architectures", "dense", "--widths", "16", "32", "--base-width", "32", "--layers", "1"),
    *("--learning-rates", "0.04", "0.08", "0.16", "0.32", "--seeds", "1", "--steps", "4"),
    *("--warmup-steps", "1", "--batch-size", "8", "--seq-len", "32", "--eval-tokens", "512"),
    *("--check-widths", "16", "32", "--check-steps", "1"),
]


def parabola(vertex: float, rates: list[float]) -> dict[float, float]:
    return {r: 2 + 0.3 * math.log2(r / vertex) ** 2 for r in rates}


def test_best_rate_is_the_vertex_of_a_parabola() -> None:
    rates = [2.0**k for k in range(-8, -3)]
    for vertex in (0.011, 0.0156, 0.03):
        assert transfer.best_rate(parabola(vertex, rates)) == pytest.approx(vertex, rel=1e-9)
    # Rates in any order; a flat neighbour moves it by half a step at most.
    assert transfer.best_rate({4.0: 1.0, 1.0: 2.0, 2.0: 1.0}) == pytest.approx(2 * 2**0.5)


def test_a_lowest_loss_at_the_edge_or_beside_a_diverged_run_gives_no_rate() -> None:
    assert transfer.best_rate({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}) is None
    assert transfer.best_rate({1.0: 3.0, 2.0: 2.0, 4.0: 1.0}) is None
    assert transfer.best_rate({1.0: 3.0, 2.0: 2.0, 4.0: math.inf}) is None


def test_shift_is_in_octaves_and_judged_by_one_grid_step() -> None:
    rates = [2.0**k for k in range(-8, -3)]

    def rows(first: float, last: float) -> list[dict]:
        curves = [
            Curve("dense", "muP", w, {r: [v] for r, v in parabola(best, rates).items()})
            for w, best in ((32, first), (128, last))
        ]
        return [row(c, transfer.best_rate) for c in curves]

    assert shift(rows(0.03, 0.01)) == pytest.approx(math.log2(0.01 / 0.03))
    assert verdict(shift(rows(0.03, 0.01))) == "one grid step or more"
    assert verdict(shift(rows(0.01, 0.019))) == "less than one grid step"
    assert verdict(shift(rows(0.01, 9.0))) == "not bracketed by the grid"


def test_both_parametrisations_are_one_model_at_the_base_width() -> None:
    config = transfer.Transfer()
    at_base = [transfer.build(config, "dense", p, 128, 257) for p in ("standard", "muP")]
    assert at_base[0] == at_base[1]
    narrow = [transfer.build(config, "mamba", p, 32, 257) for p in ("standard", "muP")]
    assert [m.mup.width_ratio(m.d_model) for m in narrow] == [1.0, 0.25]


@pytest.mark.slow
def test_transfer_runs_reports_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*ARGS, "--data.cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert cli.run(transfer.main, transfer.Transfer, args=args) == 0
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds == ["sweep"] * 4 + ["shift"] * 2 + ["coordinates"] * 4
    sweeps = {(r["parametrisation"], r["width"]): r for r in lines[:4]}
    assert sweeps["standard", 32]["losses"] == sweeps["muP", 32]["losses"]
    narrow = [sweeps[p, 16]["losses"]["0.04"] for p in ("standard", "muP")]
    assert narrow[0] != narrow[1]
    for r in sweeps.values():
        assert len(r["losses"]) >= 3
        assert all(3 < loss < 30 for losses in r["losses"].values() for loss in losses)
    text = (out / "report.md").read_text()
    assert "| dense, muP |" in text
    for plot in ("report.png", "coordinates.png"):
        assert (out / plot).read_bytes()[:4] == b"\x89PNG"

    before = {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")}
    assert len(before) == sum(len(r["losses"]) for r in sweeps.values()) - len(
        sweeps["muP", 32]["losses"]
    )
    assert cli.run(transfer.main, transfer.Transfer, args=args) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")} == before
    capsys.readouterr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ("rnn",)}, "architectures='rnn' is unknown: choose from dense, mamba"),
        ({"widths": (24, 48)}, "widths=24 is not a multiple of head_dim=16"),
        ({"widths": (32,)}, "two or more, growing"),
        ({"learning_rates": (0.1, 0.3, 0.9)}, "each twice the last"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        transfer.Transfer(**changes)
