"""With muP the change of activations does not grow with the width; without it does."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from slm_jax.models.lm import LMConfig
from slm_jax.models.presets import dense, mamba, moe
from slm_jax.nn.parametrization import MuPConfig
from slm_jax.train.coordinates import coordinate_changes, width_exponent
from slm_jax.train.optimizer import OptimizerConfig

VOCAB = 64
MODELS: dict[str, Callable[[int, MuPConfig], LMConfig]] = {
    "dense": lambda d, mup: dense(
        d, 1, d // 16, None, 2 * d, head_dim=16, vocab_size=VOCAB, mup=mup
    ),
    "moe": lambda d, mup: moe(
        d, 1, d // 16, None, d, n_experts=4, head_dim=16, vocab_size=VOCAB, mup=mup
    ),
    "mamba": lambda d, mup: mamba(d, 1, vocab_size=VOCAB, mup=mup),
}


def exponents(name: str, mup: MuPConfig, widths: tuple[int, ...]) -> dict[str, float]:
    # Frequent and rare tokens, as in a text: what the first steps learn is how frequent they are.
    # Updates for even frequencies are mostly noise, which averages out as the width grows.
    frequency = 1 / np.arange(1, VOCAB + 1)
    rng = np.random.default_rng(0)
    ids = rng.choice(VOCAB, (8, 33), p=frequency / frequency.sum()).astype(np.int32)
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": np.ones((8, 32), np.float32),
    }
    changes = [
        coordinate_changes(
            # A small head, as Tensor Programs V advises (D.2): what the initial one makes of the
            # stream's change falls as width^-1/2.
            replace(MODELS[name](width, mup), init_std=0.002),
            batch,
            optimizer=OptimizerConfig(),
            learning_rate=0.005,
        )
        for width in widths
    ]
    assert all((c[what] > 0).all() for c in changes for what in c)
    return {
        what: width_exponent(widths, [float(c[what][-1]) for c in changes])
        for what in ("stream", "logits")
    }


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("dense", (32, 128)),
        pytest.param("moe", (32, 64, 128), marks=pytest.mark.slow),
        pytest.param("mamba", (32, 64, 128), marks=pytest.mark.slow),
    ],
)
def test_changes_grow_with_the_width_only_without_mup(name: str, widths: tuple[int, ...]) -> None:
    with_mup = exponents(name, MuPConfig(base_width=32), widths)
    without = exponents(name, MuPConfig(), widths)
    assert abs(with_mup["stream"]) < 0.25
    assert abs(with_mup["logits"]) < 0.25
    assert without["stream"] > with_mup["stream"] + 0.1
    assert without["logits"] > 0.5


def test_exponent_is_the_slope_of_the_logarithms() -> None:
    assert width_exponent((32, 64, 128), (2.0, 4.0, 8.0)) == pytest.approx(1.0)
    assert width_exponent((32, 64, 128), (3.0, 3.0, 3.0)) == pytest.approx(0.0)
