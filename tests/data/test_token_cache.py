import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from slm_jax.data import ByteTokenizer, Corpus, DataConfig, open_data
from slm_jax.data.cache import token_streams
from slm_jax.data.sources import open_source
from slm_jax.errors import UserError


class CountingTokenizer(ByteTokenizer):
    calls = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        CountingTokenizer.calls += 1
        return super().encode_batch(texts)


class WideTokenizer(ByteTokenizer):
    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "vocab_size", 70_000)
        object.__setattr__(self, "eos_id", 69_999)

    @property
    def fingerprint(self) -> str:
        return "wide"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("some text for the cache, long enough to be cut in two")
    return path


def only_folder(cache: Path) -> Path:
    (folder,) = [path for path in (cache / "tokens").iterdir() if path.is_dir()]
    return folder


def same(one: Corpus, other: Corpus) -> bool:
    pairs = zip(one.train + one.valid, other.train + other.valid, strict=True)
    return all(
        np.array_equal(a.tokens, b.tokens) and np.array_equal(a.starts, b.starts) for a, b in pairs
    )


def test_second_opening_reads_the_cache(source: Path, own_cache: Path) -> None:
    cfg = DataConfig(source=str(source))
    first = open_data(cfg)
    files = sorted(only_folder(own_cache).iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    second = open_data(cfg)
    assert [file.stat().st_mtime_ns for file in files] == times
    assert same(first, second)
    assert first.fingerprint == second.fingerprint
    assert isinstance(second.train[0].tokens.base, np.memmap)
    assert not second.train[0].tokens.flags.writeable


def test_key_is_the_content_not_the_date(source: Path, own_cache: Path, tmp_path: Path) -> None:
    cfg = DataConfig(source=str(source))
    first = open_data(cfg)
    before = source.stat()
    text = source.read_text()
    source.write_text(text.replace("some", "SOME"))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size and date
    changed = open_data(cfg)
    assert not same(first, changed)
    copy = tmp_path / "copy.txt"
    copy.write_text(text)
    assert same(open_data(DataConfig(source=str(copy))), first)
    assert len([path for path in (own_cache / "tokens").iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "meta value", "meta cut"])
def test_corrupt_cache_is_made_again(damage: str, source: Path, own_cache: Path) -> None:
    cfg = DataConfig(source=str(source))
    first = open_data(cfg)
    expected = [stream.tokens.copy() for stream in first.train + first.valid]
    folder = only_folder(own_cache)
    tokens, meta = folder / "train.tokens", folder / "meta.json"
    if damage == "flip":
        data = bytearray(tokens.read_bytes())
        data[10] ^= 1
        tokens.write_bytes(data)
    elif damage == "cut":
        os.truncate(folder / "valid.starts", 0)
    elif damage == "remove":
        tokens.unlink()
    elif damage == "meta value":
        meta.write_text(meta.read_text().replace('"text_bytes": ', '"text_bytes": 1'))
    else:
        meta.write_text(meta.read_text()[:30])
    with pytest.warns(UserWarning, match="CORRUPT TOKEN CACHE"):
        again = open_data(cfg)
    for stream, tokens_then in zip(again.train + again.valid, expected, strict=True):
        np.testing.assert_array_equal(stream.tokens, tokens_then)
    assert again.fingerprint == first.fingerprint
    assert open_data(cfg).fingerprint == first.fingerprint  # no warning: it is whole


def test_a_killed_build_leaves_nothing_in_the_way(source: Path, own_cache: Path) -> None:
    cfg = DataConfig(source=str(source))
    first = open_data(cfg)
    folder = only_folder(own_cache)
    partial = folder.with_name(folder.name + ".partial")
    folder.rename(partial)
    (partial / "train.tokens").unlink()  # `first` keeps the old file open
    (partial / "train.tokens").write_bytes(b"half")
    assert same(open_data(cfg), first)
    assert not partial.exists()


def test_many_at_once_tokenise_once(source: Path, own_cache: Path) -> None:
    CountingTokenizer.calls = 0

    def work(_: int) -> int:
        opened = open_source(str(source), "text")
        streams = token_streams(
            opened, CountingTokenizer(), valid_fraction=0.1, cache_dir=str(own_cache)
        )
        return len(streams["train"].tokens)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(work, range(8)))) == 1
    assert CountingTokenizer.calls == 1


def test_large_vocabularies_take_32_bits(source: Path) -> None:
    opened = open_source(str(source), "text")
    streams = token_streams(opened, WideTokenizer(), valid_fraction=0.1, cache_dir=None)
    assert streams["train"].tokens.dtype == np.uint32
    assert streams["train"].tokens[-1] == 69_999


def test_cache_dir_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_dir=.*cannot be written.*SLM_JAX_CACHE"):
        open_data(DataConfig(source=str(source), cache_dir=str(tmp_path / "file")))
