"""Other programs run what we export: needs the environments of `make golden-env` and `make peers`.

`python -m tests.export.peers` writes their answers as golden files for the daily tests.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from slm_jax.data import ByteTokenizer
from slm_jax.export.gguf import load_gguf
from slm_jax.models.lm import LM
from tests.export.cases import CASES, PROMPT, logits, make
from tests.export.peers import READABLE, ask, export_all

pytestmark = pytest.mark.slow

TOKENS = ByteTokenizer().encode(PROMPT)


def greedy(model: LM, count: int = 64) -> np.ndarray:
    """The likeliest ids after TOKENS, whatever they are; later ids move no earlier logits."""
    forward = jax.jit(lambda m, t: m(t)[0][0])
    ids = np.zeros((1, len(TOKENS) + count), np.int32)
    ids[0, : len(TOKENS)] = TOKENS
    with jax.default_matmul_precision("highest"):
        for at in range(len(TOKENS), ids.shape[1]):
            ids[0, at] = np.argmax(forward(model, ids)[at - 1])
    return ids[0, len(TOKENS) :]


def test_transformers_computes_our_logits(tmp_path: Path) -> None:
    export_all(tmp_path)
    found = ask("transformers", tmp_path, READABLE["transformers"])
    assert found.keys() == set(READABLE["transformers"])
    for name, theirs in found.items():
        np.testing.assert_allclose(theirs, logits(make(name), TOKENS), atol=1e-4, rtol=0)


def test_llama_cpp_computes_our_logits_and_our_text(tmp_path: Path) -> None:
    export_all(tmp_path)
    found = ask("llama_cpp", tmp_path, READABLE["llama_cpp"])
    for name in CASES:
        model = make(name)
        np.testing.assert_allclose(found[name], logits(model, TOKENS), atol=1e-4, rtol=0)
        np.testing.assert_array_equal(found[f"{name}-ids"], TOKENS)
        ids = greedy(model)
        assert len(set(ids.tolist())) > 8 or model.config.tie_embeddings
        np.testing.assert_array_equal(found[f"{name}-greedy"], ids)
        text = bytes(i for i in ids.tolist() if i < 256)
        assert found[f"{name}-text"].tobytes() == text


def test_llama_cpp_runs_eight_bits(tmp_path: Path) -> None:
    """It rounds activations to 8 bits too, so its logits are near ours, not equal to them."""
    export_all(tmp_path, dtype="q8_0")
    found = ask("llama_cpp", tmp_path, ("dense", "moe", "mamba"))
    for name in ("dense", "moe", "mamba"):
        ours = logits(load_gguf(tmp_path / f"{name}.gguf")[0], TOKENS)
        p, q = (jax.nn.log_softmax(x, axis=-1) for x in (ours, found[name]))
        assert np.mean(np.sum(np.exp(p) * (p - q), axis=-1)) < 0.02
        assert np.mean(ours.argmax(-1) == found[name].argmax(-1)) > 0.8
