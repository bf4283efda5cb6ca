import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from slm_jax.errors import UserError
from slm_jax.parallel import MESH_AXES, MeshConfig, batch, local_rows, make_mesh, shard_batch


def test_one_process_reads_all_rows() -> None:
    np.testing.assert_array_equal(local_rows(make_mesh(MeshConfig(fsdp=8)), 16), np.arange(16))
    tensor = make_mesh(MeshConfig(fsdp=1, tensor=8))
    np.testing.assert_array_equal(local_rows(tensor, 3), np.arange(3))


def test_process_reads_the_rows_of_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_parts", lambda sharding: (4, (1, 3)))
    rows = local_rows(make_mesh(MeshConfig(fsdp=8)), 12)
    np.testing.assert_array_equal(rows, [3, 4, 5, 9, 10, 11])


def test_rows_that_the_mesh_cannot_split() -> None:
    with pytest.raises(UserError, match=r"batch_size=12 is not a multiple of the 8 parts .* 16"):
        local_rows(make_mesh(MeshConfig(fsdp=8)), 12)


def test_rows_keep_their_order_on_devices_in_any_order() -> None:
    order = np.random.default_rng(0).permutation(8).reshape(2, 2, 1, 1, 2)
    explicit = (jax.sharding.AxisType.Explicit,) * len(MESH_AXES)
    mesh = Mesh(np.array(jax.devices())[order], MESH_AXES, axis_types=explicit)
    rows = np.arange(8 * 3).reshape(8, 3)
    array = shard_batch({"rows": rows}, mesh)["rows"]
    np.testing.assert_array_equal(array, rows)
    assert {s.data.shape for s in array.addressable_shards} == {(2, 3)}
