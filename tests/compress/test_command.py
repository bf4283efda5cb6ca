"""`slm quantize` and `slm prune` on a folder, and `slm generate` on what they write."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
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


def shrink(command: str, model: Path, hf: Path, out: Path, *more: str) -> int:
    return main([
        command, str(model), "--out", str(out), "--text", str(hf.parent / "text.txt"),
        "--seq-len", "32", "--eval-tokens", "512", "--calibration-tokens", "256", *more,
    ])  # fmt: skip


def quantize(hf: Path, out: Path, *more: str) -> int:
    return shrink("quantize", hf, hf, out, *more)


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


def test_pruning_reports_and_its_folder_is_a_model(hf: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert shrink("prune", hf, hf, out, "--method", "wanda", "--sparsity", "2:4") == 0
    shown = " ".join(capsys.readouterr().out.split())
    facts = json.loads((out / "pruned.json").read_text())
    assert (facts["method"], facts["sparsity"], facts["zeros"]) == ("wanda", "2:4", 0.5)
    assert "50.0 % of the layers' matrices are zero; 2:4 by wanda" in shown
    on_disk = (out / "model.safetensors").stat().st_size
    assert f"{on_disk / facts['float32_bytes']:.3f} x its float32 weights" in shown
    assert f"-> {facts['loss_after']['nats']:.4f} nats a token" in shown
    assert len(facts["layer_errors"]) == 7
    assert all(0 < e < 1 for e in facts["layer_errors"].values())
    model, tokenizer, _ = load(out)
    assert np.mean(np.asarray(model.blocks[0].channel.up.w[...]) == 0) == 0.5
    assert tokenizer.vocab_size == 257


@pytest.mark.slow
def test_taking_out_units_gives_a_smaller_model(hf: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert shrink("prune", hf, hf, out, "--method", "structured", "--dtype", "bfloat16") == 0
    shown = " ".join(capsys.readouterr().out.split())
    model = load(out)[0]
    layer = model.config.pattern[0]
    assert (layer.channel.d_ff, layer.mixer.n_kv_heads, layer.mixer.n_heads) == (12, 1, 2)
    facts = json.loads((out / "pruned.json").read_text())
    assert f"{facts['parameters']:,} of" in shown
    assert list(facts["layer_errors"]) == ["0"]
    assert main(["generate", str(out), "--prompt", "the", "--max-new-tokens", "3"]) == 0


def test_mistakes_of_pruning_are_one_line(hf: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    for more, message in (
        (("--sparsity", "1.5"), "sparsity=1.5 must be at least 0 and below 1"),
        (("--sparsity", "2:4", "--method", "structured"), "units have no pattern"),
        (("--sparsity", "2:5"), "are not a multiple of 5"),
    ):
        assert message in refused(capsys, shrink("prune", hf, hf, out, *more))
    assert not out.exists()


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
@pytest.mark.parametrize(("spec", "method"), [("w4g8", "gptq"), ("w3g8", "rtn")])
def test_what_was_pruned_stays_zero_in_codes(
    hf: Path, tmp_path: Path, capsys, spec: str, method: str
) -> None:
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    assert shrink("prune", hf, hf, pruned, "--method", "sparsegpt", "--sparsity", "0.5") == 0
    assert shrink("quantize", pruned, hf, out, "--spec", spec, "--method", method) == 0
    assert "pruned weights take a bit each" in " ".join(capsys.readouterr().out.split())
    before, after = (load(folder)[0].blocks[0].channel.up for folder in (pruned, out))
    zeros = np.asarray(before.w[...])[0] == 0
    assert 0.4 < zeros.mean() < 0.6
    layer = jax.tree.map(lambda a: a[0], after)
    assert not np.any(np.asarray(layer.weight(np.float32))[zeros])
    assert (out / "model.safetensors").stat().st_size < 0.5 * (
        pruned / "model.safetensors"
    ).stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_other_methods_run(hf: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    assert quantize(hf, out, "--spec", "w4g8", "--method", method) == 0
    assert json.loads((out / "quantised.json").read_text())["method"] == method
    assert load(out)[0].blocks[0].mixer.q.w.spec.name == "w4g8"
