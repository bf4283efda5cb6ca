from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from slm_jax.train.compile_cache import keep_programs


@pytest.fixture(autouse=True)
def own_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("SLM_JAX_CACHE", str(tmp_path / "cache"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cuda"])
def test_accelerators_keep_programs_for_this_user_alone(platform: str, tmp_path: Path) -> None:
    keep_programs(platform)
    folder = tmp_path / "cache" / "programs"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_cpu_keeps_none(tmp_path: Path) -> None:
    keep_programs("cpu")
    assert jax.config.jax_compilation_cache_dir is None
    assert not (tmp_path / "cache").exists()


def test_a_place_that_was_chosen_stays(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    keep_programs("tpu")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
