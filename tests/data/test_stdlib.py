"""The standard library as a corpus: which files, in what order, and that runs can tell it apart."""

import sysconfig
from pathlib import Path

import pytest

from slm_jax.data import DataConfig, open_data
from slm_jax.data.sources import open_source
from slm_jax.data.stdlib import StdlibSource
from slm_jax.errors import UserError


def write(folder: Path, files: dict[str, bytes]) -> StdlibSource:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return StdlibSource(folder)


def texts(source: StdlibSource) -> list[str]:
    return [document.text for document in source.documents()]


FILES = {
    "os.py": b"import sys\n",
    "email/mime.py": "caf\u00e9 = 1\n".encode(),
    "re.py": b"pass\n",
    "empty.py": b"",
    "test/bad_coding.py": b"\xff\xfe not UTF-8",
    "site-packages/numpy.py": b"no",
    "lib/dist-packages/six.py": b"no",
    "__pycache__/os.py": b"no",
    "_sysconfigdata__linux.py": b"no",
    "notes.txt": b"no",
}


def test_which_files_and_in_what_order(tmp_path: Path) -> None:
    source = write(tmp_path / "a", FILES)
    assert sorted(texts(source)) == ["caf\u00e9 = 1\n", "import sys\n", "pass\n"]
    # The order and the hash follow from names and content, not from the folder or the clock.
    other = write(tmp_path / "b" / "deeper", dict(reversed(FILES.items())))
    assert texts(other) == texts(source)
    assert other.sha256() == source.sha256()
    (tmp_path / "b" / "deeper" / "re.py").write_bytes(b"pasS\n")
    assert other.sha256() != source.sha256()


def test_long_files_are_cut_before_a_character(tmp_path: Path) -> None:
    data = b"x" + "\u00e9".encode() * 200_000
    (text,) = texts(write(tmp_path, {"table.py": data}))
    assert text == "x" + "\u00e9" * 149_999
    assert len(text.encode()) == 299_999


def test_python_has_it(tmp_path: Path) -> None:
    source = open_source("python-stdlib", "text")
    assert isinstance(source, StdlibSource)
    first = next(iter(source.documents())).text
    assert first
    found = {len(text) for text in texts(source)}
    assert len((Path(sysconfig.get_path("stdlib")) / "abc.py").read_text()) in found
    data = DataConfig(source="python-stdlib", valid_fraction=0.04, cache_dir=str(tmp_path))
    corpus = open_data(data)
    n = corpus.n_train_tokens + corpus.n_valid_tokens
    assert n > 5_000_000
    documents = [len(s.starts) for s in (*corpus.train, *corpus.valid)]
    assert documents[1] == round(0.04 * sum(documents))
    assert corpus.bytes_per_token == 1.0
    assert open_data(data).fingerprint == corpus.fingerprint


def test_python_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python.zip"))
    with pytest.raises(UserError, match=r"source='python-stdlib': .*python.zip holds no .py files"):
        open_data(DataConfig(source="python-stdlib", cache_dir=str(tmp_path)))
