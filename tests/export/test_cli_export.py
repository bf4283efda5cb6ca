"""`slm export` and `slm import`."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from slm_jax.cli import main
from slm_jax.cli.load import end_ids
from slm_jax.data import ByteTokenizer, load_tokenizer
from slm_jax.export.gguf import load_gguf
from slm_jax.models.hf import load_hf, save_hf
from slm_jax.nn.module import named_leaves
from tests.export.cases import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with the tokenizer of bytes."""
    out = tmp_path_factory.mktemp("cli") / "model"
    save_hf(make("dense"), out, tokenizer=ByteTokenizer())
    return out


def ok(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Prints of a command that must succeed, line breaks of the table undone."""
    assert main([str(w) for w in words]) == 0
    return " ".join(capsys.readouterr().out.split())


def one_line(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line on stderr of a command that must fail."""
    capsys.readouterr()
    assert main([str(w) for w in words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err


def same_weights(a, b) -> None:
    pairs = zip(named_leaves(a).items(), named_leaves(b).items(), strict=True)
    for (name, x), (other, y) in pairs:
        assert name == other
        np.testing.assert_array_equal(x.get_value(), y.get_value(), err_msg=name)


def test_a_folder_becomes_a_file_and_a_folder_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, back = tmp_path / "model.gguf", tmp_path / "back"
    shown = ok(capsys, "export", folder, file)
    assert "llama, 20 tensors in F32" in shown
    assert "32.00, scales included" in shown
    assert "257 tokens" in shown
    shown = ok(capsys, "import", file, back)
    assert "20 tensors in F32" in shown
    same_weights(load_hf(back), load_hf(folder))
    tokenizer = load_tokenizer(str(back / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("Grüße")) == "Grüße"
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 256


def test_eight_bits_say_how_small_they_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.gguf"
    shown = ok(capsys, "export", folder, file, "--dtype", "q8_0", "--no-tokenizer")
    model, sizes = load_gguf(file)
    assert f"{sizes.nbytes / (4 * sizes.parameters):.3f} x its float32 weights" in shown
    assert f"{8 * sizes.tensor_bytes / sizes.parameters:.2f}, scales included" in shown
    assert "15 tensors in Q8_0, 5 in F32" in shown
    assert "left out" in shown
    assert "tokenizer" in one_line(capsys, "import", file, tmp_path / "x")
    ok(capsys, "import", file, tmp_path / "x", "--no-tokenizer")
    same_weights(load_hf(tmp_path / "x"), model)


def test_folders_are_written_and_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = ok(capsys, "export", folder, tmp_path / "hf", "--format", "hf")
    assert "20 tensors in F32" in shown
    assert "32.00, scales included" in shown
    ok(capsys, "import", tmp_path / "hf", tmp_path / "again")
    for out in ("hf", "again"):
        same_weights(load_hf(tmp_path / out), load_hf(folder))
        assert load_tokenizer(str(tmp_path / out / "tokenizer.json")).eos_id == 256


def test_several_ends_of_a_text_are_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of an assistant, whose turns end otherwise than documents."""
    save_hf(load_hf(folder), tmp_path / "two", tokenizer=ByteTokenizer(), eos_ids=(7, 256))
    ok(capsys, "export", tmp_path / "two", tmp_path / "hf", "--format", "hf")
    ok(capsys, "import", tmp_path / "hf", tmp_path / "again")
    assert end_ids(tmp_path / "again", ByteTokenizer()) == (7, 256)
    ok(capsys, "export", tmp_path / "two", tmp_path / "programs", "--format", "stablehlo")
    assert json.loads((tmp_path / "programs/manifest.json").read_text())["eos_ids"] == [7, 256]


def test_mistakes_are_one_line_and_write_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    said = one_line(capsys, "export", folder, out, "--format", "hf", "--dtype", "f16")
    assert "dtype=f16 with format=hf" in said
    assert "missing" in one_line(capsys, "export", tmp_path / "missing", out)
    assert "is not a file" in one_line(capsys, "import", tmp_path / "missing.gguf", out)
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"mine")
    assert "exists" in one_line(capsys, "export", folder, mine)
    assert "no GGUF file" in one_line(capsys, "import", mine, out)
    assert mine.read_bytes() == b"mine"
    assert not out.exists()


class Loaded:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_nothing_is_unpickled_and_no_path_leaves_the_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil, out = tmp_path / "evil", tmp_path / "out"
    evil.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (evil / name).write_bytes((folder / name).read_bytes())
    (evil / "pytorch_model.bin").write_bytes(pickle.dumps(Loaded()))
    assert "save it as safetensors" in one_line(capsys, "import", evil, out)
    assert "no GGUF file" in one_line(capsys, "import", evil / "pytorch_model.bin", out)
    (evil / "model.safetensors").write_bytes(pickle.dumps(Loaded()) * 20)
    assert "cannot be read" in one_line(capsys, "import", evil, out)
    (evil / "model.safetensors").unlink()
    for name in ("../model/model.safetensors", str(folder / "model.safetensors"), "..", 7):
        index = {"weight_map": {"model.norm.weight": name}}
        (evil / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "only files of its own folder" in one_line(capsys, "import", evil, out)
    assert not out.exists()
