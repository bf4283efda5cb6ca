import re
from dataclasses import replace
from pathlib import Path

import data_quality_law as quality
import numpy as np
import pytest
from rich.console import Console

from slm_jax.data import DataConfig
from slm_jax.errors import UserError
from slm_jax.train.ladder import Row, run_ladder

SMALL = quality.DataQuality(
    draws=10,
    ladder=replace(
        quality.DataQuality().ladder,
        data=DataConfig(),
        budgets=(2e9, 4e9),
        widths=(8, 16),
        batch_tokens=512,
        seq_len=32,
        min_tokens=1e4,
        eval_tokens=2048,
    ),
)


def test_levels_differ_in_training_text_only(tmp_path: Path) -> None:
    found = quality.levels(SMALL)
    assert list(found) == ["noise 0", "noise 0.1", "noise 0.3"]
    assert len({c.fingerprint for c in found.values()}) == 3
    assert all(c.valid is found["noise 0"].valid for c in found.values())
    other = tmp_path / "other.txt"
    other.write_text("How now, brown cow? " * 2000)
    named = quality.levels(replace(SMALL, corpora=("plays=tinyshakespeare", f"cows={other}")))
    assert list(named) == ["plays", "cows"]
    assert named["plays"].valid == named["cows"].valid
    assert len(named["plays"].valid) == 2
    assert named["plays"].train != named["cows"].train


def test_bad_levels_are_refused() -> None:
    for change in (
        {"noise": (0.1,)},
        {"noise": (0.1, 0.1)},
        {"corpora": ("a=x",)},
        {"corpora": ("x", "y")},
    ):
        with pytest.raises(UserError, match=next(iter(change))):
            replace(SMALL, **change)


def planted(level: float) -> list[Row]:
    """Runs whose asymptote is higher by `level`."""
    rng = np.random.default_rng(int(100 * level))
    rows = []
    for n in (6e3, 1e4, 2e4, 4e4, 8e4, 1.6e5):
        for c in (5e10, 1e11, 2e11, 4e11):
            d = round(c / (6 * n))
            loss = 1.2 + level + 300 * n**-0.7 + 3e3 * d**-0.7 + 0.002 * rng.standard_normal()
            row = Row(
                run=f"n{n:g}", family="dense", N=int(n), N_non_embedding=0, N_active=int(n),
                flops_per_token=6 * n, D=d, C=6 * n * d, loss=loss, loss_raw=loss,
                bits_per_byte=loss, learning_rate=0.03, batch_tokens=2048, seed=0, width=8,
                layers=2,
            )  # fmt: skip
            rows.append(row)
    return rows


def test_the_report_names_the_letter_that_was_planted(tmp_path: Path) -> None:
    found = {f"noise {level:g}": planted(level) for level in (0.0, 0.1, 0.3)}
    quality.write_report(replace(SMALL, out=tmp_path), found, Console(quiet=True))
    text = (tmp_path / "report.md").read_text()
    assert "Best single letter: E" in text
    amounts = re.search(r"E: 0, ([\d.]+) \(.*?\), ([\d.]+) \(", text)
    assert amounts
    assert [float(x) for x in amounts.groups()] == pytest.approx([0.1, 0.3], abs=0.02)
    assert "left out: D < 300000 tokens" in text
    assert (tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_level_is_trained_once(tmp_path: Path) -> None:
    ladder = replace(SMALL.ladder, out=tmp_path / "noise-0.3")
    corpus = quality.levels(SMALL)["noise 0.3"]
    rows = run_ladder(ladder, corpus, lambda line: None)
    table = quality.as_table({"noise 0.3": rows})
    assert len(table) == 4
    assert np.allclose(6 * table["N"] * table["D"], table["C"])
    assert run_ladder(ladder, corpus, lambda line: None) == rows
