"""The Tiny Recursive Model: sizes, where gradients go, stablemax, operations counted."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.models.trm import TRM, Latents, TRMConfig, empty_latents, refine
from slm_jax.models.trm_flops import head_flops, inference_flops, network_flops, training_flops
from slm_jax.nn.module import SparseTable, count_parameters, named_leaves
from slm_jax.nn.stablemax import log_stablemax_scores, stablemax_cross_entropy

SUDOKU = TRMConfig(11, 81, n_puzzle_ids=1)
MAZE = TRMConfig(6, 900, n_puzzle_ids=1, n_latent_steps=4)
ARC = TRMConfig(12, 900, n_puzzle_ids=960_961, mixer="attention", n_latent_steps=4)


def abstract(config: TRMConfig) -> TRM:
    return jax.eval_shape(lambda key: TRM(config, key), jax.random.key(0))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (SUDOKU, 5_028_866),
        (replace(SUDOKU, mixer="attention"), 6_828_034),
        (replace(MAZE, mixer="attention"), 6_822_914),
        (MAZE, 18_795_522),
        (ARC, 6_829_058),
    ],
)
def test_parameters_are_as_many_as_in_the_reference(config: TRMConfig, count: int) -> None:
    """Puzzle embeddings are not among them, there or here."""
    model = abstract(config)
    assert count_parameters(model) == count
    tables = [v for v in named_leaves(model).values() if isinstance(v, SparseTable)]
    assert [v.get_value().shape for v in tables] == [(config.n_puzzle_ids, 512)]


def test_ablations_have_the_sizes_of_the_paper() -> None:
    f = 5_028_866 - 2 * 11 * 512 - 2 * 513
    for changes, networks in (
        ({"separate_networks": True}, 2),
        ({"n_layers": 4, "n_latent_steps": 3}, 2),
        ({"latents": "one"}, 1),
        ({"gradient": "last"}, 1),
    ):
        extra = (networks - 1) * f
        assert count_parameters(abstract(replace(SUDOKU, **changes))) == 5_028_866 + extra


def test_initial_weights() -> None:
    model = TRM(replace(SUDOKU, n_puzzle_ids=3), jax.random.key(1))
    leaves = {name: np.asarray(v.get_value()) for name, v in named_leaves(model).items()}
    np.testing.assert_array_equal(leaves.pop("halt.b"), [-5, -5])
    assert not leaves.pop("halt.w").any()
    assert not leaves.pop("puzzles").any()
    fan_in = {"embed.w": 512, "y_init": 1, "z_init": 1}
    for name, value in leaves.items():
        std = fan_in.get(name, value.shape[0]) ** -0.5
        np.testing.assert_allclose(value.std(), std, rtol=4 / math.sqrt(value.size), err_msg=name)
        assert np.abs(value).max() < 2.3 * std  # cut at two sigma, then rescaled


def test_operations() -> None:
    """C_f and the step of Sudoku-MLP; equal cost of the arms that are compared at equal FLOPs."""
    assert round(network_flops(SUDOKU) / 1e9, 2) == 1.22
    assert round(training_flops(SUDOKU) / 1e9, 1) == 42.7
    assert inference_flops(SUDOKU, 16) == 16 * (21 * network_flops(SUDOKU) + head_flops(SUDOKU))

    small = TRMConfig(8, 36, 0, 48, 4, n_prefix=1, n_cycles=2, n_latent_steps=3, ff_multiple=32)
    assert round(48 * training_flops(small) / 1e9, 1) == 4.2

    def networks(**changes: Any) -> float:
        config = replace(small, **changes)
        body = training_flops(config) - 3 * head_flops(config)
        return body / network_flops(replace(small, n_layers=1))

    assert networks() == 2 * 16
    assert networks(n_layers=4, n_latent_steps=1) == 2 * 16
    assert networks(gradient="last") == 2 * 12
    assert networks(latents="one") == 2 * 16
    assert networks(latents="one", gradient="last") == 2 * (7 + 3)
    assert networks(latents="one", n_cycles=1, n_latent_steps=0, n_layers=8) == 24
    extra = training_flops(small, continue_loss=True) - training_flops(small)
    assert extra == inference_flops(small)


def test_attention_products_are_counted() -> None:
    config = replace(SUDOKU, mixer="attention")
    projections, products = 2 * 4 * 512 * 512, 4 * 512 * 97
    channel = 2 * 3 * 512 * 1536
    assert network_flops(config) == 2 * 97 * (projections + products + channel)


TINY = TRMConfig(5, 4, 3, 8, 2, 1, n_prefix=2, n_cycles=3, n_latent_steps=2, ff_multiple=8)
INPUTS = jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, 4)), jnp.int32)
IDS = jnp.asarray([0, 2, 2], jnp.int32)


def some_latents(config: TRMConfig, rows: int = 3) -> Latents:
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), empty_latents(config, rows)
    )


def objective(model: TRM, latents: Latents) -> jax.Array:
    latents, logits, halt = model(INPUTS, IDS, latents)
    weigh = [jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in
             (logits, halt, latents.z)]  # fmt: skip
    return jnp.vdot(weigh[0], logits) + jnp.vdot(weigh[1], halt) + jnp.vdot(weigh[2], latents.z)


@pytest.mark.parametrize("latents", ["two", "one"])
def test_gradient_is_that_of_the_last_cycle(latents: Any) -> None:
    """None into the carry, at any number of cycles; and the same as from where T - 1 cycles end."""
    config = replace(TINY, latents=latents)
    start = some_latents(config)
    whole, last = (
        TRM(config, jax.random.key(0)),
        TRM(replace(config, n_cycles=1), jax.random.key(0)),
    )
    before, _, _ = TRM(replace(config, n_cycles=2), jax.random.key(0))(INPUTS, IDS, start)
    gradient = jax.jit(jax.grad(objective, argnums=(0, 1)))
    got, into_carry = gradient(whole, start)
    want, into_state = gradient(last, before)
    for leaf in jax.tree.leaves((into_carry, into_state)):
        assert not leaf.any()
    expected = named_leaves(want)
    for name, leaf in named_leaves(got).items():
        value, target = leaf.get_value(), expected[name].get_value()
        np.testing.assert_allclose(value, target, rtol=1e-5, atol=1e-5, err_msg=name)
        assert name.endswith("_init") != bool(np.asarray(value).any()), name
    assert np.asarray(got.puzzles.get_value()).any(axis=1).tolist() == [True, False, True]


def test_last_gradient_is_that_of_the_last_updates_alone() -> None:
    config = replace(TINY, n_cycles=1, n_latent_steps=3, gradient="last")
    start = some_latents(config)
    model = TRM(config, jax.random.key(0))
    x = model._embed(INPUTS, IDS)
    shorter = TRM(replace(config, n_latent_steps=1, gradient="cycle"), jax.random.key(0))
    before = Latents(start.y, model._update_z(x, start, 2).z)
    got, want = jax.grad(objective)(model, start), jax.grad(objective)(shorter, before)
    expected = named_leaves(want)
    for name, leaf in named_leaves(got).items():
        target = expected[name].get_value()
        np.testing.assert_allclose(leaf.get_value(), target, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("mixer", ["mlp", "attention"])
def test_refining_is_one_supervision_step_after_the_other(mixer: Any) -> None:
    """And every puzzle is solved by itself, though every cell sees every other."""
    model = TRM(replace(TINY, mixer=mixer, halt_bias=0.5), jax.random.key(0))
    found = jax.jit(refine, static_argnums=3)(model, INPUTS, IDS, 3)
    latents = model.start(jnp.ones(3, bool), some_latents(TINY))
    for step in range(3):
        latents, logits, halt = model(INPUTS, IDS, latents)
        np.testing.assert_array_equal(found.predictions[step], logits.argmax(-1))
        np.testing.assert_allclose(found.halt[step], halt[:, 0], rtol=1e-5)
    changed = INPUTS.at[0, -1].set((INPUTS[0, -1] + 1) % 5)
    start = model.start(jnp.ones(3, bool), some_latents(TINY))
    a, b = (model(i, IDS, start)[1] for i in (INPUTS, changed))
    moved = np.abs(np.asarray(a - b)).max(-1)
    assert (moved[0] > 1e-6).all()  # the first cell too: nothing is causal
    assert not moved[1:].any()


def test_only_rows_that_halted_start_anew() -> None:
    model, old = TRM(TINY, jax.random.key(0)), some_latents(TINY)
    new = model.start(jnp.asarray([True, False, True]), old)
    for init, before, after in ((model.y_init, old.y, new.y), (model.z_init, old.z, new.z)):
        assert init is not None
        assert before is not None
        assert after is not None
        np.testing.assert_array_equal(after[1], before[1])
        np.testing.assert_array_equal(after[2], np.broadcast_to(init.get_value(), after[2].shape))


VALUES = np.array([-1e30, -100, -1, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0, 2, 100, 1e30], np.float32)


def test_stablemax_has_a_finite_gradient_everywhere() -> None:
    """The plain `where(v < 0, 1 / (1 - v), v + 1)` has none at 1."""
    slope = jax.vmap(jax.grad(log_stablemax_scores))(jnp.asarray(VALUES))
    np.testing.assert_allclose(slope, 1 / (1 + np.abs(VALUES.astype(np.float64))), rtol=1e-6)

    def plain(v: jax.Array) -> jax.Array:
        return jnp.log(jnp.where(v < 0, 1 / (1 - v), v + 1))

    assert np.isnan(jax.grad(plain)(1.0))
    rows = jnp.asarray(np.stack([VALUES, VALUES[::-1], np.ones(12), np.zeros(12)]), jnp.float32)
    for label in range(12):
        labels = jnp.full(4, label)
        value, gradient = jax.value_and_grad(
            lambda v, labels=labels: stablemax_cross_entropy(v, labels).sum()
        )(rows)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_stablemax_is_the_published_formula() -> None:
    v = np.random.default_rng(0).normal(size=(50, 11)) * 3
    labels = np.random.default_rng(1).integers(0, 11, 50)
    scores = np.where(v >= 0, v + 1, 1 / (1 - np.minimum(v, 0)))
    want = -np.log(scores[np.arange(50), labels] / scores.sum(-1))
    got = stablemax_cross_entropy(jnp.asarray(v, jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_bfloat16_keeps_logits_in_float32() -> None:
    model = TRM(replace(TINY, dtype="bfloat16"), jax.random.key(0))
    latents, logits, halt = model(INPUTS, IDS, some_latents(model.config))
    assert latents.y is not None
    names = [x.dtype.name for x in (latents.y, latents.z, logits, halt)]
    assert names == ["bfloat16", "bfloat16", "float32", "float32"]
    exact = TRM(TINY, jax.random.key(0))(INPUTS, IDS, some_latents(TINY))[1]
    assert 0 < float(jnp.abs(logits - exact).max()) < 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "n_layers=0"),
        ({"n_latent_steps": 0}, 'n_latent_steps=0 .*latents="one"'),
        ({"latents": "one", "n_latent_steps": -1}, "n_latent_steps=-1"),
        ({"n_prefix": 0}, "n_prefix >= 1"),
        ({"n_puzzle_ids": -1}, "n_puzzle_ids=-1"),
        ({"n_puzzle_ids": 0, "n_prefix": -1}, "n_prefix=-1"),
        ({"mixer": "attention", "n_heads": 3}, "multiple of 6"),
    ],
)
def test_configurations_that_cannot_be(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(TINY, **changes)
