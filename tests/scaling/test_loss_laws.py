"""The laws of the loss of dense models: formulas, published values, planted recovery."""

import math

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.scaling import LAWS, Rows, fit
from slm_jax.scaling.laws import (
    Chinchilla,
    ChinchillaTied,
    DataConstrained,
    Envelope,
    Gadre,
    KaplanC,
    KaplanD,
    KaplanJoint,
    KaplanN,
    Law,
)
from slm_jax.scaling.laws.data_constrained import effective
from slm_jax.scaling.laws.kaplan import PF_DAY

POINT = {
    Chinchilla: Chinchilla.from_published("besiroglu"),
    ChinchillaTied: ChinchillaTied.from_published("c4"),
    DataConstrained: DataConstrained.from_published("c4"),
    Envelope: Envelope(E=1.7, A=300.0, alpha=0.15),
    Gadre: Gadre.from_published("c4"),
    KaplanC: KaplanC.from_published("kaplan"),
    KaplanD: KaplanD.from_published("kaplan"),
    KaplanJoint: KaplanJoint.from_published("kaplan"),
    KaplanN: KaplanN.from_published("kaplan"),
}


def table(law, points=6):
    """Runs without noise; of each size with unique tokens used once, some and many times."""
    n, d, u = np.meshgrid(
        np.geomspace(1e7, 1e10, points), np.geomspace(1e8, 1e12, points), np.geomspace(1, 60, 4)
    )
    n, d, u = n.ravel(), d.ravel(), (d / u).ravel()
    rows = Rows({"N": n, "D": d, "C": 6 * n * d, "U": u})
    return rows.with_columns(loss=law.predict({name: rows[name] for name in law.inputs}))


@pytest.mark.parametrize("law", POINT.values(), ids=lambda law: type(law).__name__)
def test_planted_parameters_are_found_from_rows_without_noise(law):
    fixed = {}
    if isinstance(law, DataConstrained):  # as its authors: the rest comes from unrepeated runs
        fixed = {k: v for k, v in law.values.items() if not k.startswith("R_")}
    methods = ["vpnls", "lse"] if law.linear else ["lse"]
    for method in methods:
        found = fit(type(law), table(law), method=method, fixed=fixed)
        assert found.law.values == pytest.approx(law.values, rel=1e-6)


def test_all_seven_parameters_of_the_data_constrained_law_can_be_found():
    law = DataConstrained(E=1.9, A=520.0, B=1490.0, alpha=0.33, beta=0.37, R_D=15.4, R_N=5.3)
    found = fit(
        DataConstrained,
        table(law),
        start={
            "E": (1.5,),
            "A": (1e3,),
            "B": (1e3,),
            "alpha": (0.3,),
            "beta": (0.4,),
            "R_D": (5.0, 30.0),
            "R_N": (2.0, 10.0),
        },
    )
    assert found.law.values == pytest.approx(law.values, rel=1e-6)


@pytest.mark.parametrize("law", POINT.values(), ids=lambda law: type(law).__name__)
def test_the_jacobian_is_that_of_the_formula(law):
    rows = table(law, 3)
    columns = {name: rows[name] for name in law.inputs}
    names = law.names()
    jacobian = law.jacobian(columns, names)
    assert jacobian.shape == (len(rows), len(names))
    for i, name in enumerate(names):
        step = 1e-5 * law.values[name]
        up, down = (
            law.of({**law.values, name: law.values[name] + sign * step}).predict(columns)
            for sign in (1, -1)
        )
        scale = np.abs(jacobian[:, i]).max()
        assert jacobian[:, i] == pytest.approx((up - down) / (2 * step), abs=1e-6 * scale)


@pytest.mark.parametrize("law", [law for law in POINT.values() if law.linear], ids=str)
def test_closed_slopes_are_the_complex_steps(law):
    rows = table(law, 3)
    columns = {name: rows[name] for name in law.inputs}
    ours, default = law.slopes(columns), Law.slopes(law, columns)
    assert set(ours) == set(law.nonlinear())
    for name, terms in ours.items():
        for term, other in zip(terms, default[name], strict=True):
            assert np.broadcast_to(term, other.shape) == pytest.approx(other, rel=1e-12)


def test_a_formula_that_drops_the_imaginary_part_is_an_error_not_a_zero():
    class Forced(KaplanN):
        def __call__(self, **columns):
            return np.asarray(super().__call__(**columns)).astype(np.float64)

    law = Forced.from_published("kaplan")
    with pytest.raises(np.exceptions.ComplexWarning):
        law.jacobian({"N": np.array([1e6, 1e7])}, ("alpha",))


def test_every_law_says_what_it_is():
    for name, law in LAWS.items():
        assert law.__name__ == name
        assert law.formula
        assert law.source
        assert set(law.linear) <= set(law.names())
        assert set(law.positive_names()) <= set(law.names())
        assert set(law.nonlinear()) <= set(law.start)
        assert set(law.units) <= {*law.inputs, *law.names(), law.target}
        for published in law.published:
            assert law.published[published].source
            assert set(law.from_published(published).values) == set(law.names())
        assert law.__doc__


def test_unknown_published_constants_are_refused():
    with pytest.raises(UserError, match=r"published='nobody' .* hoffmann"):
        Chinchilla.from_published("nobody")


@pytest.mark.parametrize(
    ("name", "loss"), [("hoffmann_rounded", 1.9366), ("hoffmann", 1.9208), ("besiroglu", 1.9739)]
)
def test_chinchilla_itself(name, loss):
    assert Chinchilla.from_published(name)(N=70e9, D=1.4e12) == pytest.approx(loss, abs=1e-4)


def test_kaplan_of_a_billion_parameters_and_a_petaflop_day():
    assert KaplanN.from_published("kaplan")(N=8.8e13) == 1.0
    assert KaplanD.from_published("kaplan")(D=5.4e3) == pytest.approx(10**0.95)
    assert KaplanC.from_published("kaplan")(C=PF_DAY) == pytest.approx(3.1e8**0.05)
    joint = KaplanJoint.from_published("kaplan")
    # Plenty of one: the power law of the other.
    assert joint(N=1e9, D=1e30) == pytest.approx((6.4e13 / 1e9) ** 0.076)
    assert joint(N=1e40, D=1e9) == pytest.approx((1.8e13 / 1e9) ** 0.103)


@pytest.mark.parametrize(
    ("corpus", "a", "b", "power", "e"),
    [
        ("c4", 113.693, 189.516, -0.242472, 1.508261),
        ("redpajama", 166.211, 366.687, -0.272851, 1.836648),
        ("refinedweb", 125.096, 246.207, -0.254395, 1.734462),
    ],
)
def test_gadre_is_the_formula_that_its_authors_code_fits(corpus, a, b, power, e):
    law = Gadre.from_published(corpus)
    n, m = 1.4e9, 640 * 20.0
    want = a * n**power + b * 6 ** (power / 2) * (m * n) ** power + e
    assert law(C=6 * n * n * m, M=m) == pytest.approx(want, rel=1e-12)


def test_tied_chinchilla_is_chinchilla_with_one_exponent():
    tied = ChinchillaTied(E=1.8, A=400.0, B=900.0, alpha=0.33)
    free = Chinchilla(E=1.8, A=400.0, B=900.0, alpha=0.33, beta=0.33)
    assert tied(N=1e9, D=1e10) == free(N=1e9, D=1e10)


@pytest.mark.parametrize(
    ("n", "d", "loss"), [(6.34e9, 242e9, 2.2256440889984477), (8.67e9, 178e9, 2.2269634075087867)]
)
def test_data_constrained_vectors(n, d, loss):
    law = DataConstrained.from_published("c4")
    assert law(N=n, D=d, U=25e9) == pytest.approx(loss, abs=1e-12)


def test_repeated_tokens_are_worth_less_and_less():
    assert effective(1.0, 3.0, 15.387756) == pytest.approx(3.73, abs=5e-3)
    assert effective(1.0, 39.0, 15.387756) == pytest.approx(15.17, abs=5e-3)
    assert effective(1.0, 1e9, 15.387756) == pytest.approx(16.387756)


def test_tokens_used_once_at_a_size_they_support_follow_chinchilla():
    law = DataConstrained.from_published("c4")
    plain = Chinchilla(law.E, law.A, law.B, law.alpha, law.beta)
    for unique in (5e10, 1e13):
        assert law(N=1e9, D=5e10, U=unique) == pytest.approx(plain(N=1e9, D=5e10), rel=1e-14)
    assert law(N=1e9, D=5e10, U=1e10) > plain(N=1e9, D=5e10)
    # A model larger than the tokens support gains less than Chinchilla says.
    assert law(N=1e11, D=1e9, U=1e9) > plain(N=1e11, D=1e9)


def test_a_law_prints_its_formula_and_values():
    text = str(Chinchilla.from_published("hoffmann"))
    assert text.startswith("L = E + A/N^alpha + B/D^beta with E=1.6934")
    assert math.isclose(Chinchilla.from_published("hoffmann").A, 406.4, abs_tol=0.05)
