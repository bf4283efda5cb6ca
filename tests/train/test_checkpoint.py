from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slm_jax.errors import UserError
from slm_jax.parallel import MeshConfig, make_mesh
from slm_jax.train.checkpoint import Checkpoints, named_arrays
from slm_jax.train.checksum import checksums


def state(value: float = 1.0) -> dict[str, Any]:
    return {
        "w": jnp.full((3, 4), value, jnp.float32),
        "count": jnp.zeros((), jnp.int32),
        "none": None,
    }


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def saved(folder: Path, *steps: int, keep: int = 2) -> Path:
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"next_index": step}, {"name": "test"})
    return folder


def committed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_newest_is_restored_with_its_data_position(tmp_path: Path) -> None:
    with Checkpoints(saved(tmp_path / "c", 3, 7)) as checkpoints:
        step, got, data, facts = checkpoints.restore(abstract(state()))
    assert (step, data, facts) == (7, {"next_index": 7}, {"name": "test"})
    assert got["none"] is None
    np.testing.assert_array_equal(got["w"], np.full((3, 4), 7.0, np.float32))
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(abstract(state()), 3).data == {"next_index": 3}


def test_a_part_is_restored_by_name(tmp_path: Path) -> None:
    with Checkpoints(saved(tmp_path / "c", 3)) as checkpoints:
        got = checkpoints.restore({"w": abstract(state())["w"]}).state
    assert got.keys() == {"w"}


def test_saving_does_not_see_later_changes(tmp_path: Path) -> None:
    """`save` returns before the write is done; the state may be donated at once."""
    donate = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    large = {"w": jnp.zeros((1000, 1000))}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, large, {}, {})
        for _ in range(20):
            large = donate(large)
    with Checkpoints(tmp_path / "c") as checkpoints:
        got = checkpoints.restore(abstract(large)).state["w"]
    np.testing.assert_array_equal(got, np.zeros((1000, 1000), np.float32))
    assert float(large["w"][0, 0]) == 20.0


def test_keeps_the_newest(tmp_path: Path) -> None:
    assert committed(saved(tmp_path / "c", 1, 2, 3, 4, keep=3)) == ["2", "3", "4"]


def test_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert committed(saved(Path("c"), 1)) == ["1"]


def test_nothing_to_restore(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(UserError, match="there is none"):
            checkpoints.restore(abstract(state()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"w": jnp.zeros((4, 3))}, ["w is float32[3, 4]", "wants float32[4, 3]"]),
        ({"w": jnp.zeros((3, 4), jnp.bfloat16)}, ["w is float32[3, 4]", "bfloat16[3, 4]"]),
        ({"count": jnp.zeros((), jnp.float32)}, ["count is int32[]", "float32[]"]),
        ({"extra": jnp.zeros(2)}, ["extra is not in the checkpoint"]),
    ],
)
def test_other_arrays_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], says: list[str]
) -> None:
    with (
        Checkpoints(saved(tmp_path / "c", 1)) as checkpoints,
        pytest.raises(UserError) as error,
    ):
        checkpoints.restore(abstract(state() | change))
    assert "\n" not in str(error.value)
    for part in says:
        assert part in str(error.value)


def leave_uncommitted(folder: Path) -> Path:
    """What a process that was killed while it wrote leaves, or one that is writing now."""
    partial = folder / "9.orbax-checkpoint-tmp"
    partial.mkdir()
    (partial / "_CHECKPOINT_METADATA").write_text("{")
    return partial


def test_uncommitted_checkpoint_is_cleaned_away_by_the_run_alone(tmp_path: Path) -> None:
    partial = leave_uncommitted(saved(tmp_path / "c", 3))
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(state())).step == 3
    assert partial.exists()
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(abstract(state())).step == 3
    assert not partial.exists()


@pytest.mark.parametrize("lost", [["_CHECKPOINT_METADATA", "commit_success.txt"], ["state"]])
def test_half_deleted_old_checkpoint_does_no_harm(tmp_path: Path, lost: list[str]) -> None:
    """Old checkpoints are deleted file by file: a kill may leave some."""
    old = saved(tmp_path / "c", 1, 2) / "1"
    for name in lost:
        (old / name).rename(tmp_path / name)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(abstract(state())).step == 2
    assert committed(saved(tmp_path / "c", 3, 4)) == ["3", "4"]


def on_devices(n: int) -> Any:
    """Shardings of `w` and `count` over so many devices."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=n), jax.devices()[:n])
    return {
        "w": NamedSharding(mesh, P("fsdp", None)),
        "b": NamedSharding(mesh, P(None, "fsdp")),
        "count": NamedSharding(mesh, P()),
    }


def test_any_number_of_devices_restores_the_same_bits(tmp_path: Path) -> None:
    """From 8 to 4 to 2 to 1 to 8, each reading what the one before wrote."""
    rng = np.random.default_rng(0)
    host = {
        "w": rng.normal(size=(16, 24)).astype(np.float32),
        "b": rng.integers(0, 99, (3, 8)).astype(np.int8),
        "count": np.int32(7),
    }
    now = jax.tree.map(jax.device_put, host, on_devices(8))
    digest = checksums(now)
    for n, step in ((4, 1), (2, 2), (1, 3), (8, 4)):
        wanted = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), now, on_devices(n)
        )
        with Checkpoints(tmp_path / "c") as checkpoints:
            checkpoints.save(step, now, {}, {})
            checkpoints.wait()
            now = checkpoints.restore(wanted).state
        assert all(len(x.sharding.device_set) == n for x in now.values())
        assert checksums(now) == digest
    for name, array in host.items():
        np.testing.assert_array_equal(now[name], array)


def test_every_so_many_steps_one_stays(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "c", keep=1, keep_every=4) as checkpoints:
        for step in range(2, 12, 2):
            checkpoints.save(step, state(step), {}, {})
    assert sorted(map(int, committed(tmp_path / "c"))) == [4, 8, 10]


def test_names_are_paths() -> None:
    assert list(named_arrays({"a": [jnp.zeros(1), {"b": jnp.zeros(2)}]})) == ["a.0", "a.1.b"]
