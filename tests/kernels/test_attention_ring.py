"""Attention of keys that go round the ring of devices is attention over whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from slm_kernels.attention import attention, ring_attention
from slm_kernels.pallas import interpreted

PARTS = 4
CASES = {
    "documents": dict(),
    "window within a part": dict(window=3),
    "window over two parts, soft-cap": dict(window=6, softcap=2.0),
    "one document": dict(),
    "both directions": dict(causal=False, scale=0.5),
}


def check(length: int, documents: bool, implementation: str, **options) -> None:
    """Output and gradients against the specification, for rows of two documents and padding."""
    mesh = jax.make_mesh((PARTS,), ("ring",), devices=jax.devices()[:PARTS])
    rng = np.random.default_rng(0)
    q, do = (rng.normal(size=(2, length, 4, 8)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(2, length, 2, 8)).astype(np.float32) for _ in range(2))
    index = np.arange(length, dtype=np.int32)[None]
    given = {"positions": index}
    if documents:
        first, end = length // 3, length - 2
        ids = np.where(index < first, 1, np.where(index < end, 2, 0))
        ids = np.concatenate([ids, np.ones_like(ids)]).astype(np.int32)
        starts = np.where(index < first, 0, np.where(index < end, first, end))
        starts = np.concatenate([starts, np.zeros_like(starts)]).astype(np.int32)
        given = {"positions": index - starts, "segments": ids}
    ids = given.get("segments")
    masks = dict(q_segments=ids, kv_segments=ids)
    masks |= {name: given["positions"] for name in ("q_positions", "kv_positions")}
    by_token = P(None, "ring")

    @functools.partial(jax.shard_map, out_specs=by_token, check_vma=False)
    def ring(q, k, v, given):
        segments = given.get("segments")
        return ring_attention(
            q, k, v, positions=given["positions"], segments=segments, axis="ring",
            implementation=implementation, **options,
        )  # fmt: skip

    def all_of(run, q, k, v, do):
        y, back = jax.vjp(run, q, k, v)
        return y, *back(do)

    whole = functools.partial(attention, implementation="reference", **masks, **options)
    want = all_of(whole, *map(jnp.asarray, (q, k, v, do)))
    with jax.set_mesh(mesh):
        args = jax.tree.map(lambda x: jax.reshard(jnp.asarray(x), by_token), (q, k, v, do, given))
        *args, given = args
        got = jax.jit(functools.partial(all_of, lambda q, k, v: ring(q, k, v, given)))(*args)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_a_window_and_a_soft_cap_over_documents_that_cross_borders() -> None:
    check(16, True, "xla", window=6, softcap=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_every_mask(name: str) -> None:
    check(16, name != "one document", "xla", **CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(), dict(window=200, softcap=2.0)])
def test_the_kernel_on_every_part(options: dict) -> None:
    with interpreted():
        check(512, True, "tpu", **options)
