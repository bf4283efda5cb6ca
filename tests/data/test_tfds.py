import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slm_jax.data import Corpus, DataConfig, open_data
from slm_jax.data.tfds import write_tfds
from slm_jax.errors import UserError

TEXTS = [f"text {i} é" for i in range(30)]

# `tensorflow` is there to be found, so that whoever imports it is seen.
PROGRAM = """
import sys
from slm_jax.data import DataConfig, open_data, train_batches
from slm_jax.data.tfds import write_tfds
folder = write_tfds(sys.argv[1], sys.argv[2])
corpus = open_data(DataConfig(source=f"tfds:{folder}", cache_dir=sys.argv[3]))
next(train_batches(corpus, batch_size=2, seq_len=8, seed=0))
print(corpus.n_train_tokens, "tensorflow" in sys.modules)
"""


@pytest.fixture
def lines(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def documents_of(corpus: Corpus, split: str) -> list[str]:
    (stream,) = getattr(corpus, split)
    ends = [*stream.starts[1:], len(stream.tokens)]
    spans = zip(stream.starts, ends, strict=True)
    return sorted(corpus.tokenizer.decode(stream.tokens[a:b]) for a, b in spans)


def test_written_corpus_reads_back_with_its_split(
    lines: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_tfds(lines, tmp_path / "tfds", valid_fraction=0.2)
    assert sorted(p.name.split(".")[1][:12] for p in folder.iterdir() if "train" in p.name) == [
        "array_record"
    ]
    back = open_data(DataConfig(source=f"tfds:{folder}", valid_fraction=0.5))  # its own split wins
    direct = open_data(DataConfig(source=lines, valid_fraction=0.2))
    for split in ("train", "valid"):
        assert documents_of(back, split) == documents_of(direct, split)
    assert len(documents_of(back, "valid")) == 6
    assert capfd.readouterr() == ("", "")


def test_split_is_made_where_there_is_none(lines: str, tmp_path: Path) -> None:
    folder = write_tfds(lines, tmp_path / "tfds", valid_fraction=0.2)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"] = [split for split in info["splits"] if split["name"] == "train"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    corpus = open_data(DataConfig(source=f"tfds:{folder}", valid_fraction=0.5))
    assert [len(documents_of(corpus, split)) for split in ("train", "valid")] == [12, 12]


def test_tensorflow_stays_out(lines: str, tmp_path: Path) -> None:
    (tmp_path / "fake" / "tensorflow").mkdir(parents=True)
    (tmp_path / "fake" / "tensorflow" / "__init__.py").write_text("__version__ = '2.20.0'\n")
    path = os.pathsep.join([str(tmp_path / "fake"), *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, lines, str(tmp_path / "tfds"), str(tmp_path / "cache")],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[1] == "False"
    assert result.stderr == ""


def test_errors(lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tfds(lines, tmp_path / "tfds")
    with pytest.raises(UserError, match="already holds"):
        write_tfds(lines, tmp_path / "tfds")
    with pytest.raises(UserError, match="no field text_field='body': its fields are text"):
        open_data(DataConfig(source=f"tfds:{folder}", text_field="body"))
    with pytest.raises(UserError, match="neither a data set of TFDS nor a folder"):
        open_data(DataConfig(source="tfds:no_such_data_set"))
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"] = [split | {"name": "test"} for split in info["splits"][:1]]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="no split train, only test"):
        open_data(DataConfig(source=f"tfds:{folder}"))
