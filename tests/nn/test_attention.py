"""The attention mixer with a cache: padding and chunks leave no trace."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.nn.attention import Attention
from slm_jax.nn.norm import NormConfig
from tests.nn.tiny import D_MODEL, GQA, WINDOW, randomised

X = np.random.default_rng(0).normal(size=(2, 12, D_MODEL)).astype(np.float32)
PADS = 4


def mixer(config) -> Attention:
    def make(key: jax.Array) -> Attention:
        return Attention(config, D_MODEL, NormConfig(), key=key, out_std=0.1)

    return randomised(jax.eval_shape(make, jax.random.key(0)))


@jax.jit
def mix(mixer: Attention, x, positions, segments=None, state=None):
    return mixer(x, positions=positions, segments=segments, state=state)


@pytest.mark.parametrize(
    "config",
    [GQA, WINDOW, replace(GQA, qk_norm="head"), replace(GQA, qk_norm="full", qkv_bias=True)],
    ids=["gqa", "window", "head norm", "full norm"],
)
@pytest.mark.parametrize("padded_position", [0, -1])
def test_left_padding_and_chunks_leave_no_trace(config, padded_position: int) -> None:
    layer = mixer(config)
    want, _ = mix(layer, X[:, PADS:], np.arange(12 - PADS)[None])
    positions = np.arange(12)[None] - PADS
    segments = np.broadcast_to(positions >= 0, (2, 12)).astype(np.int32)
    positions = np.where(positions >= 0, positions, padded_position)
    state, ys = layer.init_state(2, 12, jnp.float32), []
    for begin, end in ((0, 9), (9, 10), (10, 12)):  # the ring of five slots goes round
        part = slice(begin, end)
        y, state = mix(layer, X[:, part], positions[:, part], segments[:, part], state)
        ys.append(y)
    np.testing.assert_allclose(np.concatenate(ys, axis=1)[:, PADS:], want, atol=1e-5)
    seen = np.sort(np.unique(state.positions))
    oldest = max(-1 if config.window is None else 8 - config.window, -1)
    np.testing.assert_array_equal(seen, np.arange(oldest, 8))
