import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import pytest

from slm_jax.cli import main, parse, run
from slm_jax.cli.show import count, nbytes
from slm_jax.data import train_bpe
from slm_jax.errors import UserError
from slm_jax.models.hf import save_hf
from slm_jax.models.lm import LM
from slm_jax.models.presets import PRESETS, dense
from slm_jax.train.loop import TrainProgress
from slm_jax.train.metrics import read_metrics
from tests.train import tiny_trm

TINY = [
    "--model.n-layers", "1", "--model.d-model", "16", "--model.pattern.0.mixer.n-heads", "2",
    "--model.pattern.0.mixer.head-dim", "8", "--model.pattern.0.channel.d-ff", "32",
    "--steps", "5", "--batch-size", "8", "--seq-len", "16", "--eval-tokens", "256",
    "--loop.checkpoint-every", "2", "--ema-decay", "0.5", "--schedule.warmup-steps", "1",
    "--schedule.learning-rate", "0.03",
]  # fmt: skip


def train(out: Path, *more: str) -> list[str]:
    return ["train", "tiny-dense", *TINY, "--out", str(out), *more]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "whole"
    assert main(train(out)) == 0
    return out


def one_line(capsys: pytest.CaptureFixture[str], code: int, args: list[str]) -> str:
    """Runs what must fail with `code`; its one line on stderr."""
    capsys.readouterr()
    assert main(args) == code
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.out
    return shown.err


def test_training_prints_its_result_and_a_second_call_shows_it_again(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((trained / "result.json").read_text())
    before = (trained / "metrics.jsonl").read_text()
    assert main(train(trained)) == 0
    shown = capsys.readouterr().out
    assert f"{result['valid_loss']:.4f} nats a token" in shown
    assert f"{result['valid_loss_ema']:.4f} nats a token" in shown
    assert (trained / "metrics.jsonl").read_text() == before
    config = json.loads((trained / "config.json").read_text())
    assert config["model"]["pattern"][0]["mixer"]["head_dim"] == 8
    assert config["model"]["pattern"][0]["mixer"]["n_kv_heads"] == 2  # the preset's


def test_an_interrupted_run_is_resumed_by_the_same_command(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "stopped"

    def stop(self: TrainProgress, done: int, loss: float, rate: float) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainProgress, "update", stop)
        assert main(train(out)) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not (out / "result.json").exists()
    assert main(train(out)) == 0
    losses = [[r["loss"] for r in read_metrics(f) if "loss" in r] for f in (out, trained)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_sigterm_saves_and_the_same_command_goes_on(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "stopped"

    def stop(self: TrainProgress, done: int, loss: float, rate: float) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainProgress, "update", stop)
        assert main(train(out)) == 42
    shown = capsys.readouterr()
    assert shown.err == "SIGTERM: saving after this step; once more ends at once\n"
    assert "stopped after step 2; the same command goes on" in shown.out
    assert main(train(out)) == 0
    assert "of a step is spent outside the compiled program" in capsys.readouterr().out
    losses = [[r["loss"] for r in read_metrics(f) if "loss" in r] for f in (out, trained)]
    assert losses[0] == losses[1]


def test_a_reasoner_is_trained_shown_again_and_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "sudoku-6x6", "--model.d-model", "8", "--model.n-layers", "1"]
    args += ["--model.n-cycles", "1", "--model.n-latent-steps", "1", "--model.ff-multiple", "8"]
    args += ["--data.n-train", "40", "--data.n-valid", "8", "--data.n-test", "16"]
    args += ["--objective.n-supervision", "2", "--steps", "3", "--batch-size", "8"]
    args += ["--out", str(tmp_path / "run")]
    with tiny_trm.one_device():
        assert main(args) == 0
    begun, _, _ = capsys.readouterr().out.partition("\n")
    assert begun.startswith("sudoku-6x6: ")
    assert ", 3 steps of 8 puzzles, " in begun
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["exact"]) == 2
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(args) == 0
    shown = capsys.readouterr().out
    for suffix in ("", "_ema"):
        first, last = (result[f"cell{suffix}"][k] for k in (0, -1))
        assert f"{first:.1%} to {last:.1%} of cells right" in shown
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert f"slm solve {tmp_path / 'run'} --puzzle" in " ".join(shown.split())
    puzzle = "..3.6..1...2....2.......5....13..4.."
    assert main(["solve", str(tmp_path / "run"), "--puzzle", puzzle]) == 0
    assert "step 2 of 2: " in capsys.readouterr().out
    # Options of a language model are not options of a reasoner.
    assert main([*args, "--seq-len", "16"]) == 2
    assert "--seq-len" in capsys.readouterr().err


def test_generation_streams_one_prompt_and_lists_several(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    greedy = ["generate", str(trained), "--max-new-tokens", "8", "--temperature", "0"]
    assert main([*greedy, "--prompt", "ROMEO:"]) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("ROMEO:")
    assert len(alone) > len("ROMEO:\n")
    assert main([*greedy, "--prompt", "ROMEO:", "--prompt", "I"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"[1]\n{alone}\n[2]\nI")

    drawn = ["generate", str(trained), "--max-new-tokens", "30", "--prompt", "I", "--top-k", "50"]
    texts = []
    for more in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--seed", "1", "--ema"]):
        assert main([*drawn, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0] != texts[3]


def test_generation_from_a_hugging_face_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    tokenizer = train_bpe(["so long and so low, so slow"] * 3, 262, tmp_path / "tokenizer.json")
    config = dense(16, 1, 2, d_ff=32, vocab_size=tokenizer.vocab_size)
    save_hf(LM(config, jax.random.key(0)), folder)
    command = ["generate", str(folder), "--prompt", "so long", "--max-new-tokens", "4"]
    assert "tokenizer.json" in one_line(capsys, 2, command)
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("so long")
    assert len(shown) > len("so long\n")
    assert "ema" in one_line(capsys, 2, [*command, "--ema"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trane"], ["trane", "train"]),
        (["train", "tiny-dnse"], ["tiny-dnse", "tiny-dense"]),
        (["train", "--model.pattern.0.mixer.n-kv-heads", "3"], ["n_kv_heads=3", "choose 1, 2"]),
        (["train", "--steps", "0"], ["steps=0"]),
        (["train", "--model.vocab-size", "100", "--out", "OUT"], ["vocab_size=100", "257"]),
        (["train", "--data.source", "OUT/none.txt", "--out", "OUT/x"], ["none.txt"]),
        (["train", "--data.source", "OUT/bad.txt", "--out", "OUT/x"], ["bad.txt", "byte 2"]),
        (["train", "--data.source", "OUT/bad.jsonl", "--out", "OUT/x"], ["bad.jsonl:2"]),
        (["train", "--data.source", "OUT/bad.txt.gz", "--out", "OUT/x"], ["bad.txt.gz", "gzip"]),
        (["train", "--mesh.data", "3", "--mesh.fsdp", "3", "--out", "OUT/x"], ["mesh", "device"]),
        (["flops", "tiny-dense", "--seq-len", "0"], ["seq_len=0"]),
        (["generate", "OUT", "--prompt", "I"], ["config.json"]),
        (["generate", "OUT"], ["prompt"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_one_line(
    args: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ab\xffc")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "bad.txt.gz").write_bytes(b"\x1f\x8b\x08\x00 not gzip")
    line = one_line(capsys, 2, [arg.replace("OUT", str(tmp_path)) for arg in args])
    assert all(word in line for word in words)


def test_a_folder_of_another_run_is_left_alone(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "config.json").read_bytes()
    line = one_line(capsys, 2, train(trained, "--seed", "7"))
    assert "seed: saved 0, given 7" in line
    assert "--overwrite" in line
    assert (trained / "config.json").read_bytes() == before


def test_divergence_has_its_own_exit_code(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = train(tmp_path / "up", "--schedule.learning-rate", "1e30", "--loop.quiet")
    line = one_line(capsys, 44, args)
    assert "at step 3 with learning_rate=5.5e+29, bad step 3 in a row" in line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "--stepz", "3"], ["--stepz", "--steps"]),
        (["train", "--steps", "many"], ["many", "--steps"]),
        (["presets", "--jsn"], ["--jsn", "--json"]),
        (["generate"], ["PATH"]),
    ],
)
def test_an_unknown_option_is_named_with_those_like_it(
    args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    shown = capsys.readouterr().err
    assert all(word in shown for word in words)


def test_help_describes_fields_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--schedule.learning-rate FLOAT Peak. (default: 0.001)".replace(" ", "") in (
        shown.replace("│", "").replace(" ", "")
    )
    for name in PRESETS:
        assert name in shown.replace("- ", "-").replace(" │ ", "")
    assert main([]) == main(["--help"]) == 0
    assert "slm generate FOLDER" in capsys.readouterr().out


def test_presets_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "slm_jax", "presets"], capture_output=True, text=True, check=True
    )
    rows = {line.split()[1]: line.split("│") for line in done.stdout.splitlines() if "│" in line}
    assert rows.keys() == PRESETS.keys()
    assert rows["llama-3.2-1b"][2].strip() == "1.24 G"
    assert "2048" in done.stdout


def test_presets_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows.keys() == PRESETS.keys()
    llama = rows["llama-3.2-1b"]
    assert llama["total"] == 1_235_814_400  # its model card
    assert llama["seq_len"] == 2048
    assert llama["context"] == 131_072
    assert llama["kv_bytes_per_token"] == 16 * 2 * 8 * 64 * 2
    assert llama["state_bytes_32768"] == 32_768 * llama["kv_bytes_per_token"]
    # In int8 a head of 64 numbers has a scale of four bytes.
    assert llama["state_bytes_int8_32768"] == llama["state_bytes_32768"] * 68 // 128
    mamba = rows["mamba-130m"]
    assert mamba["state_bytes_1024"] == mamba["state_bytes_32768"] > 0


def test_flops_follow_the_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["flops", "tiny-dense", "--seq-len", "64", "--model.n-layers", "2"]
    assert main([*args, "--model.remat", "full"]) == 0
    shown = capsys.readouterr().out
    layer = 2 * 128 * (2 * 4 + 2 * 2) * 32 + 2 * 3 * 128 * 512
    products = 4 * 128 * (64 + 1) / 2  # the causal half, the diagonal included
    head = 2 * 128 * 257
    total = 2 * (layer + products) + head
    full = total + 2 * (4 * 128 * 64 - products)
    cells = [[c.strip() for c in line.split("│")] for line in shown.splitlines()]
    rows = {row[1]: row[2:] for row in cells if len(row) > 2}
    assert rows["head"][0] == count(head)
    assert rows["attention products"][:3:2] == [count(2 * products), count(2 * 4 * 128 * 64)]
    assert rows["total"][:3:2] == [count(total), count(full)]
    assert f"{count(3 * total)} FLOPs" in shown
    assert f"{count(4 * total - head)} FLOPs" in shown
    speeds = [197e12 / (3 * total), 0.4 * 197e12 / (3 * total)]
    assert rows["TPU v5 lite = TPU v5e"][1:3] == [f"{speed:,.0f}" for speed in speeds]
    weights = 257 * 128 + 2 * (layer // 2 + 2 * 128) + 128
    assert f"N = {count(weights)}" in shown
    assert f"{3 * total / (6 * weights):.3f} x 6 N" in shown


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0"), (999, "999"), (1234, "1.23 k"), (9996, "10.0 k"), (99_960, "100 k"),
     (999_600, "1.00 M"), (1.5e12, "1.50 T")],
)  # fmt: skip
def test_counts_have_three_digits(n: float, text: str) -> None:
    assert count(n) == text


def test_bytes_have_binary_prefixes() -> None:
    assert [nbytes(n) for n in (512, 2048, 3 << 30)] == ["512 B", "2.00 KiB", "3.00 GiB"]


def test_generation_shows_no_control_characters(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    prompt = "\x1b[31m\tred\r\n"
    assert main(["generate", str(trained), "--prompt", prompt, "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("\ufffd[31m\tred\ufffd\n")


@dataclass(frozen=True)
class Inner:
    """Inner part."""

    width: int = 4
    """Width of it."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"width={self.width} must be at least 1")


@dataclass(frozen=True)
class Other:
    """The alternative to `Inner`."""

    depth: int = 1


@dataclass(frozen=True)
class Study:
    """A study of width."""

    inner: Inner | Other = Inner()
    """The part."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    seed: int = 0
    """Seed."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative")


def test_an_experiment_has_the_same_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[Study] = []
    assert run(got.append, Study, args=["--inner.width", "9", "--kind", "b"]) == 0
    assert run(got.append, Study, Study(Other(3), seed=2), args=["--inner.depth", "5"]) == 0
    assert got == [Study(Inner(9), "b"), Study(Other(5), seed=2)]
    assert run(got.append, Study, description="What is asked.", args=["--help"]) == 0
    shown = capsys.readouterr().out
    assert "What is asked." in shown
    assert "Width of it. (default: 4)" in shown
    for args, line in (
        (["--inner.width", "0"], "error: width=0 must be at least 1\n"),
        (["--seed", "-1"], "error: seed=-1 must not be negative\n"),
    ):
        assert run(got.append, Study, args=args) == 2
        assert capsys.readouterr().err == line
    assert len(got) == 2

    def fail(study: Study) -> None:
        raise UserError("two\nlines")

    assert run(fail, Study, args=[]) == 2
    assert capsys.readouterr().err == "error: two lines\n"
    monkeypatch.setenv("SLM_TRACEBACK", "1")
    with pytest.raises(UserError):
        run(fail, Study, args=[])
    with pytest.raises(UserError):
        parse(Study, args=["--seed", "-1"])


def test_a_bug_keeps_its_traceback() -> None:
    def broken(study: Study) -> None:
        raise ValueError("not the user's fault")

    with pytest.raises(ValueError, match="fault"):
        run(broken, Study, args=[])


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from slm_jax.cli import main; raise SystemExit(main([]))"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
