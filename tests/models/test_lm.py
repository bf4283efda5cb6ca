"""The language model as a whole: layers, documents, causality, dtypes, errors."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slm_jax.errors import UserError
from slm_jax.models.lm import LM, LMConfig, default_positions
from slm_jax.models.loss import cross_entropy, next_token_loss
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.module import count_parameters, is_variable, named_leaves
from slm_jax.nn.ssm import MambaConfig
from tests.nn.tiny import GQA, PATTERNS, VOCAB, tiny_config, tiny_lm, tokens

model_of = cache(tiny_lm)
LENGTH = 16


def logits_of(model: LM, ids: np.ndarray, segments: np.ndarray | None = None) -> np.ndarray:
    """One program a model, whether documents are packed or not."""
    segments = np.ones_like(ids) if segments is None else segments
    return np.asarray(_logits(model, ids, segments))


@jax.jit
def _logits(model: LM, ids, segments):
    return model(ids, segments=segments)[0]


@jax.jit
def loss_and_gradient(model: LM, batch):
    return jax.value_and_grad(lambda m: next_token_loss(m, batch)[0])(model)


def batch(rows: int = 2) -> dict[str, np.ndarray]:
    ids = tokens(rows, LENGTH + 1)
    return dict(tokens=ids[:, :-1], targets=ids[:, 1:], weights=np.ones((rows, LENGTH)))


def unrolled(model: LM) -> LM:
    """The same layers, each a position of a pattern as long as the model."""
    config, layers = model.config, []
    period = len(config.pattern)
    for i in range(config.n_layers):
        repeat, position = divmod(i, period)
        if repeat < config.n_layers // period:
            block = model.blocks[position]
            layers.append(jax.tree.map(lambda a, r=repeat: a[r : r + 1], block))
        else:
            layers.append(jax.tree.map(lambda a: a[None], model.tail[position]))
    other = tiny_config("dense", pattern=tuple(config.layer(i) for i in range(config.n_layers)))
    flat = jax.eval_shape(lambda key: LM(other, key), jax.random.key(0))
    flat.embed, flat.final_norm, flat.head = model.embed, model.final_norm, model.head
    flat.blocks = nnx.List(layers)
    return flat


def test_a_pattern_with_a_tail_is_its_layers_one_after_another() -> None:
    model, ids = model_of("hybrid"), tokens(3, LENGTH)
    flat = unrolled(model)
    assert [len(model.blocks), len(model.tail)] == [2, 1]
    assert [len(flat.blocks), len(flat.tail)] == [3, 0]
    assert count_parameters(flat) == count_parameters(model)
    np.testing.assert_allclose(logits_of(flat, ids), logits_of(model, ids), atol=1e-5)


@pytest.mark.parametrize("change", [dict(scan_unroll=2, remat="full"), dict(remat="dots")], ids=str)
def test_how_layers_are_run_does_not_change_the_result(change: dict) -> None:
    loss, gradient = loss_and_gradient(model_of("dense"), batch())
    model = tiny_lm("dense", **change)
    other_loss, other_gradient = loss_and_gradient(model, batch())
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(other_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("name", ["dense", "window", "mamba", "hybrid"])
def test_packed_documents_are_separate_rows(name: str) -> None:
    ids = tokens(3, LENGTH)
    packed = np.concatenate([ids[0, :7], ids[1, :6], np.zeros(3, np.int32)])[None]
    segments = np.array([[1] * 7 + [2] * 6 + [0] * 3])
    rows = logits_of(model_of(name), ids)
    got = logits_of(model_of(name), np.tile(packed, (3, 1)), np.tile(segments, (3, 1)))
    np.testing.assert_allclose(got[0, :7], rows[0, :7], atol=1e-5)
    np.testing.assert_allclose(got[0, 7:13], rows[1, :6], atol=1e-5)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_no_later_token_is_seen(name: str) -> None:
    model, ids, t = tiny_lm(name, n_layers=2), tokens(1, LENGTH), 9

    @jax.jit
    @jax.grad
    def pull(offset):
        shifted = jax.tree.map(lambda x: x, model)
        shifted.embed = Shifted(model.embed, offset)
        return jnp.sum(jnp.sin(shifted(ids)[0][0, t]))

    reach = np.abs(pull(jnp.zeros((1, LENGTH, model.config.d_model)))).max(axis=(0, 2))
    assert (reach[t + 1 :] == 0).all()
    assert (reach[t - 3 : t + 1] > 0).all()


class Shifted(nnx.Module):
    """An embedding whose vectors are moved, to differentiate by them."""

    def __init__(self, embed, offset: jax.Array) -> None:
        self.embed, self.offset = embed, nnx.data(offset)

    def __call__(self, ids, dtype):
        return self.embed(ids, dtype) + self.offset

    def attend(self, x):
        return self.embed.attend(x)


def test_window_bounds_how_far_a_token_sees() -> None:
    model = tiny_lm("window", n_layers=1)
    ids = tokens(1, LENGTH)
    far = ids.copy()
    far[0, LENGTH - 1 - 5] += 1  # window 5: the last token sees itself and four before it
    changed = np.abs(logits_of(model, far % VOCAB) - logits_of(model, ids))[0].max(-1)
    assert changed[-1] == 0
    assert (changed[-6:-1] > 0).all()


@pytest.mark.parametrize("name", ["dense", "mamba"])
def test_bfloat16_computes_over_float32_masters(name: str) -> None:
    model = tiny_lm(name, dtype="bfloat16", residual_dtype="float32")
    b = batch(3)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(model):
        x, _, _ = model.hidden(b["tokens"])
        logits = model.logits(x)
        return jnp.sum(cross_entropy(logits, b["targets"])), (x, logits)

    (loss, (x, logits)), gradient = run(model)
    exact_logits = logits_of(model_of(name), b["tokens"])
    exact = float(jnp.sum(cross_entropy(exact_logits, b["targets"])))
    for leaf in jax.tree.leaves((model, gradient)):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
    assert (x.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert float(loss) == pytest.approx(exact, rel=2e-2)
    assert (logits != exact_logits).any()


def test_every_leaf_has_a_name_axes_and_a_decay_rule() -> None:
    for name in PATTERNS:
        for path, leaf in named_leaves(model_of(name)).items():
            axes = leaf.get_metadata()["axes"]
            stacked = path.startswith("blocks.")
            assert len(axes) + stacked == leaf.get_value().ndim, path
            matrix = path.endswith(".w")
            assert leaf.get_metadata()["decay"] == matrix, path


def test_initialisation_is_a_function_of_the_key() -> None:
    layer = LayerConfig(GQA, MLPConfig(24, gated=False))
    config = LMConfig(VOCAB, 32, 2, (layer,), tie_embeddings=False)
    make = jax.jit(lambda key: LM(config, key))
    model, same, other = (make(jax.random.key(seed)) for seed in (0, 0, 1))
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    leaves, others = named_leaves(model), named_leaves(other)
    for path, leaf in leaves.items():
        if path.endswith(".w"):
            assert (leaf.get_value() != others[path].get_value()).any(), path
    stacked = leaves["blocks.0.mixer.q.w"].get_value()
    assert (stacked[0] != stacked[1]).all()  # every layer has its own
    deviations = {path: float(np.std(leaf.get_value())) for path, leaf in leaves.items()}
    assert deviations["embed.w"] == pytest.approx(0.02, rel=0.1)
    assert deviations["head.w"] == pytest.approx(0.02, rel=0.1)
    assert deviations["blocks.0.mixer.q.w"] == pytest.approx(32**-0.5, rel=0.1)
    # Output projections: 1 / sqrt(fan-in x 2 layers x 2 branches).
    assert deviations["blocks.0.mixer.out.w"] == pytest.approx((32 * 4) ** -0.5, rel=0.1)
    assert deviations["blocks.0.channel.down.w"] == pytest.approx((24 * 4) ** -0.5, rel=0.1)
    assert all(is_variable(leaf) for leaf in leaves.values())


def test_aux_terms_are_stacked_in_the_order_of_the_layers() -> None:
    model = model_of("moe")
    _, aux, _ = jax.jit(lambda m: m(tokens(2, LENGTH)))(model)
    assert {k: v.shape for k, v in aux.items()} == {
        "moe_load_balance": (3,), "moe_z": (3,), "moe_load": (3, 4), "moe_dropped": (3,),
    }  # fmt: skip
    np.testing.assert_allclose(aux["moe_load"].sum(-1), 1, rtol=1e-5)
    first = tiny_lm("moe", n_layers=1)
    first.embed = model.embed
    first.blocks = jax.tree.map(lambda a: a[:1], model.blocks)
    _, alone, _ = jax.jit(lambda m: m(tokens(2, LENGTH)))(first)
    np.testing.assert_allclose(alone["moe_z"][0], aux["moe_z"][0], rtol=1e-5)
    assert abs(aux["moe_z"][1] / aux["moe_z"][0] - 1) > 1e-3


def test_positions_restart_with_every_document() -> None:
    segments = np.array([[0, 0, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    want = [[0, 1, 0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7]]
    np.testing.assert_array_equal(default_positions(8, jnp.asarray(segments)), want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_config("dense", n_layers=0), "n_layers=0 must be at least 1"),
        (lambda: tiny_config("dense", pattern=()), r"pattern=\(\) is empty"),
        (lambda: tiny_config("dense", head_bias=True), "head_bias=True needs tie_embeddings=False"),
        (lambda: AttentionConfig(6, 4, 8), "n_heads=6 .* n_kv_heads=4: choose 1, 2, 3 or 6"),
        (lambda: AttentionConfig(1, 4, 8), "n_heads=1 allows only n_kv_heads=1"),
        (lambda: AttentionConfig(2, 2, 8, window=0), "window=0 must be at least 1"),
        (lambda: AttentionConfig(2, 2, 7), "head_dim=7: rope rotates pairs"),
        (lambda: MambaConfig(16, d_conv=0), "d_conv=0 must be at least 1"),
        (
            lambda: model_of("dense")(tokens(1, 4), state=model_of("dense").init_state(1, 4)),
            "positions=None with a state",
        ),
    ],
)
def test_errors_name_field_value_and_remedy(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
