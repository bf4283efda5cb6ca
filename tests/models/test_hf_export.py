"""What we write is what `transformers` reads: needs the environment of `make golden-env`."""

import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from slm_jax.models.hf import load_hf, save_hf
from slm_jax.models.lm import LM
from tests.golden.cases import CASES
from tests.golden.cases import VARIANTS as INITS
from tests.models.hf_golden import GOLDEN, full
from tests.models.hf_variants import VARIANTS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
PYTHON = Path(os.environ.get("SLM_GOLDEN_PYTHON", ROOT / ".golden-env" / "bin" / "python"))


def with_transformers(*arguments: str | Path) -> str:
    """Runs the golden environment's Python; returns what it prints."""
    assert PYTHON.is_file(), f"{PYTHON} is missing: run `make golden-env`"
    command = [str(PYTHON), *map(str, arguments)]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(folders: list[Path], golden: Path) -> None:
    script = ROOT / "tests" / "golden" / "check_export.py"
    printed = with_transformers(script, *folders, "--golden", golden)
    for folder in folders:
        assert f"{folder.name}: logits max-abs difference" in printed


@pytest.mark.parametrize("named", [True, False], ids=["same-class", "found-class"])
def test_golden_models_come_back(named: bool, tmp_path: Path) -> None:
    folders = []
    for name in (f"{case}-{variant}" for case in CASES for variant in INITS):
        model_type = json.loads((GOLDEN / name / "config.json").read_text())["model_type"]
        folders.append(tmp_path / name)
        save_hf(load_hf(GOLDEN / name), folders[-1], model_type=model_type if named else None)
    check(folders, GOLDEN)


def test_other_models_give_our_logits(tmp_path: Path) -> None:
    folders, golden = [], tmp_path / "golden"
    rng = np.random.default_rng(0)
    for name, (_, config) in VARIANTS.items():
        model = LM(config, jax.random.key(0))
        # Biases and norms off their initial values.
        model = jax.tree.map(
            lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), model
        )
        tokens = rng.integers(0, config.vocab_size, (2, 24), dtype=np.int32)
        with jax.default_matmul_precision("highest"):
            logits = full(model, tokens, np.ones_like(tokens))
        (golden / name).mkdir(parents=True)
        answers = {"tokens": tokens, "logits": np.asarray(logits)}
        save_file(answers, golden / name / "golden.safetensors")
        folders.append(tmp_path / name)
        save_hf(model, folders[-1])
    check(folders, golden)


class ByteLevel:
    """A byte-level tokenizer without merges, as small as they come."""

    def __init__(self) -> None:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:46]
        vocab = {character: i for i, character in enumerate(alphabet)} | {"<eos>": 46}
        self.inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
        self.inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.vocab_size, self.eos_id = 47, 46

    def to_json(self) -> str:
        return self.inner.to_str()


def test_tokenizer_and_generation(tmp_path: Path) -> None:
    tokenizer, text = ByteLevel(), "ABC(123)"
    save_hf(load_hf(GOLDEN / "llama-reinit"), tmp_path / "out", tokenizer=tokenizer)
    program = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
batch = tokenizer(sys.argv[2], return_tensors="pt")
out = model.generate(**batch, max_new_tokens=4, do_sample=False)
print(tokenizer.eos_token_id, model.config.eos_token_id, *batch["input_ids"][0].tolist())
"""
    printed = with_transformers("-c", program, tmp_path / "out", text)
    ids = tokenizer.inner.encode(text).ids
    assert printed.splitlines()[-1] == f"46 46 {' '.join(map(str, ids))}"
