"""Mesh sizes and the table of logical axes."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.nn.module import named_leaves
from slm_jax.parallel import (
    MESH_AXES,
    MeshConfig,
    make_mesh,
    shard_batch,
    shardings,
    spec,
    use_rules,
)
from tests.nn.tiny import tiny_config


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1, 1, 1)),
        (MeshConfig(data=-1, fsdp=2), (4, 2, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 1, 1, 2)),
        (MeshConfig(fsdp=1, expert=-1), (1, 1, 8, 1, 1)),
    ],
)
def test_one_open_axis_takes_what_remains(config: MeshConfig, sizes: tuple[int, ...]) -> None:
    assert config.resolve(8) == sizes
    assert dict(make_mesh(config).shape) == dict(zip(MESH_AXES, sizes, strict=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), r"'fsdp': -1.* does not fill 8 device\(s\).*must be 8"),
        (MeshConfig(data=2, fsdp=2), r"'data': 2, 'fsdp': 2.* does not fill 8"),
        (MeshConfig(data=16, fsdp=1), "does not fill 8"),
        (MeshConfig(data=-1), r"mesh=\[-1, -1, 1, 1, 1\]: .*at most one of them is -1"),
        (MeshConfig(data=0), r"mesh=\[0, -1, 1, 1, 1\]: sizes are positive"),
        (MeshConfig(tensor=-2), "sizes are positive"),
    ],
)
def test_sizes_that_cannot_fill_the_devices(config: MeshConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.resolve(8)


def abstract(name: str, **changes) -> LM:
    config = tiny_config(name, **changes)
    return jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))


def test_weights_are_split_at_rest_and_layers_are_not() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    model = abstract("hybrid")
    init = jax.jit(lambda: jax.tree.map(lambda a: jax.numpy.zeros(a.shape), model),
                   out_shardings=shardings(model, mesh))  # fmt: skip
    for path, leaf in named_leaves(init()).items():
        axes, value = leaf.get_metadata()["axes"], leaf.get_value()
        shape = list(value.shape)
        if "embed" in axes:
            shape[len(shape) - len(axes) + axes.index("embed")] //= 4
        assert all(s.data.shape == tuple(shape) for s in value.addressable_shards), path
    split = [v.get_value().size for v in named_leaves(model).values()
             if "embed" in v.get_metadata()["axes"]]  # fmt: skip
    assert sum(split) > 0.7 * sum(leaf.size for leaf in jax.tree.leaves(model))


def test_indivisible_size_names_leaf_axis_and_size() -> None:
    mesh = make_mesh(MeshConfig(fsdp=8))
    message = r"blocks\.0\.\S+\.w: axis 'embed' of size 20 is not a multiple of mesh axes fsdp=8"
    with pytest.raises(UserError, match=message):
        shardings(abstract("dense", d_model=20), mesh)


def test_the_mesh_chooses_how_keys_travel() -> None:
    with MeshConfig(sequence=2, ring=True).rules():
        assert spec(("kv_seq",)) == P("sequence")
    with MeshConfig(sequence=2).rules():
        assert spec(("kv_seq",)) == P(None)


def test_rules_change_inside_the_block_only() -> None:
    axes = ("embed", "heads", None)
    assert spec(axes) == P("fsdp", "tensor", None)
    assert spec(axes, gathered=True) == P(None, "tensor", None)
    with use_rules(embed=None, heads=("tensor", "expert")):
        assert spec(axes) == P(None, ("tensor", "expert"), None)
    assert spec(axes) == P("fsdp", "tensor", None)
    with pytest.raises(UserError, match="logical axis 'head' is unknown: choose from batch, seq"):
        use_rules(head=None).__enter__()


def test_batch_is_split_over_data_fsdp_and_expert() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    rows = np.arange(16 * 3).reshape(16, 3)
    array = shard_batch({"tokens": rows}, mesh)["tokens"]
    np.testing.assert_array_equal(array, rows)
    assert {s.data.shape for s in array.addressable_shards} == {(2, 3)}
