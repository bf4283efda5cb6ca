"""SmoothQuant and AWQ: before anything is rounded the model must compute what it did."""

import jax
import numpy as np
import pytest

from slm_jax.compress import activation_aware, layer_errors, parse_spec, quantise, smoothed
from slm_jax.compress.calibrate import get_layer, matrices, with_layers
from slm_jax.compress.fold import links
from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.module import is_variable, named_leaves
from slm_jax.nn.norm import NormConfig
from tests.nn.tiny import GQA, SWIGLU, tiny_lm, tokens

BATCHES = [{"tokens": tokens(4, 24, seed)} for seed in (1, 2)]
run = jax.jit(lambda model, ids: model(ids)[0])


def with_outliers(model: LM) -> LM:
    """Every 7th channel of the norms 30 times larger, as in models that need smoothing."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if "_norm.scale" not in name or "final" in name:
            return leaf
        value = np.array(leaf[...])
        value[..., ::7] *= 30
        return leaf.replace(jax.numpy.asarray(value))

    return jax.tree_util.tree_map_with_path(one, model, is_leaf=is_variable)


@pytest.mark.parametrize("name", ["dense", "moe", "hybrid"])
def test_smoothing_changes_no_bit(name: str) -> None:
    model = with_outliers(tiny_lm(name))
    new = smoothed(model, BATCHES)
    assert jax.tree.structure(new) == jax.tree.structure(model)
    changed = {
        k for k, v in named_leaves(model).items() if np.any(v[...] != named_leaves(new)[k][...])
    }
    mixer = "in_x" if name == "hybrid" else "q"
    assert {"blocks.0.mixer_norm.scale", f"blocks.0.mixer.{mixer}.w"} <= changed
    assert "blocks.0.channel.down.w" in changed
    assert "embed.w" not in changed
    ids = tokens(2, 16, 5)
    np.testing.assert_array_equal(run(new, ids), run(model, ids))


def test_smoothing_follows_biases_offsets_and_parallel_branches() -> None:
    layer = LayerConfig(GQA, SWIGLU, parallel=True)
    gemma = NormConfig(scale="unit_offset")
    ids = tokens(2, 16, 5)
    for model in (
        tiny_lm("dense", pattern=(layer,)),
        tiny_lm("dense", norm=gemma),
        tiny_lm("dense", norm=NormConfig(kind="layer", bias=True)),
        tiny_lm("dense", pattern=(LayerConfig(GQA, MLPConfig(24, bias=True)),)),
        tiny_lm("dense", pattern=(LayerConfig(GQA, MLPConfig(24, "relu2", gated=False)),)),
        tiny_lm("dense", pattern=(LayerConfig(GQA, SWIGLU, "post"),)),
    ):
        new = smoothed(model, BATCHES[:1])
        assert any(
            np.any(v[...] != named_leaves(new)[k][...]) for k, v in named_leaves(model).items()
        )
        np.testing.assert_allclose(run(new, ids), run(model, ids), rtol=1e-4, atol=1e-4)


def test_smoothing_helps_models_with_outliers() -> None:
    model, spec = with_outliers(tiny_lm("dense")), parse_spec("w8a8")
    new = smoothed(model, BATCHES)
    before = layer_errors(model, quantise(model, spec), BATCHES)
    after = layer_errors(new, quantise(new, spec), BATCHES)
    assert after["0.mixer.q"] < 0.7 * before["0.mixer.q"]
    ids = tokens(4, 24, 5)
    want = run(model, ids)
    error = [np.linalg.norm(run(quantise(m, spec), ids) - want) for m in (model, new)]
    assert error[1] < 0.8 * error[0]


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_awq_computes_the_same_and_rounds_better(name: str) -> None:
    model, spec = with_outliers(tiny_lm(name)), parse_spec("w4g8")
    new = activation_aware(model, BATCHES, spec)
    ids = tokens(2, 16, 5)
    np.testing.assert_allclose(run(new, ids), run(model, ids), rtol=1e-3, atol=1e-3)
    before = layer_errors(model, quantise(model, spec), BATCHES)
    after = layer_errors(new, quantise(new, spec), BATCHES)
    # The readers of the first norm, jointly: the search held their squared errors against alpha=0.
    assert after["0.mixer.q"] < 0.9 * before["0.mixer.q"]
    assert np.mean([after[k] / before[k] for k in before if before[k]]) < 0.95


def test_links_of_each_block() -> None:
    found = {name: links(get_layer(tiny_lm(name), 0)) for name in ("dense", "moe", "mamba")}
    assert [(k.source, k.readers) for k in found["dense"]] == [
        ("mixer_norm", ("mixer.q", "mixer.k", "mixer.v")),
        ("channel_norm", ("channel.gate", "channel.up")),
        ("mixer.v", ("mixer.out",)),
        ("channel.up", ("channel.down",)),
    ]
    assert found["moe"][1].readers == ("channel.gate", "channel.up", "channel.router")
    assert [k.source for k in found["mamba"]] == ["mixer_norm"]


def test_layers_are_taken_out_and_put_back() -> None:
    model = tiny_lm("hybrid")
    layers = [get_layer(model, i) for i in range(3)]
    assert "mixer.in_x" in matrices(layers[0])
    assert "mixer.q" in matrices(layers[1])
    again = with_layers(model, layers)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="strength=2 must be between 0 and 1"):
        smoothed(tiny_lm("dense"), BATCHES, strength=2)
    with pytest.raises(UserError, match="there is no batch"):
        smoothed(tiny_lm("dense"), [])
