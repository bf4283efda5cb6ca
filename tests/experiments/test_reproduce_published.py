import json
from dataclasses import replace

import numpy as np
import published_fits
import published_predictions
import pytest
from reproduce_published import ReproducePublished, main
from reproduction_table import Check, markdown, plot, show, summary, write_jsonl

from slm_jax.errors import UserError
from slm_jax.scaling.laws import Chinchilla, Routing

CHECK = Check("law", "x", published=1.0, ours=1.05, tolerance=0.1, source="paper")


@pytest.mark.parametrize(
    ("check", "reproduced"),
    [
        (CHECK, True),
        (replace(CHECK, ours=1.11), False),
        (replace(CHECK, ours=0.89), False),
        (replace(CHECK, ours=-5.0, at_most=True), True),
        (replace(CHECK, ours=1.11, at_most=True), False),
        (replace(CHECK, tolerance=None, interval=(0.9, 1.1)), True),
        (replace(CHECK, tolerance=None, interval=(1.01, 1.1)), False),
        (replace(CHECK, ours=float("nan")), False),
    ],
)
def test_verdict_follows_from_the_numbers(check, reproduced):
    assert check.reproduced is reproduced
    assert (check.verdict == "reproduced") is reproduced
    assert replace(check, why="few points").verdict in ("reproduced", "differs: few points")


def test_table_says_what_it_holds(tmp_path):
    checks = [CHECK, replace(CHECK, quantity="y", ours=2.0, why="few points")]
    text = markdown(checks)
    assert "| law | x | 1 | 1.05 | ±0.1 | - | reproduced | paper |" in text
    assert "differs: few points" in text
    assert summary(checks) == "1 of 2 numbers reproduced, 1 differ"
    assert show(-3e-13) == "0"
    write_jsonl(tmp_path / "a.jsonl", checks)
    lines = [json.loads(x) for x in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [x["verdict"] for x in lines] == ["reproduced", "differs: few points"]
    plot(tmp_path / "a.png", checks, "title")
    assert (tmp_path / "a.png").stat().st_size > 1000


def verdicts(checks):
    return {(c.law, c.quantity): c.reproduced for c in checks}


def test_besiroglu_is_reproduced():
    checks = published_fits.besiroglu(draws=20)
    assert len(checks) == 10
    assert all(c.reproduced for c in checks), [c.cells for c in checks if not c.reproduced]


def test_data_constrained_formula_is_reproduced_and_its_constants_are_not_determined():
    checks = {c.quantity: c for c in published_fits.data_constrained(draws=30)}
    formula = [c for q, c in checks.items() if q.startswith("L(")]
    assert len(formula) == 2
    assert all(c.tolerance == 1e-12 and c.reproduced for c in formula)
    bounds = [c for c in checks.values() if c.at_most]
    assert len(bounds) == 2
    assert all(c.reproduced for c in bounds)
    assert bounds[0].ours < bounds[1].ours  # two minima, both below the published constants'
    low, high = checks["R_D"].interval
    assert high > 3 * low
    assert not checks["R_D"].reproduced


def test_gadre_is_reproduced_on_all_corpora():
    checks = published_fits.gadre()
    law = [c for c in checks if "error" not in c.quantity]
    assert len(law) == 12
    assert all(c.reproduced for c in law)
    assert all(c.why for c in checks if not c.reproduced)


def test_clark_agrees_with_the_whole_file_and_says_where_it_does_not():
    checks = published_fits.clark(draws=20, whole=None)
    assert len(checks) == 18
    assert all(c.why for c in checks if not c.reproduced)
    near = [c for c in checks if "whole file's fit" in c.quantity]
    assert len(near) == 3
    assert all(c.reproduced for c in near)


@pytest.mark.parametrize(("power", "agrees"), [(1.0, True), (1.1, False)])
def test_clark_reads_a_whole_file(tmp_path, power, agrees):
    path = tmp_path / "curves.csv"
    lines = [
        "hyper_id,step,routing_frequency,k,seed,router_type,dense_parameter_count,num_experts,"
        "loss_validation"
    ]
    for router, law in published_fits.CLARK_WHOLE.items():
        for n in (1.6e7, 5.5e7, 1.3e8, 3.7e8, 1.3e9):
            for e in (1, 2, 8, 32, 128, 512):
                loss = float(law(N=n, experts=e)) ** power
                lines.append(f"{len(lines)},249000,0.5,1,42,{router},{n},{e},{loss}")
    path.write_text("\n".join(lines) + "\n")
    checks = published_fits.clark(draws=20, whole=path)
    coefficients = [c for c in checks if "of the whole file" in c.quantity]
    assert len(coefficients) == 12
    assert all(c.tolerance == 2e-3 for c in coefficients)
    assert all(c.reproduced for c in coefficients) is agrees


def test_closed_forms_are_reproduced():
    checks = [
        *published_predictions.kaplan_to_chinchilla(),
        *published_predictions.sardana(),
        *published_predictions.isoflop_bias(),
    ]
    assert len(checks) == 26
    assert all(c.reproduced for c in checks), [c.cells for c in checks if not c.reproduced]


def test_kaplan_exponent_tends_to_chinchillas_where_embeddings_vanish(monkeypatch):
    law = Chinchilla.from_published("hoffmann")
    monkeypatch.setattr(published_predictions, "_EMBEDDING", 0.0)
    expected = law.beta / (law.alpha + law.beta)
    assert published_predictions.kaplan_exponent(law) == pytest.approx(expected, abs=1e-6)


def test_moving_average_is_the_mean_of_the_last():
    values = np.array([1.0, 2.0, 6.0, 4.0])
    np.testing.assert_allclose(
        published_predictions.moving_average(values, 2), [1.0, 1.5, 4.0, 5.0]
    )


def test_olmo_ladder_predicts_as_published(monkeypatch):
    tasks = {k: published_predictions.OLMO_TASKS[k] for k in ("hellaswag", "arc_easy")}
    monkeypatch.setattr(published_predictions, "OLMO_TASKS", tasks)
    checks = published_predictions.olmo_ladder(draws=20)
    assert len(checks) == 5
    assert all(c.reproduced for c in checks), [c.cells for c in checks if not c.reproduced]
    accuracy = next(c for c in checks if "arc_easy accuracy" in c.quantity)
    assert accuracy.interval[0] < accuracy.ours < accuracy.interval[1]


def test_multi_power_law_transfers_its_decay_between_sizes():
    checks = published_predictions.multi_power(["25"])
    assert len(checks) == 8
    transferred = [c for c in checks if "as for" in c.quantity]
    assert len(transferred) == 5
    assert all(c.reproduced for c in transferred), [c.cells for c in transferred]
    assert all(c.why for c in checks if not c.reproduced)


def test_too_few_draws_and_an_absent_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="draws=5"):
        ReproducePublished(draws=5)
    with pytest.raises(UserError, match="routing_data="):
        ReproducePublished(routing_data=tmp_path / "absent")


@pytest.mark.slow
def test_reproduce_writes_one_table(tmp_path, capsys):
    main(ReproducePublished(draws=20, out=tmp_path))
    lines = [json.loads(x) for x in (tmp_path / "report.jsonl").read_text().splitlines()]
    laws = {x["law"].split(",")[0] for x in lines}
    assert laws >= {
        "Besiroglu 2024",
        "Variable projection",
        "Muennighoff 2023",
        "Gadre 2024",
        "Clark 2022",
        "Kaplan from Chinchilla",
        "Sardana 2024",
        "IsoFLOP parabola",
        "OLMo ladder to 13 B",
        "Multi-power law",
    }
    assert all(np.isfinite([x["published"], x["ours"]]).all() for x in lines)
    assert not any("not understood" in x["verdict"] for x in lines)
    assert (tmp_path / "report.md").read_text().count("\n| ") == len(lines) + 2
    assert (tmp_path / "report.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "numbers reproduced" in shown
    assert all(law.split()[0] in shown for law in laws)
    assert shown.count("reproduced") > len(lines) / 2


def test_published_routing_constants_have_a_source():
    for name in ("s-base", "rl-r", "hash"):
        assert "2202.01169" in Routing.published[name].source
