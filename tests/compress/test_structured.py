"""Units taken out: the smaller model computes what the whole one does with these units at zero."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.compress import prune_units
from slm_jax.compress.calibrate import block_errors
from slm_jax.compress.structured import smaller, units_of
from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.models.recursion import RecursionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.module import count_parameters, is_variable, named_leaves
from tests.nn.tiny import GQA, MAMBA, SWIGLU, WINDOW, tiny_lm, tokens

BATCHES = [{"tokens": tokens(2, 16, seed)} for seed in (1, 2)]

# By model: the leaf that tells units apart and its axis of units, batch axes before (layers,
# experts), and what is set to zero with its axis and the entries of a unit.
UNITS = {
    "dense": [
        ("mixer.k.w", 2, 1, [("mixer.out.w", 1, 2)]),
        ("channel.up.w", 2, 1, [("channel.down.w", 1, 1)]),
    ],
    "moe": [
        ("mixer.k.w", 2, 1, [("mixer.out.w", 1, 2)]),
        ("channel.up.w", 3, 2, [("channel.down.w", 2, 1)]),
    ],
    # A channel with no input: what `select` reads of it and what the scan makes of it is zero.
    "mamba": [("mixer.in_z.w", 2, 1, [("mixer.in_x.w", 2, 1), ("mixer.conv_b", 1, 1)])],
}


def logits(model: LM) -> np.ndarray:
    return np.asarray(jax.jit(lambda m, ids: m(ids)[0])(model, tokens(2, 12)))


def array(model: LM, name: str) -> np.ndarray:
    return np.array(named_leaves(model)[f"blocks.0.{name}"].get_value())


def still_there(whole: np.ndarray, part: np.ndarray, axis: int, n_batch: int) -> np.ndarray:
    """Which units of `whole` are in `part` too, by their weights: `[*batch, units]` bool."""
    a, b = (np.moveaxis(v, axis, n_batch) for v in (whole, part))
    found = np.zeros(a.shape[: n_batch + 1], bool)
    for at in np.ndindex(a.shape[:n_batch]):
        rows = [row.tobytes() for row in b[at]]
        order = [rows.index(row.tobytes()) for row in a[at] if row.tobytes() in rows]
        assert order == list(range(len(rows)))  # in the order they had
        found[at] = [row.tobytes() in rows for row in a[at]]
    return found


def silenced(name: str, model: LM, small: LM) -> LM:
    """The whole model with zeros for every unit that the smaller one has not."""
    zeroed = {}
    for source, axis, n_batch, targets in UNITS[name]:
        stays = still_there(array(model, source), array(small, source), axis, n_batch)
        for target, where, copies in targets:
            a = array(model, target)
            mask = np.repeat(stays, copies, axis=-1)
            ones = (1,) * (where - n_batch), (1,) * (a.ndim - where - 1)
            shape = (*mask.shape[:-1], *ones[0], mask.shape[-1], *ones[1])
            zeroed[f"blocks.0.{target}"] = a * mask.reshape(shape)

    def fill(path, leaf):
        found = zeroed.get(jax.tree_util.keystr(path, simple=True, separator="."))
        return leaf if found is None else leaf.replace(jnp.asarray(found))

    return jax.tree_util.tree_map_with_path(fill, model, is_leaf=is_variable)


@pytest.mark.parametrize(
    "name", ["dense", *(pytest.param(n, marks=pytest.mark.slow) for n in ("moe", "mamba"))]
)
def test_a_smaller_model_is_the_whole_one_with_these_units_at_zero(name: str) -> None:
    model = tiny_lm(name, n_layers=2)
    small, lost = prune_units(model, BATCHES, 0.5)
    layer = small.config.pattern[0]
    sizes = [u.count for u in units_of(layer)]
    assert sizes == {"dense": [12], "moe": [4], "mamba": [12]}[name]  # a single group is no unit
    np.testing.assert_allclose(logits(small), logits(silenced(name, model, small)), atol=2e-5)
    assert np.abs(logits(small) - logits(model)).max() > 0.1
    assert list(lost) == ["0", "1"]
    assert all(0 < share < 0.5 for share in lost.values())  # the weaker half
    fresh = jax.eval_shape(lambda key: LM(small.config, key), jax.random.key(0))
    assert jax.tree.structure(fresh) == jax.tree.structure(small)
    assert [a.shape for a in jax.tree.leaves(fresh)] == [a.shape for a in jax.tree.leaves(small)]
    assert count_parameters(small) < count_parameters(model)


def test_the_units_that_stay_are_those_of_the_largest_scores() -> None:
    model = tiny_lm("dense", n_layers=1)
    small, _ = prune_units(model, BATCHES, 0.7)
    stays = still_there(array(model, "channel.up.w"), array(small, "channel.up.w"), 2, 1)[0]
    # The layer in NumPy, up to what `down` reads.
    block = jax.tree.map(lambda a: a[0], model.blocks[0])
    squares = 0.0
    for batch in BATCHES:
        x = model.embed(batch["tokens"], jnp.float32)
        at = jnp.arange(x.shape[1])[None]
        h = x + block.mixer(block.mixer_norm(x, jnp.float32), positions=at, segments=None)[0]
        h = np.asarray(block.channel_norm(h, jnp.float32))
        gate, up = (h @ np.asarray(m.w[...]) for m in (block.channel.gate, block.channel.up))
        squares = squares + np.sum((gate / (1 + np.exp(-gate)) * up) ** 2, axis=(0, 1))
    scores = squares * np.sum(np.asarray(block.channel.down.w[...]) ** 2, axis=1)
    assert set(np.flatnonzero(stays)) == set(np.argsort(-scores)[:8])  # 16 of 24 go


@pytest.mark.slow
def test_layers_of_a_tail_are_cut_too_and_errors_are_by_layer() -> None:
    model = tiny_lm("hybrid")  # three layers of a period of two
    small, _ = prune_units(model, BATCHES, 0.25)
    mamba, attention = small.config.pattern
    assert (mamba.mixer.d_inner, mamba.channel.d_ff, attention.channel.d_ff) == (18, 18, 6)
    assert attention.mixer == WINDOW  # of one group nothing can be taken
    errors = block_errors(model, small, BATCHES)
    assert list(errors) == ["0", "1", "2"]
    assert all(0 < e < 1 for e in errors.values())
    same, _ = prune_units(model, BATCHES, 0.0)
    assert all(e == 0 for e in block_errors(model, same, BATCHES).values())


def test_one_unit_of_each_kind_remains() -> None:
    small = smaller(LayerConfig(GQA, SWIGLU), 0.99)
    assert (small.mixer.n_kv_heads, small.mixer.n_heads, small.channel.d_ff) == (1, 2, 1)
    assert smaller(LayerConfig(MAMBA, None), 0.99).mixer.d_inner == 1
    assert smaller(LayerConfig(GQA, SWIGLU), 0.0) == LayerConfig(GQA, SWIGLU)
    # One of two groups of heads is more than a third of them.
    assert smaller(LayerConfig(GQA, SWIGLU), 1 / 3) == LayerConfig(GQA, replace(SWIGLU, d_ff=16))


def test_what_cannot_be_is_refused() -> None:
    model = tiny_lm("dense", n_layers=1)
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"sparsity=.* must be at least 0 and below 1"):
            prune_units(model, BATCHES, share)
    with pytest.raises(UserError, match="there is no batch"):
        prune_units(model, [], 0.5)
    bare = tiny_lm("dense", n_layers=1, pattern=(LayerConfig(WINDOW, None),))
    with pytest.raises(UserError, match=r"method=structured: .* no units"):
        prune_units(bare, BATCHES, 0.5)
    repeating = tiny_lm("dense", recursion=RecursionConfig(1, 1, repeats=2))
    with pytest.raises(UserError, match="recursion: layers that repeat"):
        prune_units(repeating, BATCHES, 0.5)
