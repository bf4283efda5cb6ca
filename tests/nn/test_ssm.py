"""The Mamba mixer: its published initialisation, and one result in every way of feeding it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.nn.module import named_leaves
from slm_jax.nn.norm import NormConfig
from slm_jax.nn.ssm import Mamba, MambaConfig
from tests.nn.tiny import randomised

D = 8
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 12, D)).astype(np.float32)


def make(key: jax.Array, config: MambaConfig) -> Mamba:
    return Mamba(config, D, NormConfig(), key=key, out_std=0.1)


@pytest.fixture(scope="module")
def mixer() -> Mamba:
    config = MambaConfig(d_inner=12, d_state=3, inner_norms=True)
    return randomised(jax.eval_shape(lambda key: make(key, config), jax.random.key(0)))


@jax.jit
def mix(mixer: Mamba, x, segments=None, state=None):
    return mixer(x, positions=None, segments=segments, state=state)


def close(got, want) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def empty(mixer: Mamba, rows: int = 2):
    return mixer.init_state(rows, 12, jnp.float32)


@pytest.mark.parametrize("chunk", [1, 2, 6])  # 2 is less than the convolution looks back
def test_chunks_are_one_run(mixer: Mamba, chunk: int) -> None:
    want, _ = mix(mixer, X)
    state, ys = empty(mixer), []
    for begin in range(0, 12, chunk):
        y, state = mix(mixer, X[:, begin : begin + chunk], state=state)
        ys.append(y)
    close(np.concatenate(ys, axis=1), want)
    close(state, mix(mixer, X, state=empty(mixer))[1])


def test_left_padding_leaves_no_trace(mixer: Mamba) -> None:
    segments = np.ones((2, 12), np.int32)
    segments[0, :5] = 0
    y, state = mix(mixer, X, segments=segments, state=empty(mixer))
    short, short_state = mix(mixer, X[:1, 5:], state=empty(mixer, 1))
    close(y[:1, 5:], short)
    close(jax.tree.map(lambda a: a[:1], state), short_state)
    trained, _ = mix(mixer, X, segments=segments)
    close(trained[:1, 5:], short)


def test_documents_do_not_see_each_other(mixer: Mamba) -> None:
    segments = np.array([[1] * 5 + [2] * 7, [1] * 5 + [2] * 7])
    y, _ = mix(mixer, X, segments=segments)
    close(y, np.concatenate([mix(mixer, X[:, :5])[0], mix(mixer, X[:, 5:])[0]], axis=1))
    assert np.abs(y - mix(mixer, X)[0])[:, 5:].max() > 1e-3


def test_initialisation_is_the_published_one() -> None:
    config = MambaConfig(d_inner=400, d_state=5, proj_bias=True)
    mixer = jax.jit(make, static_argnums=1)(jax.random.key(0), config)
    np.testing.assert_allclose(mixer.a_log[...], np.log([np.arange(1, 6)] * 400), rtol=1e-6)
    np.testing.assert_array_equal(mixer.d[...], np.ones(400))
    steps = np.asarray(jax.nn.softplus(mixer.dt_bias[...]))
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 1.01e-1
    assert np.log(steps).mean() == pytest.approx(np.log(1e-2), abs=0.2)  # log-uniform
    rank = 1  # ceil(8 / 16)
    w = np.asarray(mixer.dt.w[...])
    assert w.shape == (rank, 400)
    assert np.abs(w).max() <= rank**-0.5
    assert w.std() == pytest.approx(3**-0.5, rel=0.1)  # uniform on +-1
    assert mixer.select.w.shape == (400, rank + 2 * 5)
    free_of_decay = {n for n, v in named_leaves(mixer).items() if not v.get_metadata()["decay"]}
    assert free_of_decay == {
        "a_log", "d", "dt_bias", "conv_w", "conv_b", "in_x.b", "in_z.b", "out.b"
    }  # fmt: skip
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(mixer))
