import numpy as np
import pytest

from slm_jax.scaling.laws.moe import FineGrainedMoE, JointMoE, Routing, saturating_experts
from tests.scaling.tables import check_recovery

PLANTED = (
    Routing(-0.09, -0.13, 0.011, 1.2, 2.5, 300.0),
    JointMoE(1.5, 40.0, 60.0, -0.2, -0.22, 0.005, -0.15, -0.004, 0.1, 2.1, 290.0),
    FineGrainedMoE(0.5, 2.0, 18.0, 30.0, 0.6, 0.12, 0.15),
)


def columns(n=120, seed=0):
    random = np.random.default_rng(seed)
    return {
        "N": 10 ** random.uniform(7, 9.5, n),
        "D": 10 ** random.uniform(9, 11.5, n),
        "experts": 2.0 ** random.integers(0, 10, n),
        "granularity": 2.0 ** random.integers(0, 6, n),
    }


@pytest.mark.parametrize("law", PLANTED, ids=lambda law: type(law).__name__)
def test_planted_parameters_are_recovered(law):
    table = columns()
    check_recovery(law, table)


def test_experts_saturate():
    assert saturating_experts(1.0, 2.0, 300.0) == pytest.approx(2.0)
    assert saturating_experts(1e12, 2.0, 300.0) == pytest.approx(300.0, rel=1e-6)
    assert saturating_experts(64.0, 2.0, 1e15) == pytest.approx(65.0)
    grown = saturating_experts(2.0 ** np.arange(12), 2.0, 300.0)
    assert np.all(np.diff(grown) > 0)


def test_effective_parameters_are_the_dense_model_of_equal_loss():
    for name in Routing.published:
        law = Routing.from_published(name)
        n, e = np.array([1.5e7, 1.3e8, 1.3e9]), np.array([8.0, 64.0, 512.0])
        dense = law.effective_parameters(n, e)
        np.testing.assert_allclose(law(N=dense, experts=1.0), law(N=n, experts=e), rtol=1e-12)
        np.testing.assert_allclose(law.effective_parameters(n, 1.0), n, rtol=1e-12)


def test_effective_parameters_of_the_authors_data():
    # Least squares on the authors' whole file; factors at 512 experts, from 15 M to 5 B.
    law = Routing(-0.083025, -0.11804, 0.0099248, 1.1136, 2.0746, 238.67)
    n = np.array([15e6, 130e6, 1.3e9, 5e9])
    np.testing.assert_allclose(
        law.effective_parameters(n, 512.0) / n, [12.9, 7.8, 4.5, 3.3], atol=0.06
    )


def test_experts_stop_helping_at_the_cutoff():
    law = Routing.from_published("hash")
    few, many = law(N=law.cutoff, experts=2.0), law(N=law.cutoff, experts=512.0)
    assert many == pytest.approx(few, rel=1e-12)
    assert law(N=law.cutoff / 10, experts=512.0) < law(N=law.cutoff / 10, experts=2.0)
    assert law(N=law.cutoff * 10, experts=512.0) > law(N=law.cutoff * 10, experts=2.0)
    assert law.cutoff == pytest.approx(10 ** (0.136 / 0.012))


def test_joint_law_at_one_expert_is_chinchillas():
    law = PLANTED[1]
    e = np.log(law.E_start)
    n, d = 1e8, 1e10
    expected = (
        law.a * law.E_start**law.delta * n ** (law.alpha + law.gamma * e)
        + law.b * law.E_start**law.omega * d ** (law.beta + law.zeta * e)
        + law.c
    )
    assert law(N=n, D=d, experts=1.0) == pytest.approx(expected, rel=1e-12)


def test_finer_experts_help_less_and_less():
    law = PLANTED[2]
    loss = law(N=1e9, D=1e11, granularity=2.0 ** np.arange(8))
    assert np.all(np.diff(loss) < 0)
    assert np.all(np.diff(loss, 2) > 0)
    assert law(N=1e9, D=1e11, granularity=1.0) == pytest.approx(
        law.c + (law.g + law.a) / 1e9**law.alpha + law.b / 1e11**law.beta
    )
