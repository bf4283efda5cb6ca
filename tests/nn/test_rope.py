"""Rotations: their two layouts, and that scores depend on distances only."""

import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.nn.rope import RopeConfig, apply_rope, rope_tables

D = 16
RNG = np.random.default_rng(0)
Q, K = RNG.normal(size=(2, 2, 6, 3, D)).astype(np.float32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 5], [7, 0, 3, 3, 100, 9]])


def rotate(x: np.ndarray, positions: np.ndarray, config: RopeConfig) -> np.ndarray:
    cos, sin = rope_tables(config, D, jnp.asarray(positions))
    return np.asarray(apply_rope(jnp.asarray(x), cos, sin, config.layout))


def test_adjacent_pairs_are_complex_numbers_turned_by_the_position() -> None:
    got = rotate(Q, POSITIONS, RopeConfig(theta=500.0, layout="adjacent"))
    frequency = 500.0 ** (-np.arange(D // 2) / (D // 2))
    turn = np.exp(1j * POSITIONS[..., None] * frequency)[:, :, None]
    want = Q.astype(np.float64).view(np.complex128) * turn
    np.testing.assert_allclose(got, want.view(np.float64), atol=2e-5)


def test_layouts_are_one_rotation_of_permuted_coordinates() -> None:
    order = np.arange(D).reshape(2, D // 2).T.ravel()  # 0, 8, 1, 9, ...
    half = rotate(Q, POSITIONS, RopeConfig())
    adjacent = rotate(Q[..., order], POSITIONS, RopeConfig(layout="adjacent"))
    np.testing.assert_allclose(adjacent, half[..., order], atol=1e-6)
    assert np.abs(half - rotate(Q, POSITIONS, RopeConfig(layout="adjacent"))).max() > 0.1


@pytest.mark.parametrize("config", [RopeConfig(), RopeConfig(layout="adjacent", fraction=0.5)])
def test_scores_depend_on_distances_only(config: RopeConfig) -> None:
    def scores(shift: int) -> np.ndarray:
        q, k = rotate(Q, POSITIONS + shift, config), rotate(K, POSITIONS + shift, config)
        return np.einsum("bshd,bthd->bhst", q, k)

    np.testing.assert_allclose(scores(31), scores(0), atol=2e-4)
    plain = np.einsum("bshd,bthd->bhst", Q, K)
    same = POSITIONS[:, None, :, None] == POSITIONS[:, None, None, :]
    np.testing.assert_allclose(scores(5)[np.broadcast_to(same, plain.shape)],
                               plain[np.broadcast_to(same, plain.shape)], atol=2e-5)  # fmt: skip
    assert np.abs(scores(0) - plain).max() > 0.1


def test_the_rest_of_a_head_passes_unchanged() -> None:
    got = rotate(Q, POSITIONS, RopeConfig(fraction=0.25))
    np.testing.assert_array_equal(got[..., 4:], Q[..., 4:])
    small = np.asarray(
        apply_rope(jnp.asarray(Q[..., :4]), *rope_tables(RopeConfig(), 4, POSITIONS), "half")
    )
    np.testing.assert_array_equal(got[..., :4], small)


def test_rotation_is_computed_in_float32_and_returned_as_given() -> None:
    cos, sin = rope_tables(RopeConfig(), D, POSITIONS)
    x = jnp.asarray(Q, jnp.bfloat16)
    got = apply_rope(x, cos, sin, "half")
    assert (cos.dtype, got.dtype) == (jnp.float32, jnp.bfloat16)
    exact = apply_rope(x.astype(jnp.float32), cos, sin, "half")
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))
