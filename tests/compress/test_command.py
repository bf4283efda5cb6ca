"""`slm quantize` on a folder, and `slm generate` on what it writes."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slm_jax.cli import main
from slm_jax.cli.load import load
from slm_jax.compress.linear import QuantisedLinear
from slm_jax.data import ByteTokenizer
from slm_jax.models.hf import save_hf
from tests.nn.tiny import tiny_lm


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny Llama over bytes, and a text beside it."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    save_hf(tiny_lm("dense", vocab_size=257, n_layers=1), folder, tokenizer=ByteTokenizer())
    words = np.random.default_rng(0).choice(["cat", "dog", "sat", "ran", "the", "a"], 3000)
    (folder.parent / "text.txt").write_text(" ".join(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLM_JAX_CACHE", str(folder.parent / "cache"))
        yield folder


def quantize(hf: Path, out: Path, *more: str) -> int:
    return main([
        "quantize", str(hf), "--out", str(out), "--text", str(hf.parent / "text.txt"),
        "--seq-len", "32", "--eval-tokens", "512", "--calibration-tokens", "256", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def done(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "w8a8"
    assert quantize(hf, out, "--spec", "w8a8", "--method", "smoothquant") == 0
    return out


def test_report_says_size_and_loss(hf: Path, tmp_path: Path, capsys) -> None:
    assert quantize(hf, tmp_path / "out", "--spec", "w8") == 0
    shown = " ".join(capsys.readouterr().out.split())
    facts = json.loads((tmp_path / "out" / "quantised.json").read_text())
    size, loss = facts["size"], facts["loss_after"]["nats"]
    assert f"{size['nbytes'] / facts['float32_bytes']:.3f} x its float32 weights" in shown
    assert f"-> {loss:.4f} nats a token" in shown
    assert f"-> {facts['loss_after']['bits_per_byte']:.4f}" in shown
    assert facts["loss_after"]["bits_per_byte"] == pytest.approx(loss / np.log(2))
    assert abs(loss - facts["loss_before"]["nats"]) < 0.05
    assert set(facts["layer_errors"]) == {
        *(f"0.mixer.{k}" for k in ("q", "k", "v", "out")),
        *(f"0.channel.{k}" for k in ("gate", "up", "down")),
    }
    assert all(0 < e < 0.1 for e in facts["layer_errors"].values())


def test_folder_is_loaded_again_and_continued(done: Path, hf: Path, capsys) -> None:
    model, tokenizer, prefix = load(done)
    assert isinstance(model.blocks[0].mixer.q, QuantisedLinear)
    assert tokenizer.vocab_size == 257
    assert prefix.size == 0
    assert tokenizer.encode("a").tolist() == [97]
    capsys.readouterr()
    assert main(["generate", str(done), "--prompt", "the cat", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("the cat")


def refused(capsys, code: int) -> str:
    shown = capsys.readouterr()
    assert (code, shown.err.count("\n")) == (2, 1)
    return shown.err


def test_mistakes_are_one_line(done: Path, hf: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert "spec='w5' is no format" in refused(capsys, quantize(hf, out, "--spec", "w5"))
    assert "holds a quantised model" in refused(capsys, quantize(hf, done))
    assert "is quantised already" in refused(capsys, quantize(done, out))
    code = main(["quantize", str(hf), "--out", str(out)])
    assert "has no text to measure on: --text X" in refused(capsys, code)
    code = main(["generate", str(done), "--prompt", "a", "--ema"])
    assert "ema=True" in refused(capsys, code)
    assert not out.exists()
    (done / "model.safetensors").write_bytes(b"broken")
    code = main(["generate", str(done), "--prompt", "a"])
    assert "sha256 differs" in refused(capsys, code)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_other_methods_run(hf: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    assert quantize(hf, out, "--spec", "w4g8", "--method", method) == 0
    assert json.loads((out / "quantised.json").read_text())["method"] == method
    assert load(out)[0].blocks[0].mixer.q.w.spec.name == "w4g8"
