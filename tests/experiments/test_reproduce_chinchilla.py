import json

import numpy as np
import pytest
from reproduce_chinchilla import BUDGETS, ReproduceChinchilla, envelope, main, parabolas

from slm_jax.errors import UserError
from slm_jax.scaling.laws import Chinchilla
from slm_jax.scaling.optimum import compute_optimal
from slm_jax.scaling.rows import Rows

LAW = Chinchilla(E=1.8, A=400.0, B=400.0, alpha=0.3, beta=0.3)


def grid(factors):
    points = [
        (c, compute_optimal(LAW, c).N * f) for c in np.geomspace(6e18, 3e21, 30) for f in factors
    ]
    c, n = np.array(points).T
    d = c / (6 * n)
    return Rows({"N": n, "D": d, "C": c, "loss": LAW(N=n, D=d)})


def test_envelope_finds_the_optimal_sizes():
    n, d, points = envelope(grid([0.3, 1.0, 3.0]))
    assert points.shape == (2, 30)
    assert n.exponent == pytest.approx(0.5, abs=1e-9)
    assert d.exponent == pytest.approx(0.5, abs=1e-9)
    assert n(1e20) == pytest.approx(compute_optimal(LAW, 1e20).N, rel=1e-9)


def test_parabolas_find_the_optimal_sizes():
    n = np.concatenate([compute_optimal(LAW, b).N * np.geomspace(0.25, 4, 9) for b in BUDGETS])
    c = np.repeat(BUDGETS, 9)
    d = c / (6 * n)
    found, tokens, points = parabolas(Rows({"N": n, "D": d, "C": c, "loss": LAW(N=n, D=d)}))
    assert points.shape == (2, len(BUDGETS))
    assert found.exponent == pytest.approx(0.5, abs=1e-6)
    assert tokens.exponent == pytest.approx(0.5, abs=1e-6)


def test_report_has_three_approaches_and_the_papers_deviation(tmp_path, capsys):
    main(ReproduceChinchilla(draws=25, out=tmp_path))
    lines = [json.loads(x) for x in (tmp_path / "report.jsonl").read_text().splitlines()]
    by = {(x["law"], x["quantity"]): x for x in lines}
    assert by["Approach 1", "a"]["verdict"] == "reproduced"
    assert 0.5 < by["Approach 2", "a"]["ours"] < 0.6
    ours = by["Approach 3, Hoffmann", "a"]
    assert ours["ours"] == pytest.approx(0.5139, abs=5e-4)
    assert ours["published"] == pytest.approx(0.4565, abs=5e-4)
    assert ours["verdict"].startswith("differs")
    objectives = [x for x in lines if x["law"] == "Approach 3, objective"]
    assert len(objectives) == 3
    assert all(x["verdict"] == "reproduced" for x in objectives)
    text = (tmp_path / "report.md").read_text()
    assert "How this was fitted" in text
    assert "among the 5 highest losses" in text
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert "Chi-squared" in capsys.readouterr().out


def test_too_few_draws_are_refused():
    with pytest.raises(UserError, match="draws=3"):
        ReproduceChinchilla(draws=3)
