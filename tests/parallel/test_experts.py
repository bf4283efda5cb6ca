"""Rows travel to the devices of their experts and back, however unevenly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.parallel import MeshConfig, make_mesh, shardings
from slm_jax.parallel.experts import expert_axes, to_experts
from tests.nn.tiny import tiny_config

PARTS, EXPERTS, ROWS = 4, 8, 6
MESH = make_mesh(MeshConfig(data=2, fsdp=1, expert=PARTS))
# Rows a device has for every expert; what is left of ROWS stays at home.
SIZES = {
    "even": np.tile([1, 0, 1, 1, 0, 1, 1, 1], (PARTS, 1)),
    "all to one expert": np.tile([0, 0, 0, 6, 0, 0, 0, 0], (PARTS, 1)),
    "some devices send nothing": np.array(
        [[0] * 8, [0, 2, 0, 0, 0, 0, 1, 3], [0] * 8, [1, 1, 0, 0, 0, 0, 0, 2]]
    ),
}


@pytest.mark.parametrize("name", list(SIZES))
def test_every_row_meets_its_expert_and_comes_back(name: str) -> None:
    sizes = SIZES[name].astype(np.int32)
    rows = np.random.default_rng(0).normal(size=(PARTS, ROWS, 3)).astype(np.float32)
    factors = np.arange(1, EXPERTS + 1, dtype=np.float32)

    def run(rows: jax.Array, sizes: jax.Array, factors: jax.Array) -> jax.Array:
        here, groups, back = to_experts(rows[0], sizes[0], ("expert",), most=ROWS, ragged=False)
        assert here.shape == (PARTS * ROWS, 3)
        expert = jnp.searchsorted(jnp.cumsum(groups), jnp.arange(len(here)), side="right")
        return back(here * factors.at[expert].get(mode="fill", fill_value=0)[:, None])[None]

    by_expert = P("expert")
    with jax.set_mesh(MESH):
        args = [jax.reshard(jnp.asarray(a), by_expert) for a in (rows, sizes, factors)]
        got, back = jax.vjp(
            jax.jit(jax.shard_map(run, in_specs=(by_expert,) * 3, out_specs=by_expert)), *args
        )
        gradient = back(jnp.ones_like(got))[0]
    want = np.zeros((PARTS, ROWS), np.float32)
    for part in range(PARTS):
        scale = np.repeat(factors, sizes[part])
        want[part, : len(scale)] = scale
    np.testing.assert_allclose(got, rows * want[..., None], rtol=1e-6)
    np.testing.assert_allclose(gradient, np.repeat(want[..., None], 3, -1), rtol=1e-6)


def test_experts_stay_where_rows_are_not_split_over_their_axis() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))):
        batch = ("data", "fsdp", "expert")
        assert expert_axes((batch, None), split_width=True).experts == ("expert",)
        assert expert_axes((batch, None), split_width=True).width == ("tensor",)
        assert expert_axes((batch, None), split_width=False).width == ()
        assert expert_axes((None, None), split_width=True).experts == ()


def test_experts_that_do_not_divide_are_refused() -> None:
    mesh = make_mesh(MeshConfig(expert=8))
    model = jax.eval_shape(lambda key: LM(tiny_config("moe"), key), jax.random.key(0))
    message = r"channel.down.w: axis 'expert' of size 4 is not a multiple of mesh axes expert=8"
    with pytest.raises(UserError, match=message):
        shardings(model, mesh)
