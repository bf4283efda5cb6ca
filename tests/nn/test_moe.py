"""Mixture of experts: dispatch against an explicit loop, balance terms against hand-made cases."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.nn.mlp import MLP, MLPConfig
from slm_jax.nn.moe import MoE, MoEConfig, balanced_bias
from tests.nn.tiny import randomised

D = 6
X = np.random.default_rng(0).normal(size=(2, 10, D)).astype(np.float32)


def moe(config: MoEConfig) -> MoE:
    make = lambda key: MoE(config, D, key=key, out_std=0.1)  # noqa: E731
    return randomised(jax.eval_shape(make, jax.random.key(0)))


@jax.jit
def run(layer: MoE, x, segments=None):
    return layer(x, segments=segments)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def loop(layer: MoE, x: np.ndarray, renormalise: bool) -> np.ndarray:
    """Every token by itself, in float64."""
    router, gate, up, down = (
        np.float64(w.w[...]) for w in (layer.router, layer.gate, layer.up, layer.down)
    )
    y = np.zeros(x.shape)
    for index in np.ndindex(x.shape[:2]):
        t = np.float64(x[index])
        p = np.exp(t @ router)
        p /= p.sum()
        chosen = np.argsort(-p)[: layer.config.top_k]
        for e in chosen:
            weight = p[e] / p[chosen].sum() if renormalise else p[e]
            y[index] += weight * (silu(t @ gate[e]) * (t @ up[e])) @ down[e]
    return y


@pytest.mark.parametrize("routing", ["renormalised", "softmax"])
@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_output_is_the_loop_over_tokens_and_experts(routing: str, dispatch: str) -> None:
    layer = moe(MoEConfig(5, 7, top_k=2, routing=routing, dispatch=dispatch, capacity_factor=9))
    y, aux = run(layer, X)
    np.testing.assert_allclose(y, loop(layer, X, routing == "renormalised"), atol=1e-5)
    assert aux["moe_dropped"] == 0


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_one_expert_is_a_dense_layer(dispatch: str) -> None:
    layer = moe(MoEConfig(1, 7, top_k=1, dispatch=dispatch))
    dense = randomised(jax.eval_shape(
        lambda key: MLP(MLPConfig(7), D, key=key, out_std=0.1), jax.random.key(0)
    ))  # fmt: skip
    for name in ("gate", "up", "down"):
        getattr(dense, name).w = getattr(dense, name).w.replace(getattr(layer, name).w[0])
    np.testing.assert_allclose(run(layer, X)[0], dense(X, segments=None)[0], atol=1e-6)


def steered(config: MoEConfig, choices: list[list[list[int]]]) -> tuple[MoE, np.ndarray]:
    """A layer and tokens that go to `choices` [B, S, k], the first with the larger weight."""
    layer = moe(config)
    router = np.zeros((D, config.n_experts), np.float32)
    np.fill_diagonal(router, 1.0)
    layer.router.w = layer.router.w.replace(jnp.asarray(router))
    x = np.zeros((*np.shape(choices)[:2], D), np.float32)
    for b, s, k in np.ndindex(np.shape(choices)):
        x[b, s, choices[b][s][k]] = 9 - 3 * k
    return layer, x


def test_capacity_drops_what_the_hand_worked_table_says() -> None:
    # ceil(4 tokens x 1 choice / 2 experts x 1.0) = 2 slots an expert and row, in token order.
    config = MoEConfig(2, 7, top_k=1, dispatch="capacity", capacity_factor=1.0)
    layer, x = steered(config, [[[0], [0], [0], [1]], [[1], [0], [1], [1]]])
    kept = np.array([[1, 1, 0, 1], [1, 1, 1, 0]])
    y, aux = run(layer, x)
    full, _ = run(steered(replace(config, dispatch="dropless"), [[[0]]])[0], x)
    np.testing.assert_allclose(y, full * kept[..., None], atol=1e-6)
    assert (np.abs(full).max(-1) > 1e-3).all()
    assert aux["moe_dropped"] == pytest.approx(2 / 8)
    np.testing.assert_allclose(aux["moe_load"], [0.5, 0.5])  # asked for, dropped ones included


def test_capacity_counts_tokens_before_choices() -> None:
    # ceil(3 x 2 / 3 x 0.5) = 1 slot an expert: who comes first has it, whichever choice it was.
    config = MoEConfig(3, 7, dispatch="capacity", capacity_factor=0.5)
    layer, x = steered(config, [[[0, 1], [1, 2], [2, 0]]])
    _, aux = run(layer, x)  # token 0 has experts 0 and 1, token 1 has expert 2
    assert aux["moe_dropped"] == pytest.approx(3 / 6)
    y, _ = run(layer, x)
    assert (np.asarray(y)[0, 2] == 0).all()
    assert (np.asarray(y)[0, :2] != 0).any(axis=-1).all()


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_padding_takes_no_slots_and_is_not_counted(dispatch: str) -> None:
    config = MoEConfig(4, 7, dispatch=dispatch, capacity_factor=0.5)
    layer, x = moe(config), X.copy()
    x[:, :4] = 5.0  # all of it would go to the same experts
    segments = np.broadcast_to(np.arange(10) >= 4, (2, 10)).astype(np.int32)
    y, aux = run(layer, x, segments)
    # As many slots as the padded row has: ceil(10 x 2 / 4 x 0.5) = 3 = 6 x 2 / 4 x 1.0.
    layer.config = replace(config, capacity_factor=1.0)
    alone, alone_aux = run(layer, x[:, 4:])
    np.testing.assert_allclose(y[:, 4:], alone, atol=1e-6)
    assert (np.asarray(y)[:, :4] == 0).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), aux, alone_aux)
    assert dispatch == "dropless" or aux["moe_dropped"] > 0


def test_balance_term_is_one_when_even_and_experts_over_k_when_collapsed() -> None:
    config = MoEConfig(4, 7)
    even = [[[0, 1], [1, 2], [2, 3], [3, 0]]]
    aux = run(*steered(config, even))[1]
    assert aux["moe_load_balance"] == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(aux["moe_load"], [0.25] * 4)
    layer, x = steered(config, [[[0, 1], [1, 0]]])
    aux = run(layer, 100 * x)[1]
    assert aux["moe_load_balance"] == pytest.approx(4 / 2, rel=1e-3)
    np.testing.assert_allclose(aux["moe_load"], [0.5, 0.5, 0, 0])
    zero = layer.router.w.replace(jnp.zeros((D, 4)))
    layer.router.w = zero
    assert run(layer, x)[1]["moe_load_balance"] == pytest.approx(1.0, abs=1e-6)


def test_terms_are_means_over_all_rows_before_the_product() -> None:
    layer = moe(MoEConfig(5, 7))
    _, aux = run(layer, X)
    logits = np.float64(X) @ np.float64(layer.router.w[...])
    lse = np.log(np.exp(logits).sum(-1))
    p = np.exp(logits - lse[..., None])
    load = np.bincount(np.argsort(-p, axis=-1)[..., :2].ravel(), minlength=5) / 40
    assert aux["moe_z"] == pytest.approx((lse**2).mean(), rel=1e-5)
    np.testing.assert_allclose(aux["moe_load"], load, atol=1e-6)
    assert aux["moe_load_balance"] == pytest.approx(5 * load @ p.mean((0, 1)), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(top_k=5), "top_k=5 must be between 1 and n_experts=4"),
        (dict(top_k=1, routing="sparsemixer"), "top_k=1: routing='sparsemixer' is defined"),
        (dict(capacity_factor=0.0), "capacity_factor=0.0 must be positive"),
    ],
)
def test_config_errors(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MoEConfig(4, 8, **change)


def test_bias_step_moves_towards_the_mean() -> None:
    bias = balanced_bias(jnp.array([0.5, 0.0, -0.5]), jnp.array([0.6, 0.3, 0.1]), 0.01)
    np.testing.assert_allclose(bias, [0.49, 0.01, -0.49], atol=1e-6)
