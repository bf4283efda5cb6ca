"""`slm generate` on a tiny model with random weights: its options, what it prints and where."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from slm_jax.cli import main
from slm_jax.cli.load import end_ids, load
from slm_jax.data import ByteTokenizer
from slm_jax.models.hf import save_hf
from slm_jax.models.lm import LM
from slm_jax.models.presets import dense
from tests.nn.tiny import randomised

TOKENIZER = ByteTokenizer()


def save(folder: Path, seed: int, n_layers: int = 1) -> Path:
    config = dense(16, n_layers, 2, d_ff=32, vocab_size=TOKENIZER.vocab_size)
    model = jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))
    save_hf(randomised(model, seed), folder, tokenizer=TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("generate") / "model", 0)


def shown(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["generate", *map(str, args)]) == 0
    out = capsys.readouterr()
    return out.out, out.err


def test_every_text_is_that_of_its_own_seed(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many are continued at a time."""
    options = ["--max-new-tokens", 6, "--min-p", 0.01, "--repetition-penalty", 1.2]
    prompts = ["--prompt", "one", "--prompt", "two", "--prompt", "three"]
    out, err = shown(capsys, model, *prompts, *options, "--seed", 5, "--slots", 2)
    assert "18 tokens, the first after " in err
    assert err.rstrip().endswith(" tokens/s")
    alone = [
        shown(capsys, model, "--prompt", p, *options, "--seed", 5 + i)[0]
        for i, p in enumerate(prompts[1::2])
    ]
    assert out == "".join(
        f"{'' if i == 0 else chr(10)}[{i + 1}]\n{text}" for i, text in enumerate(alone)
    )
    # Rows of one prompt differ by their seeds.
    out, _ = shown(capsys, model, "--prompt", "one", "--prompt", "one", *options)
    first, second = out.removeprefix("[1]\n").split("\n[2]\n")
    assert first != second


def test_stop_strings_end_a_text_unseen(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = [model, "--prompt", "ab", "--max-new-tokens", 12, "--temperature", 0]
    out, _ = shown(capsys, *greedy)
    new = out.removeprefix("ab").removesuffix("\n")
    stop = new[3:5]
    at = new.index(stop)
    assert "\n" not in stop  # of characters that can be given on a command line
    out, err = shown(capsys, *greedy, "--stop", "not there", "--stop", stop)
    assert out == f"ab{new[:at]}\n"
    assert at + 2 <= int(err.split()[0]) < 12  # nor is anything drawn after it


def test_a_draft_changes_the_speed_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = [model, "--prompt", "ab", "--max-new-tokens", 8, "--temperature", 0]
    out, _ = shown(capsys, *greedy, "--cache", "float32", "--chunk", 16)
    draft = save(tmp_path / "draft", 1)
    drafted, err = shown(capsys, *greedy, "--draft", draft, "--draft-tokens", 2)
    assert drafted == out
    assert " drafted tokens stayed" in err
    assert main(["generate", *map(str, greedy), "--draft", str(draft), "--slots", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: slots=1 with a draft,")


def test_unrolled_layers_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_layers = save(tmp_path / "model", 0, n_layers=2)
    greedy = [two_layers, "--prompt", "ab", "--max-new-tokens", 8, "--temperature", 0]
    assert shown(capsys, *greedy, "--unroll")[0] == shown(capsys, *greedy)[0]
    assert main(["generate", *map(str, greedy), "--unroll", "--exit-threshold", "0.5"]) == 2
    assert "unroll=True with exit_threshold=0.5" in capsys.readouterr().err


def test_an_int8_cache_continues_too(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = shown(capsys, model, "--prompt", "ab", "--max-new-tokens", 8, "--cache", "int8")
    assert out.startswith("ab")
    assert len(out) > len("ab\n")


@pytest.mark.parametrize(
    ("generation", "config", "want"),
    [
        ({"eos_token_id": [7, 9]}, 5, (7, 9)),
        ({"eos_token_id": 7}, 5, (7,)),
        ({}, 5, (5,)),
        (None, [5, 6], (5, 6)),
        (None, None, (256,)),
    ],
)
def test_the_folder_says_what_ends_a_text(
    model: Path, tmp_path: Path, generation: dict | None, config: object, want: tuple[int, ...]
) -> None:
    """Before the tokenizer does: assistants end their turns otherwise than documents."""
    hf = json.loads((model / "config.json").read_text()) | {"eos_token_id": config}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_ids(tmp_path, TOKENIZER) == want


def test_a_quantised_folder_keeps_what_ends_a_text(tmp_path: Path) -> None:
    for kept, want in (({"eos_ids": [7, 9]}, (7, 9)), ({}, (256,))):
        (tmp_path / "quantised.json").write_text(json.dumps(kept))
        assert end_ids(tmp_path, TOKENIZER) == want


def test_a_text_ends_with_what_the_folder_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "model", 0)
    greedy = [folder, "--prompt", "ab", "--max-new-tokens", 12, "--temperature", 0]
    _, err = shown(capsys, *greedy)
    assert err.startswith("12 tokens")
    lm, tokenizer, _ = load(folder)
    ids = np.array([*tokenizer.encode("ab")])
    first = int(np.argmax(lm(ids[None])[0][0, -1]))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, 3]}))
    _, err = shown(capsys, *greedy)
    assert err.startswith("1 tokens")
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    assert main(["generate", *map(str, greedy)]) == 2
    assert "eos_token_id='x' is no list of token ids" in capsys.readouterr().err
