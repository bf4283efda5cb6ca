"""The nest of hypotheses finds the letters that were planted."""

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.scaling.compare import compare_families, grouped
from slm_jax.scaling.laws import Chinchilla
from slm_jax.scaling.rows import Rows

BASE = {"E": 1.8, "A": 400.0, "B": 2000.0}
FORMS = ("", "E", "A", "B", "EB")


def table(letter: str, factor: float, noise: float = 0.003) -> Rows:
    """Two families on isoFLOP grids; one letter of the second is `factor` times as large."""
    rng = np.random.default_rng(0)
    parts = []
    for name, scale in (("web", 1.0), ("books", factor)):
        law = Chinchilla(**(BASE | {letter: BASE[letter] * scale}), alpha=0.34, beta=0.37)
        for budget in (1e18, 1e19, 1e20):
            n = np.geomspace(3e7, 3e9, 7)
            d = budget / (6 * n)
            loss = law(N=n, D=d) * np.exp(noise * rng.standard_normal(7))
            parts.append(
                Rows({"N": n, "D": d, "C": 6 * n * d, "loss": loss}, {"family": np.full(7, name)})
            )
    return Rows(
        {k: np.concatenate([p[k] for p in parts]) for k in parts[0].columns},
        {"family": np.concatenate([p["family"] for p in parts])},
    )


@pytest.mark.parametrize(
    ("letter", "factor", "expected"),
    [
        ("E", 1.1, 0.18),
        ("A", 2.0**-0.34, 2.0),  # parameters worth twice as many
        ("B", 3.0**-0.37, 3.0),  # tokens worth three times as many: Q
    ],
)
def test_the_planted_letter_wins_and_comes_back(
    letter: str, factor: float, expected: float
) -> None:
    found = compare_families(table(letter, factor), reference="web", forms=FORMS)
    assert found.families == ("web", "books")
    assert letter in found.best.separate
    assert found.of(letter).aicc < min(
        f.aicc for f in found.fits if letter not in f.separate and f.separate
    )
    values = found.of(letter).multipliers()
    assert list(values) == [letter]
    assert values[letter][0] in (0.0, 1.0)
    assert values[letter][1] == pytest.approx(expected, rel=0.1)
    low, high = found.intervals(letter, draws=25)[letter][1]
    assert low <= values[letter][1] <= high
    assert not low <= values[letter][0] <= high  # no difference is excluded
    # It also predicts budgets it has not seen.
    assert found.of(letter).held_out < 0.5 * found.of("").held_out


def test_without_noise_the_law_is_exact() -> None:
    found = compare_families(table("B", 0.5, noise=0.0), reference="web", forms=("B",)).best.law
    for j, b in enumerate((2000.0, 1000.0)):
        law = found.of_group(j)
        assert law.values == pytest.approx(BASE | {"alpha": 0.34, "beta": 0.37, "B": b}, rel=1e-6)


def test_bad_input_is_refused() -> None:
    rows = table("E", 1.1)
    with pytest.raises(UserError, match="two families"):
        compare_families(rows.take(rows["family"] == "web"))
    with pytest.raises(UserError, match="reference='bible'"):
        grouped(rows, "family", "bible")
    with pytest.raises(UserError, match="'corpus' is not in the table"):
        compare_families(rows, by="corpus")
    with pytest.raises(UserError, match=r"rows=8.*needs"):
        compare_families(rows.take(np.r_[0:4, 21:25]), forms=("EAB",))
