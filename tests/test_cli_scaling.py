"""`slm scaling` on tables of a user's own: right answers, and clear words for bad tables."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from slm_jax.cli import main
from slm_jax.scaling.fit import Fit
from slm_jax.scaling.rows import Rows
from tests.scaling.tables import BUDGETS, LAW, csv_text, isoflop_table

NAMES = {"N": "params", "D": "tokens", "loss": "val_loss"}
COLUMNS = ["--columns", *(f"{ours}={theirs}" for ours, theirs in NAMES.items())]
QUICK = ["--draws", "20"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A table with names of its own and without FLOPs."""
    rows = isoflop_table()
    columns = {k: v for k, v in rows.columns.items() if k != "C"}
    path = tmp_path / "own.csv"
    path.write_text(csv_text(Rows(columns, rows.labels), NAMES))
    return path


def scaling(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What the command prints."""
    capsys.readouterr()
    assert main(["scaling", *args]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line with which the command refuses."""
    capsys.readouterr()
    assert main(["scaling", *args]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_one_command_fits_a_table_of_ones_own(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fits" / "fit.json"
    text = scaling(capsys, "fit", str(own), *COLUMNS, *QUICK, "--out", str(out))
    assert "How this was fitted: Chinchilla" in text
    assert "90 % intervals: weighted bootstrap of 20 draws" in text
    found = Fit.from_json(out.read_text()).law
    assert found(N=1e8, D=2e9) == pytest.approx(LAW(N=1e8, D=2e9), rel=0.01)
    assert json.loads(out.read_text())["law"] == "Chinchilla"


def test_predictions_of_a_model_a_budget_and_a_loss(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = scaling(
        capsys, "predict", str(own), *COLUMNS, *QUICK, "--model", "1e8", "2e9", "--next-runs", "3"
    )
    value = re.search(r"loss of N=1e\+08, D=2e\+09\s+([\d.]+)", text)
    assert value
    assert float(value[1]) == pytest.approx(LAW(N=1e8, D=2e9), rel=0.01)
    assert "would narrow the interval most" in text
    assert "N*" in scaling(capsys, "predict", str(own), *COLUMNS, *QUICK, "--budget", "1e19")
    served = scaling(
        capsys, "predict", str(own), *COLUMNS, *QUICK,
        "--loss", "1.38", "--inference-tokens", "1e12",
    )  # fmt: skip
    assert "N to serve" in served


def test_held_out_budgets_are_predicted_first(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = scaling(
        capsys, "predict", str(own), *COLUMNS, *QUICK, "--hold-out", f"{BUDGETS[-2] * 1.1:g}"
    )
    assert "were not seen" in text
    assert "Root mean square error" in text


def test_families_are_compared_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    better = LAW.of(LAW.values | {"E": 1.1})
    parts = [isoflop_table(), isoflop_table(better, seed=1, family="scan")]
    path = tmp_path / "both.csv"
    path.write_text(csv_text(parts[0]) + csv_text(parts[1]).partition("\n")[2])
    text = scaling(capsys, "compare", str(path), *QUICK, "--reference", "dense")
    table = text[text.index("AICc") :]
    assert re.search(r"\n\s*(E\w*)\s", table), table
    assert "Effective size against dense" in text
    out = tmp_path / "report"
    text = scaling(capsys, "report", str(path), *QUICK, "--out", str(out), "--noise", "0.004")
    assert (out / "report.png").stat().st_size > 20_000
    for family in ("dense", "scan"):
        assert f"IsoFLOP curves: {family}" in (out / "report.md").read_text()


def test_a_plan_is_printed_and_nothing_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ladder"
    text = scaling(capsys, "plan", "--budgets", "1e10", "2e10", "4e10", "--out", str(out))
    assert "dense-d16-seed0" in text
    assert not out.exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dense,a,1e6,1e9,nan", "val_loss=nan"),
        ("dense,a,1e6,1e9,-2.0", "val_loss=-2.0"),
        ("dense,a,1e6,1e9,", "val_loss=''"),
        ("dense,a,0,1e9,2.0", "params=0"),
    ],
)
def test_a_bad_value_is_named_with_its_line(
    own: Path, line: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    head = "family,run,params,tokens,val_loss"
    own.write_text(f"{head}\ndense,a,1e6,1e9,3.0\n{line}\n")
    message = refused(capsys, "fit", str(own), *COLUMNS)
    assert f"own.csv:3: {expected}" in message


def test_bad_tables_are_refused(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "column='loss'" in refused(capsys, "fit", str(own))
    assert "columns='N'" in refused(capsys, "fit", str(own), "--columns", "N")
    assert "column='size'" in refused(capsys, "fit", str(own), *COLUMNS, "X=size")
    assert "law='Newton' is unknown" in refused(
        capsys, "fit", str(own), *COLUMNS, "--law", "Newton"
    )
    assert "path=" in refused(capsys, "fit", "missing.csv")
    assert "none of" in refused(capsys, "fit", str(own), *COLUMNS, "--min-tokens", "1e30")
    assert "predict=nothing" in refused(capsys, "predict", str(own), *COLUMNS)
    assert "unreachable" in refused(capsys, "predict", str(own), *COLUMNS, "--loss", "0.5")
    assert "command='guess'" in refused(capsys, "guess")
    n = np.geomspace(1e6, 1e8, 9)
    ray = Rows({"N": n, "D": 20 * n, "C": 120 * n * n, "loss": LAW(N=n, D=20 * n)})
    own.write_text(csv_text(ray))
    assert "one ray" in refused(capsys, "fit", str(own))


def test_a_budget_with_two_sizes_is_named(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = isoflop_table()
    few = rows.take((rows["C"] < 1.5e18) | (np.arange(len(rows)) % 9 < 2))
    last = few.take((few["C"] < 1.5e18) | (np.cumsum(few["C"] > 1.5e18) <= 2))
    own.write_text(csv_text(last))
    assert "2 sizes: a curve needs 3" in scaling(capsys, "fit", str(own), *QUICK)
