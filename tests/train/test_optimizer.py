import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slm_jax.models.lm import LM, LMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.module import Buffer, named_leaves, parameter
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.norm import NormConfig
from slm_jax.nn.parametrization import UpdateScale, update_scale
from slm_jax.nn.ssm import MambaConfig
from slm_jax.parallel import MeshConfig, make_mesh, shardings
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer

# One period each, with every optional weight switched on.
ATTENTION = AttentionConfig(2, 1, 8, qk_norm="head", qkv_bias=True, out_bias=True)
DENSE = LayerConfig(ATTENTION, MLPConfig(32, bias=True), norm_position="sandwich")
MOE = LayerConfig(AttentionConfig(2, 1, 8), MoEConfig(4, 24, selection_bias=True))
MAMBA = LayerConfig(MambaConfig(32, 4, inner_norms=True, proj_bias=True), None)
LAYER_NORM = NormConfig(kind="layer", bias=True)
MODELS = {
    "dense": LMConfig(64, 16, 2, (DENSE,), LAYER_NORM, tie_embeddings=False, head_bias=True),
    "moe": LMConfig(64, 16, 2, (MOE,)),
    "mamba": LMConfig(64, 16, 2, (MAMBA,)),
    "hybrid": LMConfig(64, 16, 3, (MAMBA, MOE)),
}

ATTENTION_MATRICES = {"mixer.q.w", "mixer.k.w", "mixer.v.w", "mixer.out.w"}
MLP_MATRICES = {"channel.gate.w", "channel.up.w", "channel.down.w"}
MAMBA_MATRICES = {"mixer.in_x.w", "mixer.in_z.w", "mixer.select.w", "mixer.dt.w", "mixer.out.w"}
MAMBA_OTHERS = {
    *("mixer.a_log", "mixer.d", "mixer.dt_bias", "mixer.conv_w", "mixer.conv_b"),
    *("mixer.in_x.b", "mixer.in_z.b", "mixer.out.b"),
    *("mixer.norms.0.scale", "mixer.norms.1.scale", "mixer.norms.2.scale", "mixer_norm.scale"),
}
MOE_OTHERS = {"channel.bias", "channel_norm.scale", "mixer_norm.scale"}


def under(prefix: str, *names: set[str]) -> set[str]:
    return {f"{prefix}.{name}" for group in names for name in group}


# Name -> the leaves that decay, those of them that are matrices of layers, and all other leaves.
GROUPS: dict[str, tuple[set[str], set[str], set[str]]] = {
    "dense": (
        {"embed.w", "head.w"},
        under("blocks.0", ATTENTION_MATRICES, MLP_MATRICES),
        {"final_norm.scale", "final_norm.bias", "head.b"}
        | under(
            "blocks.0",
            {f"{norm}.{part}" for part in ("scale", "bias") for norm in
             ("mixer_norm", "mixer_post_norm", "channel_norm", "channel_post_norm")},
            {"mixer.q_norm.scale", "mixer.k_norm.scale"},
            {name.removesuffix("w") + "b" for name in ATTENTION_MATRICES | MLP_MATRICES},
        ),
    ),
    "moe": (
        {"embed.w", "blocks.0.channel.router.w"},
        under("blocks.0", ATTENTION_MATRICES, MLP_MATRICES),
        {"final_norm.scale"} | under("blocks.0", MOE_OTHERS),
    ),
    "mamba": (
        {"embed.w"},
        under("blocks.0", MAMBA_MATRICES),
        {"final_norm.scale"} | under("blocks.0", MAMBA_OTHERS),
    ),
    "hybrid": (
        {"embed.w", "blocks.1.channel.router.w"},
        under("blocks.0", MAMBA_MATRICES)
        | under("blocks.1", ATTENTION_MATRICES, MLP_MATRICES)
        | under("tail.0", MAMBA_MATRICES),
        {"final_norm.scale"}
        | under("blocks.0", MAMBA_OTHERS)
        | under("blocks.1", MOE_OTHERS)
        | under("tail.0", MAMBA_OTHERS),
    ),
}  # fmt: skip


def filled(config: LMConfig, fill: Any) -> LM:
    """The model with `fill(shape)` for every array: no initialisation to compile."""
    abstract = jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(fill(a.shape), jnp.float32), abstract)


def values(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf.get_value()) for name, leaf in named_leaves(tree).items()}


def first_update(config: OptimizerConfig, grads: Any, model: Any) -> Any:
    rule = make_optimizer(config, model)
    # Unoptimised code: it runs once.
    update = jax.jit(rule.update, compiler_options={"xla_backend_optimization_level": 0})
    return update(grads, rule.init(model), model)[0]


@pytest.mark.parametrize(
    ("kind", "optimizer"), [*((kind, "adamw") for kind in MODELS), ("hybrid", "lion")]
)
def test_exactly_these_leaves_decay(kind: str, optimizer: Any) -> None:
    model = filled(MODELS[kind], np.ones)
    zeros = filled(MODELS[kind], np.zeros)
    config = OptimizerConfig(optimizer, weight_decay=0.25, clip_norm=None)
    direction = first_update(config, zeros, model)
    got = {name: np.unique(value).tolist() for name, value in values(direction).items()}
    ends, matrices, others = GROUPS[kind]
    assert got == {n: [0.25] for n in ends | matrices} | {n: [0.0] for n in others}


def one_matrix(value: np.ndarray) -> Any:
    """A model of one decayed matrix, one norm scale and one buffer."""
    return {
        "w": parameter(jnp.asarray(value), ("embed", "mlp"), matrix=(1, 1)),
        "norm": parameter(jnp.ones(4), (None,), decay=False),
        "buffer": Buffer(jnp.ones(2), axes=(None,)),
    }


def training(config: OptimizerConfig, rate: float) -> Iterator[tuple[Any, Any]]:
    """Pairs (gradient of w, w after), three steps; the norm scale has gradient 0.5."""
    rng = np.random.default_rng(0)
    model = one_matrix(rng.normal(size=(3, 4)).astype(np.float32))
    rule = make_optimizer(config, model)
    state = rule.init(model)
    for step in range(3):
        # The second gradient is long (clipped), the third short.
        g = (rng.normal(size=(3, 4)) * (0.2, 20.0, 0.01)[step]).astype(np.float32)
        grads = one_matrix(g)
        grads["norm"] = grads["norm"].replace(jnp.full(4, 0.5))
        grads["buffer"] = grads["buffer"].replace(jnp.zeros(2))
        direction, state = rule.update(grads, state, model)
        model = jax.tree.map(lambda p, d: p - rate * d, model, direction)
        yield g, model
    np.testing.assert_array_equal(model["buffer"].get_value(), np.ones(2))


def clipped(g: np.ndarray, norm: float) -> tuple[np.ndarray, np.ndarray]:
    """Both gradients after clipping by their global norm."""
    other = np.full(4, 0.5)
    length = math.sqrt((g.astype(np.float64) ** 2).sum() + (other**2).sum())
    return g * min(1.0, norm / length), other * min(1.0, norm / length)


def test_adamw_is_the_published_formula() -> None:
    """Loshchilov and Hutter (arXiv 1711.05101), algorithm 2, with decay times the rate alone."""
    b1, b2, eps, decay, rate, clip = 0.8, 0.9, 1e-3, 0.3, 0.05, 1.5
    config = OptimizerConfig("adamw", decay, b1, b2, eps, clip)
    w = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32).astype(np.float64)
    scale = np.ones(4)
    first, second = [np.zeros((3, 4)), np.zeros(4)], [np.zeros((3, 4)), np.zeros(4)]
    for t, (g, model) in enumerate(training(config, rate), start=1):
        steps = []
        for i, gradient in enumerate(clipped(g, clip)):
            first[i] = b1 * first[i] + (1 - b1) * gradient
            second[i] = b2 * second[i] + (1 - b2) * gradient**2
            steps.append(first[i] / (1 - b1**t) / (np.sqrt(second[i] / (1 - b2**t)) + eps))
        w = w - rate * (steps[0] + decay * w)
        scale = scale - rate * steps[1]
        np.testing.assert_allclose(model["w"].get_value(), w, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(model["norm"].get_value(), scale, rtol=2e-6)


def test_lion_is_the_published_formula() -> None:
    """Chen et al. (arXiv 2302.06675), algorithm 2."""
    b1, b2, decay, rate, clip = 0.8, 0.9, 0.3, 0.05, 1.5
    config = OptimizerConfig("lion", decay, b1, b2, clip_norm=clip)
    w = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32).astype(np.float64)
    momentum = np.zeros((3, 4))
    for g, model in training(config, rate):
        gradient, _ = clipped(g, clip)
        w = w - rate * (np.sign(b1 * momentum + (1 - b1) * gradient) + decay * w)
        momentum = b2 * momentum + (1 - b2) * gradient
        np.testing.assert_allclose(model["w"].get_value(), w, rtol=2e-6, atol=2e-6)


def test_without_clipping_long_gradients_stay_long() -> None:
    """Adam forgets a constant factor, but not a change of length between steps."""
    moved = []
    for clip in (None, 1.5):
        *_, (_, model) = training(OptimizerConfig("adamw", clip_norm=clip), 0.05)
        moved.append(np.asarray(model["w"].get_value()))
    assert np.abs(moved[0] - moved[1]).max() > 1e-3


def as_matrices(name: str, value: np.ndarray) -> np.ndarray:
    """[..., in, out]: heads and head_dim are one side of the attention's matrices."""
    if name.endswith(("mixer.q.w", "mixer.k.w", "mixer.v.w")):
        return value.reshape(*value.shape[:-2], -1)
    if name.endswith("mixer.out.w") and value.ndim == 4:
        return value.reshape(value.shape[0], -1, value.shape[-1])
    return value


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_muon_orthogonalises_the_matrices_of_layers(kind: str) -> None:
    """Each is a matrix of its own: one a layer and expert. The rest moves by Adam."""
    rng = np.random.default_rng(0)
    model = filled(MODELS[kind], rng.standard_normal)
    grads = filled(MODELS[kind], lambda shape: 1e-4 * rng.standard_normal(shape))
    config = OptimizerConfig("muon", weight_decay=0.25, b1=0.8, eps=1e-12, clip_norm=None)
    got, given = values(first_update(config, grads, model)), values(grads)
    ends, matrices, _ = GROUPS[kind]
    for name in ends | matrices:
        got[name] = got[name] - 0.25 * values(model)[name]
    for name in got.keys() - matrices:
        # Adam's first step is the sign of the gradient, here with Nesterov's look-ahead:
        # b1 x m / (1 - b1^2) + (1 - b1) x g / (1 - b1), m = (1 - b1) x g.
        step = np.sign(given[name]) * (1 + 0.8 / 1.8)
        np.testing.assert_allclose(got[name], step, rtol=0.03, err_msg=name)
    for name in matrices:
        g, d = as_matrices(name, given[name]), as_matrices(name, got[name])
        u, singular, vt = np.linalg.svd(g.astype(np.float64), full_matrices=False)
        singular /= np.linalg.norm(singular, axis=-1, keepdims=True)
        assert (orthogonalised(singular)[singular > 0.01] > 0.67).all()
        assert (orthogonalised(singular) < 1.21).all()
        size = 0.2 * math.sqrt(max(g.shape[-2:]))  # arXiv 2502.16982, eq. 4
        want = (u * orthogonalised(singular)[..., None, :]) @ vt * size
        np.testing.assert_allclose(d, want, atol=2e-4, err_msg=name)


def orthogonalised(singular: np.ndarray) -> np.ndarray:
    """Singular values after five Newton-Schulz steps with Jordan's coefficients."""
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    return singular


def test_muon_is_the_same_on_a_mesh() -> None:
    """It reshapes split axes, which Explicit types refuse: the update runs under Auto ones."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 16, 2, 8)).astype(np.float32) for _ in range(2)]

    def leaf(value: Any) -> Any:
        return {"q": parameter(value, ("embed", "heads", "head_dim"), matrix=(1, 2))}

    config = OptimizerConfig("muon")
    whole = [leaf(jnp.asarray(a)) for a in arrays]
    rule = make_optimizer(config, whole[0])
    want, _ = jax.jit(rule.update)(whole[1], rule.init(whole[0]), whole[0])
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        model, grads = (jax.device_put(tree, shardings(tree, mesh)) for tree in whole)
        rule = make_optimizer(config, model)
        got, state = jax.jit(rule.update)(grads, jax.jit(rule.init)(model), model)
    places = {x.sharding for x in jax.tree.leaves(got)}
    assert places == {NamedSharding(mesh, P(None, "fsdp", "tensor", None))}
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    np.testing.assert_allclose(values(got)["q"], values(want)["q"], rtol=1e-4, atol=1e-5)


def scaled_leaves(fill: Any) -> dict[str, Any]:
    """A hidden matrix, a router and a norm with multipliers; `fill(shape)` is the value."""
    tree = {
        "w": parameter(fill((3, 4)), ("embed", "mlp"), matrix=(1, 1)),
        "router": parameter(fill((3, 2)), ("embed", "experts"), matrix=(1, 1)),
        "norm": parameter(fill((4,)), (None,), decay=False),
    }
    scales = (UpdateScale(0.25, 0.5, 0.125), UpdateScale(0.25, 0.25, 0.125), UpdateScale(eps=0.5))
    for leaf, scale in zip(tree.values(), scales, strict=True):
        leaf.set_metadata(update_scale=scale)
    return tree


def plain_leaves(tree: dict[str, Any]) -> dict[str, Any]:
    copy = jax.tree.map(lambda x: x, tree)
    for leaf in copy.values():
        leaf.del_metadata("update_scale")
    return copy


def scaled_case() -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(0)
    model, grads = (
        scaled_leaves(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32))
        for _ in range(2)
    )
    return model, grads


def test_adam_multiplies_direction_and_eps_but_not_the_decay() -> None:
    model, grads = scaled_case()
    config = OptimizerConfig("adamw", eps=0.1, weight_decay=0.5, clip_norm=None)
    got = values(first_update(config, grads, model))
    for name, leaf in model.items():
        scale = update_scale(leaf)
        g = np.asarray(grads[name][...], np.float64)
        # In the first step both moments, made unbiased, are those of this gradient alone.
        want = scale.adam * g / (np.abs(g) + 0.1 * scale.eps)
        if name != "norm":
            want = want + 0.5 * np.asarray(leaf[...])
        np.testing.assert_allclose(got[name], want, rtol=1e-5, err_msg=name)


def test_lion_multiplies_the_sign() -> None:
    model, grads = scaled_case()
    config = OptimizerConfig("lion", weight_decay=0.5, clip_norm=None)
    got = values(first_update(config, grads, model))
    for name, leaf in model.items():
        want = update_scale(leaf).adam * np.sign(np.asarray(grads[name][...]))
        if name != "norm":
            want = want + 0.5 * np.asarray(leaf[...])
        np.testing.assert_allclose(got[name], want, rtol=1e-6, err_msg=name)


def test_muon_multiplies_its_matrices_by_their_own_factor() -> None:
    model, grads = scaled_case()
    config = OptimizerConfig("muon", weight_decay=0.0, clip_norm=None)
    got = values(first_update(config, grads, model))
    plain = values(first_update(config, plain_leaves(grads), plain_leaves(model)))
    for name, factor in {"w": 0.5, "router": 0.25, "norm": 1.0}.items():
        np.testing.assert_allclose(got[name], factor * plain[name], rtol=1e-4, err_msg=name)


def test_without_multipliers_the_rule_has_no_part_for_them() -> None:
    """A checkpoint's optimiser state is laid out as it was before there were any."""
    model, _ = scaled_case()
    plain = plain_leaves(model)
    base = plain_leaves(model)
    for leaf in base.values():
        leaf.set_metadata(update_scale=UpdateScale())
    config = OptimizerConfig()
    assert len(make_optimizer(config, plain).init(plain)) == 3  # clip, Adam, decay
    assert len(make_optimizer(config, base).init(base)) == 3
    assert len(make_optimizer(config, model).init(model)) == 5
