"""muP and CompleteP: which weights get which multipliers, and what does not change at the base."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.models.flops import training_flops
from slm_jax.models.hf.configs import config_to_hf
from slm_jax.models.lm import LM, LMConfig
from slm_jax.models.loss import next_token_loss
from slm_jax.models.presets import dense, mamba, moe
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.module import count_parameters, named_leaves
from slm_jax.nn.parametrization import MuPConfig, UpdateScale, update_scale
from slm_jax.nn.ssm import MambaConfig
from tests.nn.tiny import PATTERNS, randomised, tiny_config, tokens

STANDARD = UpdateScale(1.0, 1.0, 1.0)

# At m = 4, l = 2: (Adam, Muon, eps).
HIDDEN = UpdateScale(1 / 4, 1 / 2, 1 / 8)
ROUTER = UpdateScale(1 / 4, 1 / 4, 1 / 8)
VECTOR = UpdateScale(1.0, 1.0, 1 / 8)
END = UpdateScale(1.0, 1.0, 1 / 4)
ENDS = {"embed.w": END, "final_norm.scale": END}
ATTENTION = {f"blocks.0.mixer.{n}.w": HIDDEN for n in ("q", "k", "v", "out")} | {
    "blocks.0.mixer_norm.scale": VECTOR,
    "blocks.0.channel_norm.scale": VECTOR,
}
MLP = {f"blocks.0.channel.{n}.w": HIDDEN for n in ("gate", "up", "down")}
MAMBA = (
    {f"blocks.0.mixer.{n}.w": HIDDEN for n in ("in_x", "in_z", "select", "dt", "out")}
    | {f"blocks.0.mixer.{n}": VECTOR for n in ("a_log", "d", "dt_bias", "conv_w", "conv_b")}
    | {"blocks.0.mixer_norm.scale": VECTOR}
)
MUP = MuPConfig(base_width=16, base_depth=2)
GOLDEN: dict[str, tuple[LMConfig, dict[str, UpdateScale]]] = {
    "dense": (
        dense(64, 4, 4, 2, 96, mup=MUP, tie_embeddings=False, head_bias=True),
        ENDS | ATTENTION | MLP | {"head.w": END, "head.b": END},
    ),
    "moe": (
        moe(64, 4, 4, 2, 32, n_experts=4, mup=MUP),
        ENDS | ATTENTION | MLP | {"blocks.0.channel.router.w": ROUTER},
    ),
    "mamba": (mamba(64, 4, d_state=4, mup=MUP), ENDS | MAMBA),
}


def abstract(config: LMConfig) -> LM:
    return jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))


def initial(config: LMConfig) -> LM:
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(lambda key: LM(config, key), compiler_options=options)(jax.random.key(0))


def values(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf.get_value()) for name, leaf in named_leaves(tree).items()}


def loss_and_grads(model: LM, length: int = 8) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    ids = tokens(2, length + 1)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": jnp.ones((2, length))}
    loss, grads = jax.jit(
        jax.value_and_grad(lambda m: next_token_loss(m, batch)[0]),
        compiler_options={"xla_backend_optimization_level": 0},
    )(model)
    return np.asarray(loss), values(grads)


@pytest.mark.parametrize("name", GOLDEN)
def test_multipliers_of_every_weight(name: str) -> None:
    config, want = GOLDEN[name]
    got = {n: update_scale(v) for n, v in named_leaves(abstract(config)).items()}
    assert got == want


@pytest.mark.parametrize("name", PATTERNS)
def test_standard_parametrisation_leaves_no_trace(name: str) -> None:
    for leaf in named_leaves(abstract(tiny_config(name))).values():
        assert "update_scale" not in leaf.get_metadata()


@pytest.mark.parametrize("name", ["dense", "moe", "mamba"])
def test_the_base_is_the_standard_model_bit_for_bit(name: str) -> None:
    mup = MuPConfig(base_width=16, base_depth=3, base_head_dim=8)
    models = [initial(tiny_config(name, mup=m)) for m in (MuPConfig(), mup)]
    first, second = (values(m) for m in models)
    assert first.keys() == second.keys()
    for leaf in first:
        np.testing.assert_array_equal(first[leaf], second[leaf], err_msg=leaf)
    assert {update_scale(v) for v in named_leaves(models[1]).values()} == {STANDARD}
    (loss, grads), (mup_loss, mup_grads) = map(loss_and_grads, models)
    np.testing.assert_array_equal(loss, mup_loss)
    for leaf in grads:
        np.testing.assert_array_equal(grads[leaf], mup_grads[leaf], err_msg=leaf)


@pytest.mark.parametrize("name", ["dense", "moe", "mamba"])
def test_gradients_away_from_the_base_are_finite_and_reach_every_weight(name: str) -> None:
    config = tiny_config(name, mup=MuPConfig(base_width=4, base_depth=1, base_head_dim=2))
    loss, grads = loss_and_grads(randomised(abstract(config)))
    assert np.isfinite(loss)
    for leaf, grad in grads.items():
        assert np.isfinite(grad).all(), leaf
        assert np.abs(grad).max() > 0, leaf


def test_initial_scale_of_a_wider_and_deeper_model() -> None:
    """Routers shrink by m^-1/2 against the standard; output projections keep the base depth's."""
    wide = initial(moe(64, 4, 4, 2, 32, n_experts=4, mup=MUP))
    plain = initial(moe(64, 4, 4, 2, 32, n_experts=4))
    want = {"router.w": 0.5, "mixer.out.w": 2**0.5, "down.w": 2**0.5}
    for leaf, value in values(wide).items():
        factor = next((f for end, f in want.items() if leaf.endswith(end)), 1.0)
        np.testing.assert_allclose(value, factor * values(plain)[leaf], rtol=1e-6, err_msg=leaf)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_divided_by_the_width_ratio_and_the_head_bias_is_not(tied: bool) -> None:
    changes: dict[str, Any] = {"tie_embeddings": tied, "head_bias": not tied}
    plain = randomised(abstract(tiny_config("dense", **changes)))
    wide = randomised(abstract(tiny_config("dense", mup=MuPConfig(base_width=4), **changes)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 16)), jnp.float32)
    bias = 0.0 if tied else values(plain)["head.b"]
    np.testing.assert_allclose(wide.logits(x) - bias, (plain.logits(x) - bias) / 4, atol=1e-6)


def test_branches_are_divided_by_the_depth_ratio() -> None:
    """A stream of two layers of base depth one is the embedding and half of each branch."""
    config = tiny_config("dense", n_layers=2, mup=MuPConfig(base_width=16, base_depth=1))
    model = randomised(abstract(config))
    ids = jnp.asarray(tokens(2, 5))
    x = model.embed(ids, jnp.dtype("float32"))
    for i in range(2):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks[0])
        y, _ = block.mixer(block.mixer_norm(x), positions=jnp.arange(5)[None], segments=None)
        x = x + y / 2
        x = x + block.channel(block.channel_norm(x), segments=None)[0] / 2
    want = model.final_norm(x)
    np.testing.assert_allclose(model.hidden(ids)[0], want, rtol=1e-4, atol=1e-5)


def test_attention_scale_is_the_usual_one_at_the_base_head_dim() -> None:
    def scale(head_dim: int, mup: MuPConfig) -> float | None:
        model = abstract(dense(64, 1, 2, 2, 64, head_dim=head_dim, mup=mup))
        found: float | None = model.blocks[0].mixer.config.scale
        return found

    mup = MuPConfig(base_width=16, base_head_dim=16)
    assert scale(16, mup) is None  # head_dim^-1/2 = 1/4
    assert scale(64, mup) == 1 / 16  # 1/4 x 16/64: falls as 1/head_dim
    assert scale(64, MuPConfig(base_width=16)) is None


def test_size_and_flops_do_not_change() -> None:
    plain, wide = moe(64, 4, 4, 2, 32), moe(64, 4, 4, 2, 32, mup=MUP)
    assert count_parameters(abstract(plain)) == count_parameters(abstract(wide))
    assert training_flops(plain, 64) == training_flops(wide, 64)


@pytest.mark.parametrize("name", ["base_width", "base_depth", "base_head_dim"])
def test_a_base_below_one_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=0 must be at least 1"):
        MuPConfig(**({"base_width": 8} | {name: 0}))


def test_what_mup_cannot_do_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="base_depth=2 needs base_width"):
        MuPConfig(base_depth=2)
    fixed = LayerConfig(MambaConfig(d_inner=24, dt_rank=4), None)
    with pytest.raises(UserError, match=r"dt_rank=4 with mup\.base_width=16: leave dt_rank"):
        tiny_config("mamba", pattern=(fixed,), mup=MUP)
    with pytest.raises(UserError, match=r"mup\.base_width=16: no class of transformers"):
        config_to_hf(dense(64, 4, 4, 2, 96, mup=MUP))
