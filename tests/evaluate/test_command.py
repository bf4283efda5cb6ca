"""`slm evaluate`, and the losses that `slm export` and `slm import` report."""

import json
import re
from pathlib import Path

import pytest

from slm_jax.cli import main
from slm_jax.data import ByteTokenizer
from slm_jax.evaluate import perplexity, read_items, score_items
from slm_jax.models.hf import save_hf
from tests.evaluate.tiny import subject

TEXT = "The quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text and a file of questions."""
    top = tmp_path_factory.mktemp("evaluate")
    save_hf(subject().model, top / "model", tokenizer=ByteTokenizer())
    (top / "fox.txt").write_text(TEXT)
    records = [{"query": f"q{i}", "choices": ["a", "bc"], "gold": i % 2} for i in range(6)]
    (top / "quiz.dev.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return top


def ok(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main([str(word) for word in words]) == 0
    return " ".join(capsys.readouterr().out.split())


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_one_report_a_run(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ok(
        capsys, "evaluate", files / "model", "--text", files / "fox.txt", "--window", "64",
        "--task", files / "quiz.dev.jsonl", "--shots", "2", "--out", tmp_path,
    )  # fmt: skip
    text = perplexity(subject(), [TEXT], window=64)
    task = score_items(subject(), read_items(files / "quiz.dev.jsonl"), shots=2)
    assert f"perplexity {text.perplexity:.3f}" in shown
    assert f"acc {task.metrics['acc']:.3f} ±" in shown
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["texts"][str(files / "fox.txt")]["nats"] == pytest.approx(text.nats, rel=1e-6)
    assert found["tasks"]["quiz.dev"]["metrics"] == task.metrics
    assert found["about"]["bits per weight"] == 32
    table = (tmp_path / "evaluation.md").read_text()
    assert f"| {text.nats:.4f} | {text.perplexity:.3f} | {text.bits_per_byte:.4f} |" in table
    assert f"| quiz.dev | acc | {task.metrics['acc']:.4f} ± " in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "evaluation.md"]


def test_mistakes_are_one_line(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = files / "model", tmp_path / "out"
    assert "nothing to measure" in refused(capsys, "evaluate", model)
    quiz = files / "quiz.dev.jsonl"
    twice = ["--task", quiz, "--task", quiz]
    assert "two files of one name" in refused(capsys, "evaluate", model, *twice)
    assert "limit=0" in refused(capsys, "evaluate", model, "--task", quiz, "--limit", "0")
    missing = ["--text", files / "none.txt", "--out", out]
    assert "no such file" in refused(capsys, "evaluate", model, *missing)
    assert not out.exists()


def losses(shown: str) -> tuple[float, float]:
    before, after = re.findall(r"loss ([\d.]+) -> ([\d.]+) nats a token on 64 tokens", shown)[0]
    return float(before), float(after)


def test_export_and_import_say_what_the_form_costs(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--text", files / "fox.txt", "--text-tokens", "64"]
    file = tmp_path / "small.gguf"
    shown = ok(capsys, "export", files / "model", file, "--dtype", "q8_0", *text)
    before, after = losses(shown)
    assert before != after
    assert after == pytest.approx(before, rel=0.02)
    assert re.search(r"bits a byte [\d.]+ -> [\d.]+", shown)
    shown = ok(capsys, "import", file, tmp_path / "back", *text)
    assert f"loss {after:.4f} nats a token on 64 tokens" in shown
    assert "tokenizer=False" in refused(
        capsys, "import", file, tmp_path / "x", "--no-tokenizer", *text
    )


@pytest.mark.slow
def test_programs_are_written_and_measured(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "w8"
    ok(capsys, "quantize", files / "model", "--out", small, "--text", files / "fox.txt",
       "--seq-len", "32", "--calibration-tokens", "64")  # fmt: skip
    words = ["export", small, tmp_path / "out", "--format", "stablehlo"]
    shown = ok(capsys, *words, "--text", files / "fox.txt", "--text-tokens", "64")
    before, after = losses(shown)
    assert after == pytest.approx(before, abs=2e-4)
    assert "cpu, cuda, tpu programs" in shown
    ratio = re.search(r"([\d.]+) x its float32 weights", shown)
    assert ratio
    assert 0.25 < float(ratio[1]) < 0.75  # programs and tokenizer beside so few weights
    assert "holds exported programs" in refused(capsys, *words)
    assert "take format=stablehlo" in refused(capsys, "export", small, tmp_path / "x.gguf")
