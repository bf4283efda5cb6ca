"""Normalisations against float64 numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.nn.norm import Norm, NormConfig
from tests.nn.tiny import randomised

CONFIGS = [
    NormConfig(),
    NormConfig(eps=0.5, bias=True),
    NormConfig(scale="unit_offset"),
    NormConfig(scale="none"),
    NormConfig("layer", bias=True),
    NormConfig("layer", scale="none"),
]


def oracle(config: NormConfig, x: np.ndarray, scale, bias, axis) -> np.ndarray:
    x = np.float64(x)
    if config.kind == "layer":
        y = (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + config.eps)
    else:
        y = x / np.sqrt((x * x).mean(axis, keepdims=True) + config.eps)
    if config.scale != "none":
        y = y * (np.float64(scale[...]) + (config.scale == "unit_offset"))
    return y + np.float64(bias[...]) if config.bias else y


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(8,), (2, 4)])
def test_norm_is_numpys(config: NormConfig, shape: tuple[int, ...]) -> None:
    norm = randomised(Norm(config, shape))
    x = 3 + np.random.default_rng(0).normal(size=(2, 5, *shape)).astype(np.float32)
    axis = tuple(range(-len(shape), 0))
    want = oracle(config, x, norm.scale, norm.bias, axis)
    np.testing.assert_allclose(norm(x), want, atol=1e-5)
    low = norm(jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    assert norm(x, jnp.bfloat16).dtype == jnp.bfloat16
    rounded = np.float64(jnp.asarray(x, jnp.bfloat16))
    want = oracle(config, rounded, norm.scale, norm.bias, axis)
    np.testing.assert_allclose(np.float64(low), want, atol=1e-6, rtol=2**-8)  # rounded once


def test_a_fresh_norm_only_normalises() -> None:
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    bare = Norm(NormConfig(scale="none"), 8)(x)
    for config in (NormConfig(), NormConfig(scale="unit_offset"), NormConfig(bias=True)):
        np.testing.assert_allclose(Norm(config, 8)(x), bare, atol=1e-6)
