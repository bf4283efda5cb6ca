"""Whatever befalls the files of a run: it is noticed, and the newest whole checkpoint is used.

A fault may hit bytes that hold nothing. Then what is restored must be what was saved, bit by bit.
"""

import contextlib
import logging
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.train.checkpoint import Checkpoints
from slm_jax.train.checksum import checksums

STEPS = (10, 20, 30)


def state(step: int) -> dict[str, Any]:
    """Arrays of several dtypes; small enough for a restore to take milliseconds."""
    rng = np.random.default_rng(step)
    return {
        "step": jnp.array(step, jnp.int32),
        "model": {
            "w": jnp.asarray(rng.normal(size=(24, 16)), jnp.float32),
            "b": jnp.asarray(rng.normal(size=16), jnp.bfloat16),
        },
        "counts": jnp.asarray(rng.integers(0, 200, 32), jnp.uint8),
    }


def abstract() -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )


def position(step: int) -> dict[str, int]:
    return {"next_index": 7 * step}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state(step), position(step), {"name": "run"})
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoints", symlinks=True))


def is_saved(restored: Any) -> bool:
    """Whether this is a checkpoint as it was saved: arrays, position and facts."""
    step, got, data, facts = restored
    same = jax.tree.map(
        lambda a, b: (
            (a.dtype, a.shape, np.asarray(a).tobytes())
            == (b.dtype, b.shape, np.asarray(b).tobytes())
        ),
        got,
        state(step),
    )
    return all(jax.tree.leaves(same)) and data == position(step) and facts == {"name": "run"}


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


Fault = Callable[[Path, random.Random], None]


def flip(step: Path, rng: random.Random) -> None:
    """One bit, in any kind of file alike, however small."""
    path = rng.choice([p for p in files(step) if p.stat().st_size])
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_data(step: Path, rng: random.Random) -> None:
    path = max(files(step), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(step: Path, rng: random.Random) -> None:
    path = rng.choice([p for p in files(step) if p.stat().st_size])
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def zero(step: Path, rng: random.Random) -> None:
    """A block that the disk lost."""
    path = rng.choice([p for p in files(step) if p.stat().st_size])
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    content[at : at + 64] = bytes(len(content[at : at + 64]))
    path.write_bytes(content)


def remove_file(step: Path, rng: random.Random) -> None:
    rng.choice(files(step)).unlink()


def remove_folder(step: Path, rng: random.Random) -> None:
    shutil.rmtree(rng.choice(sorted(p for p in step.rglob("*") if p.is_dir())))


def half_copied(step: Path, rng: random.Random) -> None:
    """What an interrupted copy of a checkpoint leaves."""
    found = files(step)
    for path in rng.sample(found, rng.randrange(1, len(found))):
        path.unlink()


def swap_files(step: Path, rng: random.Random) -> None:
    a, b = rng.sample(files(step), 2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def older_file(step: Path, rng: random.Random) -> None:
    """A file of another checkpoint, restored from a backup."""
    path = rng.choice(files(step))
    others = [p for p in files(step.with_name("20")) if p.name == path.name]
    if others:
        shutil.copy(rng.choice(others), path)


FAULTS: dict[str, Fault] = {
    f.__name__: f
    for f in (
        flip,
        flip_data,
        truncate,
        zero,
        remove_file,
        remove_folder,
        half_copied,
        swap_files,
        older_file,
    )
}


def check(folder: Path, caplog: pytest.LogCaptureFixture) -> bool:
    """Restores; asserts that what comes is whole or refused. Whether damage was noticed."""
    before = {p: p.read_bytes() for p in files(folder)}
    caplog.clear()
    with Checkpoints(folder, keep=3) as checkpoints, caplog.at_level(logging.WARNING):
        got = checkpoints.restore(abstract())
        assert is_saved(got)
        noticed = got.step != STEPS[-1]
        if noticed:
            assert got.step == 20
            aside = folder.with_name("checkpoints-damaged") / "30"
            assert f"checkpoint={folder / '30'} is damaged (" in caplog.text
            assert f"is now {aside}: going on from step 20" in caplog.text
            assert not (folder / "30").exists()
        # Nothing is lost: neither what is whole nor what is damaged.
        for path, content in before.items():
            moved = folder.with_name("checkpoints-damaged") / path.relative_to(folder)
            assert (path if path.exists() else moved).read_bytes() == content
        # The run comes to this step again, and can save it.
        if noticed:
            checkpoints.save(30, state(30), position(30), {"name": "run"})
    with Checkpoints(folder, read_only=True) as checkpoints:
        again = checkpoints.restore(abstract())
    assert again.step == 30
    assert is_saved(again)
    return noticed


@pytest.mark.parametrize("name", FAULTS)
def test_damage_is_noticed_or_harmless(
    name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(name)
    for n in range(4):
        case = Path(shutil.copytree(folder, folder.with_name(f"case{n}") / "checkpoints"))
        FAULTS[name](case / "30", rng)
        check(case, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_much_damage_is_noticed_or_harmless(
    name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(f"much {name}")
    noticed = 0
    for n in range(30):
        case = Path(shutil.copytree(folder, folder.with_name(f"case{n}") / "checkpoints"))
        FAULTS[name](case / "30", rng)
        noticed += check(case, caplog)
    print(f"{name}: {noticed} of 30 noticed, the rest harmless")
    assert noticed > 0


def stray_folder(folder: Path) -> None:
    (folder / "40").mkdir()
    (folder / "40" / "thesis.tex").write_text("years")


def stray_file(folder: Path) -> None:
    (folder / "40").write_text("a note")


def link_outside(folder: Path) -> None:
    (folder / "40").symlink_to(folder.parent)


def link_to_a_step(folder: Path) -> None:
    (folder / "40").symlink_to(folder / "20")


def dangling_link(folder: Path) -> None:
    (folder / "40").symlink_to(folder / "nowhere")


def copy_of_another_step(folder: Path) -> None:
    shutil.copytree(folder / "20", folder / "40")


def begun_copy(folder: Path) -> None:
    (folder / "40" / "state").mkdir(parents=True)
    shutil.copy(folder / "30" / "_CHECKPOINT_METADATA", folder / "40")


STRAY = (
    stray_folder,
    stray_file,
    link_outside,
    link_to_a_step,
    dangling_link,
    copy_of_another_step,
    begun_copy,
)


@pytest.mark.parametrize("stray", STRAY, ids=lambda f: f.__name__)
def test_what_only_has_the_name_of_a_step_is_put_aside(
    stray: Callable[[Path], None], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stray(folder)
    with Checkpoints(folder, keep=3, read_only=True) as checkpoints:
        assert is_saved(checkpoints.restore(abstract()))
    assert f"checkpoint={folder / '40'} is damaged" in caplog.text
    assert "is left out" in caplog.text
    assert os.path.lexists(folder / "40")
    with Checkpoints(folder, keep=3) as checkpoints:
        got = checkpoints.restore(abstract())
        assert got.step == 30
        assert is_saved(got)
        checkpoints.save(40, state(40), position(40), {"name": "run"})
    aside = folder.with_name("checkpoints-damaged") / "40"
    assert os.path.lexists(aside)
    assert aside.is_symlink() == ("link" in stray.__name__)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(abstract()).step == 40
    for step in (20, 30):  # 10 is one too many now
        with Checkpoints(folder, read_only=True) as checkpoints:
            assert is_saved(checkpoints.restore(abstract(), step))


def test_the_third_newest_is_used_if_two_are_damaged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(0)
    shutil.rmtree(folder / "30" / "state")
    truncate_largest(folder / "20", rng)
    with Checkpoints(folder, keep=3) as checkpoints:
        got = checkpoints.restore(abstract())
    assert got.step == 10
    assert is_saved(got)
    for step in (20, 30):
        assert f"{folder / str(step)} is damaged" in caplog.text


def truncate_largest(step: Path, rng: random.Random) -> None:
    path = max(files(step), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_if_none_is_whole_nothing_is_touched_and_all_are_named(folder: Path) -> None:
    for step in STEPS:
        shutil.rmtree(folder / str(step) / "state")
    before = files(folder.parent)
    with Checkpoints(folder, keep=3) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(abstract())
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"checkpoints={folder}: none is whole: 30 (")
    assert "; 20 (" in message
    assert "; 10 (" in message
    assert files(folder.parent) == before


def test_a_damaged_step_that_is_asked_for_is_refused(folder: Path) -> None:
    truncate_largest(folder / "20", random.Random(0))
    with (
        Checkpoints(folder, read_only=True) as checkpoints,
        pytest.raises(UserError, match=r"none is whole: 20 \("),
    ):
        checkpoints.restore(abstract(), 20)


def test_every_swap_and_shift_changes_the_checksum() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.uint8, np.int32):
        x = rng.integers(0, 3, (6, 5)).astype(dtype)  # few values: plain sums would not move
        seen = {checksums({"x": jnp.asarray(x)})["x"]}
        for _ in range(50):
            y = x.copy().reshape(-1)
            i, j = rng.choice(30, 2, replace=False)
            y[i], y[j] = y[j], y[i]
            if (y != x.reshape(-1)).any():
                assert checksums({"x": jnp.asarray(y.reshape(x.shape))})["x"] not in seen
        for other in (np.roll(x, 1), np.roll(x, 1, 0), x[::-1], x * 0):
            assert checksums({"x": jnp.asarray(other)})["x"] not in seen


def full_disk(folder: Path) -> Any:
    """No file may become longer than a few bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_folder(folder: Path) -> Any:
    """The place where the step is to be written has become something else."""
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("")

    def undo() -> None:
        folder.unlink()
        folder.with_name("elsewhere").rename(folder)

    return undo


def save_and_wait(folder: Path, keep: int = 2) -> None:
    with Checkpoints(folder, keep=keep) as checkpoints:
        checkpoints.save(40, state(40), position(40), {"name": "run"})


@pytest.mark.parametrize("fault", [full_disk, no_folder])
@pytest.mark.parametrize("keep", [1, 3])
def test_a_save_that_fails_is_told_and_costs_nothing_good(
    fault: Callable[[Path], Any], keep: int, folder: Path
) -> None:
    """A run that ends well must not seem saved; nor must a good checkpoint go before its time."""
    checkpoints = Checkpoints(folder, keep=keep)
    undo = fault(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(undo)
        stack.enter_context(pytest.raises(UserError, match=r"/40 could not be written \(.*room"))
        stack.enter_context(checkpoints)
        checkpoints.save(40, state(40), position(40), {"name": "run"})
    with Checkpoints(folder, keep=keep) as checkpoints:
        got = checkpoints.restore(abstract())
        assert got.step == 30
        assert is_saved(got)
    save_and_wait(folder, keep)
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert is_saved(checkpoints.restore(abstract(), 40))


def test_a_failure_in_the_background_is_noticed_by_polling(folder: Path) -> None:
    checkpoints = Checkpoints(folder)

    def poll() -> None:
        for _ in range(600):
            time.sleep(0.05)
            checkpoints.poll()

    undo = full_disk(folder)
    try:
        checkpoints.save(40, state(40), position(40), {})
        with pytest.raises(UserError, match="40 could not be written"):
            poll()
    finally:
        undo()
        checkpoints.__exit__(None, None, None)


def test_another_error_comes_before_that_of_a_failed_save(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def diverge() -> None:
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(40, state(40), position(40), {})
            raise KeyError

    undo = full_disk(folder)
    try:
        with pytest.raises(KeyError):
            diverge()
    finally:
        undo()
    assert "40 could not be written" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoints=.*file/c cannot be opened"):
        Checkpoints(tmp_path / "file" / "c")
