"""The isoFLOP study: what it says of rows with a known law, and that it trains and resumes."""

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import isoflop_cpu
import isoflop_report
import numpy as np
import pytest
from isoflop_cpu import GRIDS, Grid, IsoFLOPStudy, best_rate
from isoflop_report import Trained, as_table, curves, fitted, write_report
from rich.console import Console

from slm_jax import cli
from slm_jax.models.presets.family import FAMILIES
from slm_jax.scaling.study import Study
from slm_jax.train import experiment
from slm_jax.train.ladder import Row
from slm_jax.train.plan import Ladder, plan

BUDGETS = (5e10, 1e11, 2e11, 4e11, 8e11)
E, A, ALPHA = 1.2, 900.0, 0.75  # B so that N* = D* / 30 at any budget, with beta = alpha
B = A * 30**ALPHA


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isoflop_report, "DRAWS", 40)


def planted(
    family: str = "dense", seeds: int = 2, noise: float = 0.0, gain: float = 1.0
) -> list[Row]:
    """Rows of the real plan with losses of a law; `gain` multiplies the parameters in the law."""
    rng = np.random.default_rng(0)
    grid = GRIDS["full"]["dense"]
    ladder = Ladder(
        family, BUDGETS, grid.widths, width_multiple=4, max_tokens_per_parameter=grid.most
    )
    rows = []
    for seed in range(seeds):
        for rung in plan(ladder, 257):
            for tokens in rung.tokens:
                n = rung.flops_per_token / 6
                loss = E + A / (gain * n) ** ALPHA + B / tokens**ALPHA
                loss *= np.exp(noise * rng.standard_normal())
                rows.append(
                    Row(
                        run=f"{rung.name}-{seed}",
                        family=family,
                        N=rung.size.total,
                        N_non_embedding=rung.size.non_embedding,
                        N_active=rung.size.active,
                        flops_per_token=rung.flops_per_token,
                        D=tokens,
                        C=tokens * rung.flops_per_token,
                        loss=float(loss),
                        loss_raw=float(loss),
                        bits_per_byte=float(loss / np.log(2)),
                        learning_rate=rung.learning_rate,
                        batch_tokens=rung.batch_tokens,
                        seed=seed,
                        width=rung.model.d_model,
                        layers=rung.model.n_layers,
                    )
                )
    return rows


def report(
    tmp_path: Path, rows: list[Row], families: tuple[str, ...] = ("dense",)
) -> tuple[str, str]:
    """The text of report.md, and what was printed."""
    tuned = {f: {0.01: [r for r in rows if r.family == f][:1]} for f in families}
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    write_report(
        tmp_path, Trained(rows, dict.fromkeys(families, BUDGETS), tuned, "planted", "x"), console
    )
    return (tmp_path / "report.md").read_text(), shown.getvalue()


def test_planted_law_comes_back(tmp_path: Path) -> None:
    rows = planted(noise=0.002)
    table = as_table(rows)
    for method, error in (("parabola", 0.03), ("akima", 0.05)):
        found = curves(table, BUDGETS, 0.002, method)  # type: ignore[arg-type]
        assert all(m.interior for m in found.found.minima)
        assert found.found.growth("N").exponent == pytest.approx(0.5, abs=error)
        assert found.found.growth("D").exponent == pytest.approx(0.5, abs=error)
        assert found.exponents is not None
        low, high = found.exponents.interval("N")
        assert low < 0.5 < high
        for m in found.found.minima:
            # 6 N D = C and D = 30 N.
            assert pytest.approx((m.C / 180) ** 0.5, rel=0.2) == m.N
    law = fitted(table, 0.002)
    assert isinstance(law, Study)
    assert pytest.approx(E, abs=0.05) == law.law.E
    assert law.law.alpha == pytest.approx(ALPHA, abs=0.1)
    assert law.rows.dropped  # the early transient

    text, printed = report(tmp_path, rows)
    assert "L* falls with every budget" in text
    assert "NOT fall" not in text
    assert text.count("| interior |") == 10
    assert re.search(r"Noise between seeds: 0\.\d+ % of the loss", text)
    (predicted,) = re.findall(r"law fitted to the smaller budgets \| [\d,]+ \| (\S+) ", text)
    at = (8e11 / 180) ** 0.5
    assert float(predicted) == pytest.approx(E + A / at**ALPHA + B / (30 * at) ** ALPHA, rel=0.01)
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert "How this was fitted" in text
    assert "Best size at each budget: dense" in printed


def test_edges_and_rising_losses_are_said(tmp_path: Path) -> None:
    rows = [r for r in planted(seeds=1) if r.width <= 20]
    rows = [replace(r, loss=r.loss + 1) if r.C > 6e11 else r for r in rows]
    text, _ = report(tmp_path, rows)
    assert "lowest at the largest size: widen the sizes" in text
    assert "L* does NOT fall with every budget" in text
    assert "The noise between seeds was not measured" in text


def test_a_better_family_is_placed_on_the_scale_of_the_first(tmp_path: Path) -> None:
    """The second family is the first with parameters worth twice as many."""
    rows = planted(noise=0.001) + planted("moe", noise=0.001, gain=2.0)
    text, _ = report(tmp_path, rows, ("dense", "moe"))
    comparison = text.split("## Families compared")[1]
    assert "Families: dense, moe; amounts refer to the first" in comparison
    best = next(line for line in comparison.splitlines() if "| 0.0 |" in line)
    assert best.startswith("| A |")
    (amount,) = re.findall(r"\| A: 1, ([\d.]+) \(", best)
    assert float(amount) == pytest.approx(2.0, rel=0.05)
    # And the moe's best run of every budget needs half the compute.
    gains = re.findall(r"^\| moe .*\) \| ([\d.]+) \(.*\) \| .* \| .* \|$", comparison, re.M)
    assert len(gains) == 5
    assert all(1.8 < float(gain) < 2.2 for gain in gains)


def test_the_best_learning_rate_has_the_lowest_mean() -> None:
    row = planted(seeds=1)[0]

    def pair(a: float, b: float) -> list[Row]:
        return [replace(row, loss=a), replace(row, loss=b)]

    assert best_rate({0.1: pair(2.0, 3.0), 0.2: pair(2.2, 2.7), 0.4: pair(1.9, 3.2)}) == 0.2


def test_grids_have_what_the_question_needs() -> None:
    assert set(GRIDS["full"]) == set(FAMILIES)
    for family, grid in GRIDS["full"].items():
        assert len([b for b in grid.budgets if 1e10 <= b <= 1e12]) >= 4
        ladder = Ladder(family, grid.budgets, grid.widths, width_multiple=4)
        rungs = plan(replace(ladder, max_tokens_per_parameter=grid.most), 257)
        for budget in grid.budgets:
            assert sum(budget in rung.budgets for rung in rungs) >= 5
        assert rungs[-1].size.active > 9 * rungs[0].size.active  # about a decade


@pytest.mark.slow
def test_study_trains_reports_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Grid((1e8, 2e8), (8, 12, 16), 1, (8,), most=1e6, rates=(0.01, 0.02))
    monkeypatch.setitem(isoflop_cpu.GRIDS, "ci", {"dense": tiny})
    text = tmp_path / "text.jsonl"
    lines = [f'{{"text": "{i} {"spam eggs " * (5 + i)}"}}' for i in range(40)]
    text.write_text("\n".join(lines))
    args = [
        *("--preset", "ci", "--seeds", "2", "--out", str(tmp_path / "out")),
        *("--ladder.data.source", str(text), "--ladder.data.cache-dir", str(tmp_path / "cache")),
        *("--ladder.batch-tokens", "256", "--ladder.seq-len", "16", "--ladder.min-tokens", "256"),
        *("--ladder.min-tokens-per-parameter", "0", "--ladder.eval-tokens", "500"),
        "--ladder.loop.quiet",
    ]
    assert cli.run(isoflop_cpu.main, IsoFLOPStudy, args=args) == 0
    with (tmp_path / "out" / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9  # three sizes at two budgets, and the smaller budget once more
    assert [(r["seed"], r["width"]) for r in rows[6:]] == [("1", "8"), ("1", "12"), ("1", "16")]
    for r in rows:
        assert float(r["loss"]) < 5.5
        assert min(abs(float(r["C"]) / b - 1) for b in tiny.budgets) < 0.2
    written = (tmp_path / "out" / "report.md").read_text()
    for heading in ("Learning rate", "Losses: dense", "Best size at each budget: dense"):
        assert f"## {heading}" in written
    assert "There are 2 budgets: it takes three." in written
    assert "None was fitted" in written
    assert "base learning rate 0.0" in capsys.readouterr().out

    def refuse(*args: object, **arguments: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(experiment, "train", refuse)
    assert cli.run(isoflop_cpu.main, IsoFLOPStudy, args=args) == 0
    assert (tmp_path / "out" / "report.md").read_text() == written


def test_unknown_family_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(isoflop_cpu.main, IsoFLOPStudy, args=["--families", "rnn"]) == 2
    assert capsys.readouterr().err.startswith("error: families='rnn' is unknown: choose dense")
    assert Ladder(budgets=(1.0,)).min_tokens < isoflop_report.MIN_TOKENS
