"""What each format costs a trained model, on text that the model itself drew."""

import jax
import numpy as np
import pytest

from slm_jax.compress import (
    activation_aware,
    parse_spec,
    quantise,
    quantise_gptq,
    size,
    smoothed,
)
from slm_jax.infer import Sampling, generate
from slm_jax.models.lm import LM
from slm_jax.models.loss import cross_entropy
from tests.infer.test_stories import BOS, FOLDER, read_weights

ROWS, LENGTH = 8, 256


@pytest.fixture(scope="module")
def model() -> LM:
    return jax.tree.map(jax.numpy.asarray, read_weights(FOLDER / "stories260K.bin"))


@pytest.fixture(scope="module")
def text(model: LM) -> np.ndarray:
    """Two sets of rows `[2, ROWS, LENGTH]`: for calibration and for measuring."""
    rows = generate(
        model,
        [[BOS]] * (2 * ROWS),
        max_new_tokens=LENGTH - 1,
        sampling=Sampling(temperature=1.0),
        key=jax.random.key(0),
    )
    with_bos = np.stack([np.concatenate([[BOS], row]) for row in rows]).astype(np.int32)
    return with_bos.reshape(2, ROWS, LENGTH)


@jax.jit
def score(model: LM, tokens: jax.Array) -> jax.Array:
    logits = model(tokens[:, :-1])[0]
    return cross_entropy(logits, tokens[:, 1:]).mean()


# Largest rise of the loss, nats a token, and largest size over float32's, rounded to nearest.
FORMATS = {
    "w8": (0.005, 0.28),
    "w8a8": (0.015, 0.28),
    "w4g32": (0.2, 0.17),
    "nf4g64": (0.2, 0.16),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_cost_little_loss(model: LM, text: np.ndarray, name: str) -> None:
    rise, ratio = FORMATS[name]
    before = float(score(model, text[1]))
    quantised = quantise(model, parse_spec(name))
    after = float(score(quantised, text[1]))
    print(f"{name}: {before:.4f} -> {after:.4f}, {size(quantised)}")
    assert after != before
    assert -0.002 < after - before < rise  # eight bits may happen to help
    assert size(quantised).nbytes < ratio * size(model).nbytes


@pytest.mark.slow
def test_calibration_beats_rounding_to_nearest(model: LM, text: np.ndarray) -> None:
    spec, batches = parse_spec("w4g32"), [{"tokens": text[0]}]
    loss = {
        "float": model,
        "rtn": quantise(model, spec),
        "gptq": quantise_gptq(model, batches, spec),
        "awq": quantise(activation_aware(model, batches, spec), spec),
        "smooth w8a8": quantise(smoothed(model, batches), parse_spec("w8a8")),
    }
    rise = {k: float(score(m, text[1]) - score(model, text[1])) for k, m in loss.items()}
    print(rise)
    assert rise["gptq"] < 0.7 * rise["rtn"]
    assert rise["awq"] < 0.95 * rise["rtn"]
    assert rise["smooth w8a8"] < 0.015
