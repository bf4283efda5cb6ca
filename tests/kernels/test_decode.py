"""Decode attention against a float64 loop; the TPU kernel interpreted.

Memory starts as NaN and races are errors, slots beyond the lengths hold NaN, and blocks are of 128
slots. FlashAttention's rule: the kernel's error is at most twice that of plain attention.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from slm_kernels.attention import attention
from slm_kernels.decode import decode_attention, tpu
from slm_kernels.pallas import interpreted

FLOOR = 1e-6


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu, "_BLOCK_BYTES", 1)


def exact(q, k, v, m) -> tuple[np.ndarray, np.ndarray]:
    """One row and head after another over the list of slots that it sees, in float64."""
    batch, n_heads, dim = q.shape
    slots, n_kv_heads = k.shape[1:3]
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for b, h in np.ndindex(batch, n_heads):
        of = h // (n_heads // n_kv_heads)
        length = slots if m.get("lengths") is None else m["lengths"][b]
        at = np.arange(slots)
        query = length - 1
        if m.get("kv_positions") is not None:
            at, query = m["kv_positions"][b % len(m["kv_positions"])], m["q_positions"][b]
        seen = (np.arange(slots) < length) & (at >= 0) & (at <= query)
        if m.get("window") is not None:
            seen &= query - at < m["window"]
        if not seen.any():
            continue
        keys, values = (np.float64(x[b, seen, of]) for x in (k, v))
        for x, name in ((keys, "k_scale"), (values, "v_scale")):
            if m.get(name) is not None:
                x *= np.float64(m[name][b, seen, of, None])
        s = keys @ np.float64(q[b, h]) * (m.get("scale") or dim**-0.5)
        if m.get("softcap") is not None:
            s = m["softcap"] * np.tanh(s / m["softcap"])
        p = np.exp(s - s.max())
        out[b, h] = p @ values / p.sum()
        lse[b, h] = s.max() + np.log(p.sum())
    return out, lse


def inputs(batch, slots, heads, dim, dtype=jnp.float32, int8=False, seed=0, **m):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(batch, heads[0], dim)), dtype)
    shape = (batch, slots, heads[1], dim)
    if int8:
        k, v = (jnp.asarray(rng.integers(-127, 128, shape), jnp.int8) for _ in "kv")
        m |= {n: rng.uniform(0.002, 0.02, shape[:3]).astype(np.float32) for n in SCALES}
    else:
        k, v = (jnp.asarray(rng.normal(size=shape), dtype) for _ in "kv")
    return q, k, v, m


SCALES = ("k_scale", "v_scale")


def run(implementation, q, k, v, m):
    decode = jax.jit(
        partial(decode_attention, implementation=implementation),
        static_argnames=("window", "softcap", "scale"),
    )
    if implementation == "tpu":
        with interpreted():
            return jax.device_get(decode(q, k, v, **m))
    return jax.device_get(decode(q, k, v, **m))


def check(**case) -> None:
    q, k, v, m = inputs(**case)
    want = exact(*(np.asarray(x, np.float64) for x in (q, k, v)), m)
    plain = run("xla", q, k, v, m)
    bad = q, k, v, m
    if m.get("lengths") is not None and not case.get("int8"):
        unseen = np.arange(k.shape[1]) >= m["lengths"][:, None]
        k, v = (jnp.where(unseen[:, :, None, None], jnp.nan, x) for x in (k, v))
        bad = q, k, v, m
    for got, bars, name in ((run("reference", *bad), plain, "reference"),
                            (run("tpu", *bad), plain, "tpu")):  # fmt: skip
        for a, bar, w in zip(got, bars, want, strict=True):
            some = np.isfinite(w)
            np.testing.assert_array_equal(np.isfinite(a), some, err_msg=name)
            if some.any():
                error, rule = (np.abs(np.float64(x) - w)[some].max() for x in (a, bar))
                assert error <= 2 * rule + FLOOR * np.abs(w[some]).max(), (name, error, rule)


ROWS = dict(batch=2, slots=300, heads=(4, 2), dim=128)  # three blocks, the last a part
HEADS = dict(batch=2, slots=200, heads=(6, 3), dim=128)
LANES = dict(batch=2, slots=200, heads=(4, 2), dim=16)
RING = np.stack([np.roll(np.arange(100, 400), 77), np.r_[np.arange(150), np.full(150, -1)]])
CASES = {
    "rows": ROWS,
    "rows, lengths": ROWS | dict(lengths=np.array([0, 131])),
    "rows, whole blocks": ROWS | dict(lengths=np.array([256, 128])),
    "rows, window": ROWS | dict(lengths=np.array([300, 140]), window=9),
    "rows, window, fixed": ROWS | dict(window=50),
    "rows, ring": ROWS | dict(kv_positions=RING, q_positions=np.array([399, 149]), window=200),
    "rows, bfloat16": ROWS | dict(dtype=jnp.bfloat16),
    "rows, int8": ROWS | dict(int8=True, heads=(8, 4), lengths=np.array([300, 77])),
    "heads": HEADS | dict(softcap=2.0),
    "heads, lengths": HEADS | dict(lengths=np.array([200, 1]), scale=0.7),
    "heads, int8 of one head": HEADS | dict(int8=True, heads=(3, 1)),
    "lanes": LANES,
    "lanes, lengths": LANES | dict(lengths=np.array([129, 0])),
    "lanes, short cache": LANES | dict(slots=5, lengths=np.array([5, 2])),
    "lanes, short ring": LANES | dict(
        slots=6, kv_positions=np.array([[4, 5, 0, 1, 2, 3]]), q_positions=np.array([5, 3]),
        window=2,
    ),
    "lanes, int8": LANES | dict(
        int8=True, dtype=jnp.bfloat16, dim=64, lengths=np.array([130, 200])
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_decode_is_the_float64_loop(case: str) -> None:
    check(**CASES[case])


def test_each_order_is_tested() -> None:
    orders = {name: tpu.order_of(inputs(**case)[1]) for name, case in CASES.items()}
    assert all(name.startswith(order) for name, order in orders.items())


@settings(max_examples=4)
@given(
    slots=st.integers(1, 300),
    heads=st.sampled_from([(1, 1), (9, 3), (8, 2)]),
    dim=st.sampled_from([8, 24, 128]),
    window=st.none() | st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_decode_of_any_shape(slots, heads, dim, window, seed) -> None:
    lengths = np.random.default_rng(seed).integers(0, slots + 1, 2)
    check(batch=2, slots=slots, heads=heads, dim=dim, lengths=lengths, window=window, seed=seed)


def test_decode_is_attention_of_one_query() -> None:
    q, k, v, m = inputs(**CASES["rows, ring"])
    one = jax.jit(partial(attention, window=m["window"], implementation="reference"))
    positions = dict(q_positions=m["q_positions"][:, None], kv_positions=m["kv_positions"])
    want = one(q[:, None], k, v, **positions)
    np.testing.assert_allclose(run("xla", q, k, v, m)[0], want[:, 0], atol=2e-6)


def test_parts_of_a_cache_add_up_by_their_log_sum_exp() -> None:
    q, k, v, _ = inputs(**LANES)
    whole, total = run("xla", q, k, v, {})
    parts = [run("xla", q, k[:, at], v[:, at], {}) for at in (slice(0, 70), slice(70, 200))]
    merged = sum(y * np.exp(lse - total)[..., None] for y, lse in parts)
    np.testing.assert_allclose(merged, whole, atol=2e-6)


def test_kernel_works_under_vmap_and_scan() -> None:
    q, k, v, _ = inputs(**LANES)
    lengths = np.array([[200, 129], [1, 0]], np.int32)

    def both(implementation):
        def step(x, n):
            return jax.vmap(
                lambda x, n: decode_attention(
                    x[None], k[:1], v[:1], lengths=n[None], implementation=implementation
                )[0][0]
            )(x, n), None

        return jax.jit(lambda: jax.lax.scan(step, q, lengths)[0])

    want = both("xla")()
    with interpreted(True):
        np.testing.assert_allclose(both("tpu")(), want, atol=2e-6)


def test_kernel_works_on_an_explicit_mesh() -> None:
    q, k, v, m = inputs(**LANES, lengths=np.array([200, 129], np.int32))
    want, _ = run("xla", q, k, v, m)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        put = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in (
                (q, P("data", "tensor")),
                (k, P("data", None, "tensor")),
                (v, P("data", None, "tensor")),
            )
        ]
        with interpreted(True):
            got, lse = jax.jit(partial(decode_attention, implementation="tpu"))(*put, **m)
        assert (jax.typeof(got).sharding.spec, jax.typeof(lse).sharding.spec) == (
            P("data", "tensor", None),
            P("data", "tensor"),
        )
        split = jax.device_put(k, NamedSharding(mesh, P(None, "data")))
        with pytest.raises(ValueError, match="needs whole rows and k is split over data"):
            decode_attention(q, split, split, implementation="tpu")
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_errors_name_what_does_not_fit() -> None:
    q, k, v, _ = inputs(**LANES)
    with pytest.raises(ValueError, match="n_heads=3 is not a multiple of n_kv_heads=2"):
        decode_attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match=r"want q\[B, H, D\], k and v\[B, S, K, D\]"):
        decode_attention(q, k, v[:, 1:])
    with pytest.raises(ValueError, match="k_scale is missing and the cache is int8"):
        decode_attention(q, k.astype(jnp.int8), v.astype(jnp.int8))
    with pytest.raises(ValueError, match="v_scale is given and the cache is float32"):
        decode_attention(q, k, v, v_scale=k[..., 0])
    with pytest.raises(ValueError, match=r"lengths\(1,\): want \(2,\)"):
        decode_attention(q, k, v, lengths=np.array([3]))
    with pytest.raises(ValueError, match="given together or not at all"):
        decode_attention(q, k, v, q_positions=np.array([3, 3]))
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        decode_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="has no gradient: use implementation='xla'"):
        jax.grad(lambda q: decode_attention(q, k, v, implementation="tpu")[0].sum())(q)
