"""What a law advises: optima in closed form and searched, inverses, serving costs, refusals."""

import math

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.scaling import (
    compute_optimal,
    deadweight_compute,
    exponents,
    inference_aware,
    loss_to_compute,
    near_optimal,
    tokens_to_loss,
)
from slm_jax.scaling.laws import (
    Chinchilla,
    ChinchillaTied,
    DataConstrained,
    Gadre,
    KaplanJoint,
)

BESIROGLU = Chinchilla.from_published("besiroglu")
# The constants that Sardana et al. print.
SARDANA = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.336, beta=0.283)


@pytest.mark.parametrize("c", [1e15, 1e20, 5.76e23])
@pytest.mark.parametrize(
    "law",
    [BESIROGLU, ChinchillaTied.from_published("c4"), Gadre.from_published("refinedweb")],
    ids=lambda law: type(law).__name__,
)
def test_the_closed_optimum_is_the_lowest_of_a_fine_scan(law, c):
    best = compute_optimal(law, c)
    np.testing.assert_allclose(6 * best.N * best.D, c, rtol=1e-12)
    n = best.N * np.geomspace(0.5, 2, 2001)
    d = c / 6 / n
    columns = {"N": n, "D": d, "C": np.full_like(n, c), "M": d / n}
    losses = law.predict(columns)
    assert n[np.argmin(losses)] == pytest.approx(best.N, rel=2e-3)
    assert best.loss == pytest.approx(losses.min(), rel=1e-7)
    assert loss_to_compute(law, best.loss) == pytest.approx(c, rel=1e-8)


@pytest.mark.parametrize(
    ("name", "ratio"), [("hoffmann_rounded", 92.7), ("hoffmann", 58.9), ("besiroglu", 18.4)]
)
def test_tokens_a_parameter_at_chinchillas_budget(name, ratio):
    best = compute_optimal(Chinchilla.from_published(name), 5.76e23)
    np.testing.assert_allclose(best.D / best.N, ratio, rtol=0, atol=0.06)


def test_exponents_are_the_slopes_of_the_optimum():
    a, b = exponents(BESIROGLU)
    low, high = compute_optimal(BESIROGLU, 1e19), compute_optimal(BESIROGLU, 1e21)
    assert math.log10(high.N / low.N) / 2 == pytest.approx(a)
    assert math.log10(high.D / low.D) / 2 == pytest.approx(b)
    assert exponents(ChinchillaTied.from_published("c4")) == (0.5, 0.5)
    assert exponents(Gadre.from_published("c4")) == (0.5, 0.5)
    with pytest.raises(UserError, match="law=KaplanJoint"):
        exponents(KaplanJoint.from_published("kaplan"))


def test_the_search_agrees_with_the_closed_form():
    # Kaplan's joint law at N with D so that both terms of its bracket are powers of C: the
    # optimum of x^-p + y^-1 under x y = const is where p x^-p = y^-1.
    law = KaplanJoint.from_published("kaplan")
    best = compute_optimal(law, 1e21)
    p = law.alpha_N / law.alpha_D
    assert p * (law.N_c / best.N) ** p == pytest.approx(law.D_c / best.D, rel=1e-4)
    assert loss_to_compute(law, best.loss) == pytest.approx(1e21, rel=1e-6)
    assert deadweight_compute(law, best.N, best.D) == pytest.approx(0, abs=1e-5 * 1e21)
    with pytest.raises(UserError, match="unreachable"):
        loss_to_compute(law, 1e-6)


def test_sizes_near_the_optimum_lose_exactly_the_share():
    low, high = near_optimal(BESIROGLU, 1e21, share=0.005)
    best = compute_optimal(BESIROGLU, 1e21)
    assert low < best.N < high
    for n in (low, high):
        assert BESIROGLU(N=n, D=1e21 / 6 / n) == pytest.approx(1.005 * best.loss, rel=1e-9)
    with pytest.raises(UserError, match="share="):
        near_optimal(BESIROGLU, 1e21, share=1e9)


def test_a_misshaped_model_wastes_what_its_loss_does_not_cost():
    best = compute_optimal(BESIROGLU, 1e21)
    assert deadweight_compute(BESIROGLU, best.N, best.D) == pytest.approx(0, abs=1e11)
    n, d = best.N / 3, best.D * 3
    lost = deadweight_compute(BESIROGLU, n, d)
    assert 0 < lost < 1e21
    equal = compute_optimal(BESIROGLU, 1e21 - lost)
    assert equal.loss == pytest.approx(BESIROGLU(N=n, D=d), rel=1e-12)


@pytest.mark.parametrize(
    ("size", "served", "n", "d", "ratio"),
    [(13e9, 2e12, 6.97e9, 1.25e12, 0.826), (30e9, 1e13, 13.6e9, None, 0.720)],
)
def test_serving_favours_smaller_models_as_published(size, served, n, d, ratio):
    # The budget for which `size` is compute-optimal, and its loss.
    a, _ = exponents(SARDANA)
    one = compute_optimal(SARDANA, 1.0)
    loss = compute_optimal(SARDANA, (size / one.N) ** (1 / a)).loss
    found = inference_aware(SARDANA, loss, served)
    np.testing.assert_allclose(found.N, n, rtol=2e-3)
    np.testing.assert_allclose(found.ratio, ratio, rtol=0, atol=1e-3)
    if d is not None:
        np.testing.assert_allclose(found.D, d, rtol=2e-3)
    assert SARDANA(N=found.N, D=found.D) == pytest.approx(loss, rel=1e-12)
    assert found.training == pytest.approx(6 * found.N * found.D)
    assert found.inference == pytest.approx(2 * found.N * served)


def test_without_serving_the_compute_optimal_model_is_cheapest():
    best = compute_optimal(BESIROGLU, 1e21)
    found = inference_aware(BESIROGLU, best.loss, 0)
    np.testing.assert_allclose(found.N, best.N, rtol=1e-4)
    np.testing.assert_allclose(found.ratio, 1.0, rtol=1e-9)


def test_tokens_to_a_loss_invert_the_law():
    d = tokens_to_loss(BESIROGLU, 1e9, 2.6)
    assert BESIROGLU(N=1e9, D=d) == pytest.approx(2.6, rel=1e-12)
    with pytest.raises(UserError, match=r"unreachable with N=1e\+06"):
        tokens_to_loss(BESIROGLU, 1e6, 2.6)


@pytest.mark.parametrize("loss", [1.8172, 1.5, 0.1])
def test_a_loss_at_or_below_e_is_unreachable(loss):
    for ask in (
        lambda: loss_to_compute(BESIROGLU, loss),
        lambda: inference_aware(BESIROGLU, loss, 1e12),
        lambda: tokens_to_loss(BESIROGLU, 1e9, loss),
    ):
        with pytest.raises(UserError, match=r"unreachable: the irreducible loss .* E=1.8172"):
            ask()


def test_questions_without_an_answer_are_refused():
    for c in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="C="):
            compute_optimal(BESIROGLU, c)
    for loss in (0.0, -2.0, math.nan):
        with pytest.raises(UserError, match="loss="):
            loss_to_compute(BESIROGLU, loss)
    with pytest.raises(UserError, match="inference_tokens=-1"):
        inference_aware(BESIROGLU, 2.5, -1)
    with pytest.raises(UserError, match="law=DataConstrained needs U"):
        compute_optimal(DataConstrained.from_published("c4"), 1e21)
    with pytest.raises(UserError, match="A=0 leaves the law without an optimum"):
        compute_optimal(Chinchilla(E=1.0, A=0.0, B=1.0, alpha=0.3, beta=0.3), 1e21)
