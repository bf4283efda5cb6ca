"""Rows split along their tokens: what parts tell each other, and what cannot be split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from slm_jax.errors import UserError
from slm_jax.models.loss import next_token_loss
from slm_jax.models.trm import TRM, TRMConfig, refine
from slm_jax.parallel import MeshConfig, make_mesh
from slm_jax.parallel.rules import split_rows
from slm_jax.parallel.sequence import carry_in, halo, on_parts, whole
from tests.nn.tiny import MAMBA, tiny_lm, tokens

MESH = make_mesh(MeshConfig(data=2, fsdp=1, sequence=4))


def split(x: np.ndarray) -> jax.Array:
    return jax.device_put(jnp.asarray(x), jax.sharding.NamedSharding(MESH, P(None, "sequence")))


def test_a_part_gets_the_tokens_before_it_and_can_get_all() -> None:
    x = np.arange(1, 2 * 12 + 1).reshape(2, 12)
    with jax.set_mesh(MESH):
        before = on_parts(lambda x: halo(x, 2, "sequence"), {"x": split(x)}, "x")
        rows = on_parts(lambda x: whole(x, "sequence"), {"x": split(x)}, "x")
    want = np.pad(x, ((0, 0), (2, 0)))[:, :12].reshape(2, 4, 3)[..., :2].reshape(2, 8)
    np.testing.assert_array_equal(before, want)
    np.testing.assert_array_equal(rows, np.tile(x, 4))


def test_states_join_to_those_of_the_whole_row() -> None:
    rng = np.random.default_rng(0)
    decay, added = rng.normal(size=(2, 2, 4)).astype(np.float32)
    before, state = np.zeros((2, 4), np.float32), np.zeros(2, np.float32)
    for part in range(4):
        before[:, part] = state
        state = decay[:, part] * state + added[:, part]

    def run(decay: jax.Array, added: jax.Array) -> jax.Array:
        return carry_in(decay, added, "sequence")

    with jax.set_mesh(MESH):
        got = on_parts(run, {"decay": split(decay), "added": split(added)}, "added")
    np.testing.assert_allclose(got, before, rtol=1e-6)


def test_rows_are_split_only_where_there_is_something_to_split_over() -> None:
    x = jnp.zeros((2, 6), jnp.int32)
    assert split_rows((x, None)) == (x, None)
    with jax.set_mesh(MESH):
        message = r"seq_len=6 is not a multiple of mesh axis sequence=4: choose 8, or split"
        with pytest.raises(UserError, match=message):
            split_rows(x)
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert jax.typeof(split_rows(x)).sharding.spec == P(None, None)


def test_what_a_split_row_cannot_do_is_said() -> None:
    batch = {k: jnp.asarray(tokens(2, 8)) for k in ("tokens", "targets")}
    batch["weights"] = jnp.ones((2, 8))
    trm = TRMConfig(8, 8, d_model=8, n_heads=1, n_layers=1, ff_multiple=8)
    cells = jnp.asarray(tokens(2, 8) % 8)
    with jax.set_mesh(MESH):
        message = r"chunk=2 is not a multiple of the 4 devices .* seq_len=8"
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda: next_token_loss(tiny_lm("dense"), batch, chunk=2))
        message = rf"d_conv={MAMBA.d_conv} reaches over more than the 2 tokens"
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda: next_token_loss(tiny_lm("mamba"), batch))
        with pytest.raises(UserError, match=r"mesh.sequence=4: a TRM works on whole rows"):
            jax.eval_shape(lambda k: refine(TRM(trm, k), cells, cells[:, 0], 1), jax.random.key(0))
