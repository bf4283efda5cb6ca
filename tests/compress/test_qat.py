"""Models in training for fewer bits: which matrices, at which bits, and what is written then."""

from functools import partial

import jax
import numpy as np
import pytest

from slm_jax.compress.linear import QuantisedEmbedding, QuantisedLinear
from slm_jax.compress.qat import (
    QATConfig,
    Rounded,
    RoundedEmbedding,
    RoundedLinear,
    floats,
    is_rounded,
    learned,
    rounded,
    with_steps,
)
from slm_jax.compress.quantise import path_name
from slm_jax.errors import UserError
from slm_jax.nn.linear import Embedding, Linear
from slm_jax.nn.module import StepSize, named_leaves
from tests.nn.tiny import tiny_lm, tokens


def matrices(model) -> dict[str, Rounded]:
    flat, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_rounded)
    return {path_name(path): leaf for path, leaf in flat if is_rounded(leaf)}


# Unoptimised code: it runs once.
run_once = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def test_what_is_trained_is_what_is_written() -> None:
    """With scans, experts, a window and a tail."""
    config, model, ids = QATConfig("w3g8"), tiny_lm("hybrid"), tokens(2, 12)

    def train(model):
        training = with_steps(model, config)
        return training, rounded(training, config)(ids)[0], model(ids)[0]

    def write(training):
        written = learned(training, config)
        return written, written(ids)[0]

    training, seen, floating = run_once(train)(model)
    written, got = run_once(write)(training)
    assert isinstance(written.embed, QuantisedEmbedding)
    assert isinstance(written.blocks[0].mixer.in_x, QuantisedLinear)
    np.testing.assert_allclose(got, seen, atol=1e-5)
    assert np.abs(seen - floating).max() > 0.1


def test_products_are_those_of_integers() -> None:
    """One by one: behind the first, a last bit may decide how an activation is rounded."""
    config, model = QATConfig("w8a8"), tiny_lm("dense", n_layers=1)
    x = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    heads = np.random.default_rng(1).normal(size=(2, 5, 4, 8)).astype(np.float32)

    def products(model):
        mixer = jax.tree.map(lambda a: a[0], model.blocks[0]).mixer
        return mixer.q(x), mixer.out(heads), model.embed.attend(x)

    @run_once
    def both(model):
        training = with_steps(model, config)
        pair = rounded(training, config), learned(training, config)
        return *map(products, pair), products(model)

    seen, written, floating = both(model)
    for a, b, c in zip(seen, written, floating, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert 0.001 < np.abs(a - c).max() < 0.5


def test_matrices_formats_and_what_is_kept() -> None:
    model = tiny_lm("moe", tie_embeddings=False)
    training = jax.eval_shape(lambda m: with_steps(m, QATConfig("w4g8")), model)
    found = matrices(training)
    assert "blocks.0.channel.router" not in found
    assert {k for k, m in found.items() if m.spec.name == "w8"} == {"embed", "head"}
    assert {m.spec.name for m in found.values()} == {"w8", "w4g8"}
    step = found["blocks.0.channel.down"].step  # 3 layers, 4 experts, 16 outputs, 8 inputs
    assert (step.shape, step.get_metadata()["axes"]) == ((3, 4, 16, 1), ("expert", "embed", None))
    assert found["embed"].step.get_metadata()["axes"] == ("vocab", None)
    assert type(step) is StepSize
    assert step.get_metadata()["decay"] is False
    kept = QATConfig("w4", vocab="w4", keep=("router", "head"))
    found = matrices(jax.eval_shape(lambda m: with_steps(m, kept), model))
    assert {m.spec.name for m in found.values()} == {"w4"}
    assert "head" not in found


def test_off_is_the_model_itself() -> None:
    model = tiny_lm("dense", n_layers=1)
    assert with_steps(model, QATConfig()) is model
    assert rounded(model, QATConfig()) is model
    config = QATConfig("w4")
    back = jax.eval_shape(lambda m: floats(with_steps(m, config)), model)
    shapes = [{k: v.shape for k, v in named_leaves(m).items()} for m in (back, model)]
    assert shapes[0] == shapes[1]


def test_a_matrix_in_training_cannot_be_used_as_it_is() -> None:
    model = tiny_lm("dense", n_layers=1)
    with pytest.raises(TypeError, match="not callable"):
        jax.eval_shape(lambda m: with_steps(m, QATConfig("w4"))(tokens(1, 4)), model)


def test_activations_are_rounded_where_the_format_says() -> None:
    model = tiny_lm("dense", n_layers=1)

    def seen_in(config: QATConfig):
        return jax.eval_shape(lambda m: rounded(with_steps(m, config), config), model)

    seen = seen_in(QATConfig("w8a8"))
    assert type(seen.embed) is RoundedEmbedding
    assert type(seen.blocks[0].mixer.q) is RoundedLinear
    # In 4 bits, embedding and head have w8: their inputs stay floats.
    seen = seen_in(QATConfig("w4a8"))
    assert type(seen.embed) is Embedding
    assert type(seen.blocks[0].mixer.q) is RoundedLinear


def test_bits_fall_with_the_steps_in_one_program() -> None:
    config = QATConfig("w3", via=(8, 4), via_steps=5)
    keys = jax.random.split(jax.random.key(0))
    linear = Linear("embed -> mlp", {"embed": 40, "mlp": 2}, key=keys[0])
    linear.w.set_value(linear.w[...].at[0].set(100.0))  # beyond the last code at all bits
    head = Linear("embed -> vocab", {"embed": 40, "vocab": 2}, key=keys[1])
    model = {"layer": linear, "head": head}
    training = with_steps(model, config)
    run = jax.jit(lambda m, step: rounded(m, config, step))
    final = np.asarray(training["layer"].step[...])
    for step, top in ((0, 127), (4, 127), (5, 7), (9, 7), (10, 3), (99, 3)):
        seen = run(training, np.int32(step))
        w = np.asarray(seen["layer"].w[...])
        size = final[:, 0] * np.float32(3 / top)
        codes = w / size
        np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
        assert np.abs(codes).max() == pytest.approx(top, rel=1e-4)
        np.testing.assert_array_equal(  # never fewer bits than the end, nor more than the way has
            seen["head"].w[...], rounded(training, config)["head"].w[...]
        )
    assert run._cache_size() == 1
    np.testing.assert_array_equal(rounded(training, config)["layer"].w[...], w)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": "w5"}, "spec='w5' is no format"),
        ({"spec": "nf4"}, "spec='nf4': step sizes are learned for codes that are integers"),
        ({"spec": "w4", "vocab": "nf4g64"}, "vocab='nf4g64': step sizes"),
        ({"vocab": "w8"}, "vocab='w8' without a spec: give one"),
        ({"via": (8,), "via_steps": 5}, r"via=\(8,\) without a spec"),
        ({"spec": "w4", "via": (3,), "via_steps": 5}, r"via=\(3,\) before spec='w4': bits must f"),
        ({"spec": "w4", "via": (6, 8), "via_steps": 5}, "from 16 at most to more than 4"),
        ({"spec": "w4", "via": (20,), "via_steps": 5}, "bits must fall, from 16"),
        ({"spec": "w4", "via": (8,)}, r"via=\(8,\) with via_steps=0: give both"),
        ({"spec": "w4", "via_steps": 7}, r"via=\(\) with via_steps=7: give both"),
        ({"spec": "w4", "step_rate": 0.0}, r"step_rate=0\.0 must be positive"),
    ],
)
def test_mistakes_are_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        QATConfig(**options)
