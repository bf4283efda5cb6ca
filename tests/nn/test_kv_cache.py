"""Where tokens stand in a cache, and how near int8 keys and values are."""

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.nn.kv_cache import KVCache, empty_cache, numbers, packed, written

RNG = np.random.default_rng(0)


def put(cache: KVCache, positions: list[list[int]], values: np.ndarray | None = None) -> KVCache:
    at = jnp.array(positions, jnp.int32)
    kv = jnp.arange(100.0)[at][..., None, None] if values is None else jnp.asarray(values)
    return written(cache, packed(cache, kv, -kv, at))


def test_a_token_stands_at_its_position_modulo_the_capacity() -> None:
    """Padding is not written, rows go their own ways, and of two for one slot the later stays."""
    cache = put(empty_cache(2, 4, 1, 1, jnp.float32), [[-1, 0, 1], [4, 5, 6]])
    np.testing.assert_array_equal(cache.positions, [[0, 1, -1, -1], [4, 5, 6, -1]])
    cache = put(cache, [[2, 3, 4, 5, 6, 7], [-1, -1, -1, -1, 7, 8]])
    np.testing.assert_array_equal(cache.positions, [[4, 5, 6, 7], [8, 5, 6, 7]])
    np.testing.assert_array_equal(cache.k[..., 0, 0], cache.positions)
    np.testing.assert_array_equal(cache.v, -cache.k)
    # Taken back: the next tokens go over those that were rejected.
    again = put(cache, [[6, -1], [7, 8]], np.full((2, 2, 1, 1), 50.0))
    np.testing.assert_array_equal(again.positions, cache.positions)
    np.testing.assert_array_equal(again.k[..., 0, 0], [[4, 5, 50, 7], [50, 5, 6, 50]])


def test_int8_is_off_by_half_a_step_of_its_head() -> None:
    at = [list(range(5)), [-1, 0, 1, 2, 3]]
    values = RNG.normal(size=(2, 5, 3, 16)).astype(np.float32)
    values[0, 2, 1] = 0  # nothing to scale by
    values[0, 3] *= 1e-20
    cache = put(empty_cache(2, 8, 3, 16, jnp.int8), at, values)
    assert cache.k.dtype == cache.v.dtype == jnp.int8
    k, v = numbers(cache, jnp.float32)
    for row, places in enumerate(at):
        for i, place in enumerate(places):
            if place >= 0:
                step = np.abs(values[row, i]).max(-1, keepdims=True) / 127
                for got, want in ((k, values), (v, -values)):
                    error = np.abs(np.asarray(got[row, place]) - want[row, i])
                    assert (error <= step / 2 * (1 + 1e-5)).all()
    assert jax.tree.leaves(cache)[0].nbytes == 2 * 8 * 3 * 16
