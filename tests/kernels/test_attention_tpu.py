"""The TPU kernel, interpreted, against a float64 softmax; bars relative to the "xla" form.

Memory starts as NaN and races are errors. FlashAttention's rule: the kernel's error is at most
twice (gradients: three times) that of plain attention in the same dtype.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slm_kernels.attention import tpu_backward
from slm_kernels.attention.tpu import Blocks, attention_tpu
from slm_kernels.attention.xla import attention_xla
from slm_kernels.pallas import interpreted

SMALL = Blocks(q=128, kv=128, q_tile=128, kv_tile=128)
TILED = Blocks(q=256, kv=256, q_tile=128, kv_tile=128)
# Of the largest value of the case: dq and dk are differences of rounded sums, and where they cancel
# (a window of 1: both are exactly 0) plain attention may be off by 0.
FLOOR = 5e-7


def exact(q, k, v, do, m):
    """Output and the gradients for the cotangent `do`, in float64."""
    q, k, v, do = (np.float64(x) for x in (q, k, v, do))
    group = q.shape[2] // k.shape[2]
    kh, vh = (np.repeat(x, group, axis=2) for x in (k, v))
    qp, kp = m["q_positions"][:, :, None], m["kv_positions"][:, None, :]
    seen = (kp >= 0) & (qp >= kp if m["causal"] else True)
    if m["window"] is not None:
        seen = seen & (abs(qp - kp) < m["window"])
    if m["q_segments"] is not None:
        seen = seen & (m["q_segments"][:, :, None] == m["kv_segments"][:, None, :])
    seen = np.broadcast_to(seen, (q.shape[0], *seen.shape[1:]))[:, None]
    s = np.einsum("bshd,bthd->bhst", q, kh) * m["scale"]
    slope = 1.0
    if m["softcap"] is not None:
        s = m["softcap"] * np.tanh(s / m["softcap"])
        slope = 1 - (s / m["softcap"]) ** 2
    p = np.exp(s - s.max(axis=-1, keepdims=True)) * seen
    total = p.sum(axis=-1, keepdims=True)
    p = p / np.where(total == 0, 1, total)
    out = np.einsum("bhst,bthd->bshd", p, vh)
    dp = np.einsum("bshd,bthd->bhst", do, vh)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * slope * m["scale"]
    dq = np.einsum("bhst,bthd->bshd", ds, kh)
    dk = np.einsum("bhst,bshd->bthd", ds, q).reshape(*k.shape[:2], -1, group, k.shape[3])
    dv = np.einsum("bhst,bshd->bthd", p, do).reshape(dk.shape)
    return out, dq, dk.sum(axis=3), dv.sum(axis=3)


def documents(batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions of packed rows."""
    starts = np.random.default_rng(2).random((batch, length)) < 6 / length
    segments = np.cumsum(starts, axis=1) + 1
    index = np.arange(length)
    begin = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return segments.astype(np.int32), (index - begin).astype(np.int32)


def errors(s, t=None, heads=(1, 1), dim=16, batch=1, dtype=np.float32, packed=False, blocks=SMALL,
           kernel=None, interpreter=interpreted, **given_mask):  # fmt: skip
    """Largest errors of kernel and of plain attention, and largest values: three lists of four."""
    t = s if t is None else t
    mask = dict(causal=True, window=None, softcap=None, scale=dim**-0.5, in_order=s == t)
    mask |= dict(q_segments=None, kv_segments=None, kv_positions=np.arange(t)[None])
    mask |= dict(q_positions=np.arange(t - s, t)[None]) | given_mask
    if packed:
        segments, positions = documents(batch, s)
        mask |= dict(q_segments=segments, kv_segments=segments)
        mask |= dict(q_positions=positions, kv_positions=positions)
    rng = np.random.default_rng(0)
    shapes = [(batch, n, h, dim) for n, h in zip((s, t, t, s), (*heads, heads[1], heads[0]))]  # noqa: B905
    q, k, v, do = (jnp.asarray(rng.normal(size=x), dtype) for x in shapes)

    @partial(jax.jit, static_argnums=0)
    def run(attention, q, k, v, do):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, **mask), q, k, v)
        return out, *pull(do)

    plain = run(attention_xla, q, k, v, do)
    with interpreter():
        kernel = kernel or partial(attention_tpu, blocks=blocks)
        got = jax.block_until_ready(run(kernel, q, k, v, do))
    want = exact(*(np.asarray(x, np.float64) for x in (q, k, v, do)), mask)
    assert all(x.dtype == q.dtype for x in got)

    def far(found):
        return [
            np.abs(np.asarray(a, np.float64) - b).max() for a, b in zip(found, want, strict=True)
        ]

    return far(got), far(plain), [np.abs(x).max() for x in want]


def check(*args, **kwargs) -> None:
    kernel, plain, largest = errors(*args, **kwargs)
    for got, bar, factor in zip(kernel, plain, (2, 3, 3, 3), strict=True):
        assert got <= factor * bar + FLOOR * max(largest)


EMPTY = np.where(np.arange(200) == 60, -1, np.arange(200))[None]
RING = np.roll(EMPTY, 77, axis=1)
CASES = {
    "causal, grouped heads": dict(s=256, heads=(4, 2)),
    "causal, tiles of a block": dict(s=500, heads=(1, 1), blocks=TILED),
    "window, tiles of a block": dict(s=512, heads=(1, 1), window=100, blocks=TILED),
    "window of 1": dict(s=256, window=1),
    "one key head": dict(s=200, heads=(3, 1)),
    "documents": dict(s=260, packed=True, heads=(1, 1), batch=2),
    "documents, window": dict(s=260, packed=True, window=150),
    "softcap": dict(s=200, softcap=2.0, scale=1.0),
    "softcap, documents, window": dict(s=200, softcap=2.0, packed=True, window=30),
    "two-sided": dict(s=150, in_order=False, causal=False),
    "two-sided, window": dict(s=150, in_order=False, causal=False, window=40),
    "two-sided, documents": dict(s=150, in_order=False, causal=False, packed=True),
    "prefill of a chunk, empty slot": dict(s=140, t=200, heads=(4, 2), kv_positions=EMPTY),
    "prefill on a ring, window": dict(s=140, t=200, kv_positions=RING, window=50),
    "one query": dict(s=1, t=200, heads=(4, 2), kv_positions=EMPTY, batch=2),
    "a few queries": dict(s=5, t=130, heads=(4, 1)),
    "bfloat16": dict(s=256, heads=(4, 2), dim=64, dtype=jnp.bfloat16),
    "bfloat16, documents": dict(s=200, packed=True, dtype=jnp.bfloat16),
    "wide heads": dict(s=130, heads=(1, 1), dim=192),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_is_as_near_to_float64_as_plain_attention(case: str) -> None:
    check(**CASES[case])


def test_gradients_of_long_rows_are_sums_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    room = 6 * 4 * 128 * 256  # a sixth of it holds two of four blocks
    monkeypatch.setattr(tpu_backward, "vmem_limit", lambda: room)
    check(s=400, heads=(1, 1), window=200)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    s=st.integers(1, 280),
    extra=st.integers(0, 60),
    heads=st.sampled_from([(1, 1), (2, 1), (6, 2)]),
    window=st.none() | st.integers(1, 200),
    softcap=st.none() | st.just(3.0),
    causal=st.booleans(),
)
def test_any_shape_and_mask(s, extra, heads, window, softcap, causal) -> None:
    in_order = causal and extra == 0
    check(s, s + extra, heads, 8, causal=causal, window=window, softcap=softcap, in_order=in_order)


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 140, 1, 8)), jnp.float32) for _ in range(3))
    positions = np.where(np.arange(140) < 4, -1, np.arange(140) - 4)[None]  # four of left padding

    def total(q, k, v):
        y = attention_tpu(
            q, k, v, q_positions=positions, kv_positions=positions, q_segments=None,
            kv_segments=None, causal=True, in_order=False, window=None, softcap=None, scale=0.3,
            blocks=SMALL,
        )  # fmt: skip
        return jnp.sum(y * jnp.arange(8.0)), y

    with interpreted():
        grads, y = jax.block_until_ready(jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v))
    assert (np.asarray(y)[:, :4] == 0).all()
    for g in grads:
        assert np.isfinite(g).all()
        assert (np.asarray(g)[:, :4] == 0).all()
        assert (np.asarray(g)[:, 5:] != 0).any()


def plain_call(attention, q, k, v):
    index = jnp.arange(q.shape[1])[None]
    return attention(
        q, k, v, q_positions=index, kv_positions=index, q_segments=None, kv_segments=None,
        causal=True, in_order=True, window=None, softcap=None, scale=0.3,
    )  # fmt: skip


def transformed(attention, q, k, v):
    """Mapped over a new axis, scanned over layers, recomputed in the backward pass."""

    @jax.checkpoint
    def layer(x, _):
        return jax.vmap(partial(plain_call, attention))(x, k, v), None

    return jax.lax.scan(layer, q, None, length=2)[0]


def test_kernel_works_under_vmap_scan_and_remat() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 1, 128, 1, 8)), jnp.float32) for _ in range(3))

    def gradient(attention):
        return jax.jit(jax.grad(lambda *x: jnp.sum(transformed(attention, *x) ** 2), (0, 1, 2)))

    want = gradient(attention_xla)(q, k, v)
    with interpreted(True):  # jax.checkpoint refuses the effects of the other interpreter
        got = jax.block_until_ready(gradient(attention_tpu)(q, k, v))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_kernel_works_under_shard_map() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 130, 2, 8)), jnp.float32) for _ in range(3))

    def gradient(attention):
        specs = spec, spec, jax.P()  # values on every device: their gradient is a sum over them
        run = jax.shard_map(
            partial(plain_call, attention), mesh=mesh, in_specs=specs, out_specs=spec
        )
        return jax.grad(lambda *x: jnp.sum(run(*x) ** 2), (0, 1, 2))

    want = jax.jit(gradient(attention_xla))(q, k, v)
    with interpreted():
        got = jax.block_until_ready(jax.jit(gradient(attention_tpu))(q, k, v))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_errors_name_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="q_tile=256 is more than q=128"):
        Blocks(q=128, q_tile=256)
    with pytest.raises(ValueError, match="kv=96 is not a power of two from 128"):
        Blocks(kv=96)
    q = jnp.zeros((1, 128, 1, 8))
    with pytest.raises(ValueError, match="q is float32, k bfloat16, v float32"):
        plain_call(attention_tpu, q, q.astype(jnp.bfloat16), q)
