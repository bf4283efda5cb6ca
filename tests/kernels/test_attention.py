"""Attention against a float64 loop in numpy and against jax's own."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slm_kernels.attention import attention

IMPLEMENTATIONS = ["reference", "xla"]
run = jax.jit(
    attention,
    static_argnames=("causal", "in_order", "window", "softcap", "scale", "implementation"),
)


def qkv(s: int, t: int, heads: int = 4, kv_heads: int = 2, d: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((2, s, heads, d), (2, t, kv_heads, d), (2, t, kv_heads, d))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def oracle(
    q, k, v, *, q_positions, kv_positions, q_segments=None, kv_segments=None, causal=True,
    window=None, softcap=None, scale=None,
) -> np.ndarray:  # fmt: skip
    """One query after another, over the list of keys that it sees."""
    q, k, v = (np.float64(x) for x in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, s, h in product(range(q.shape[0]), range(q.shape[1]), range(q.shape[2])):
        qp = q_positions[b % len(q_positions), s]
        seen = []
        for t, kp in enumerate(kv_positions[b % len(kv_positions)]):
            near = window is None or abs(qp - kp) < window
            mine = q_segments is None or q_segments[b, s] == kv_segments[b, t]
            if kp >= 0 and (kp <= qp or not causal) and near and mine:
                seen.append(t)
        if seen:
            score = k[b, seen, h // group] @ q[b, s, h] * (scale or q.shape[3] ** -0.5)
            if softcap:
                score = softcap * np.tanh(score / softcap)
            p = np.exp(score - score.max())
            out[b, s, h] = p @ v[b, seen, h // group] / p.sum()
    return out


ROW = np.arange(12)[None]
PACKED = np.array([[1] * 5 + [2] * 7, [0] * 2 + [1] * 9 + [0]])
PACKED_POSITIONS = np.array([[*range(5), *range(7)], [0, 1, *range(9), 0]])
CASES = {
    "causal": dict(),
    "window": dict(window=3),
    "window 1": dict(window=1),
    "two-sided": dict(causal=False),
    "two-sided window": dict(causal=False, window=3),
    "softcap and scale": dict(softcap=2.0, scale=1.5),
    "documents": dict(
        q_segments=PACKED, kv_segments=PACKED,
        q_positions=PACKED_POSITIONS, kv_positions=PACKED_POSITIONS,
    ),
    "ring cache": dict(  # five queries, slots out of order, some empty, one of the future
        q_positions=np.arange(4, 9)[None],
        kv_positions=np.array([[8, 9, -1, 3, 4, 5, 6, 7], [5, 6, 7, -1, -1, -1, -1, -1]]),
        window=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_attention_is_the_float64_loop(case: str, implementation: str) -> None:
    settings = dict(q_positions=ROW, kv_positions=ROW) | CASES[case]
    q, k, v = qkv(settings["q_positions"].shape[1], settings["kv_positions"].shape[1])
    got = run(q, k, v, **settings, implementation=implementation)
    np.testing.assert_allclose(got, oracle(q, k, v, **settings), atol=2e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_is_that_of_jax(kv_heads: int, window: int | None) -> None:
    q, k, v = qkv(12, 12, kv_heads=kv_heads)
    want = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=None if window is None else (window - 1, 0)
    )
    got = run(q, k, v, q_positions=ROW, kv_positions=ROW, window=window, implementation="xla")
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(implementation: str) -> None:
    q, k, v = qkv(12, 12)
    positions = np.where(np.arange(12) < 4, -1, np.arange(12) - 4)[None]  # four of left padding

    def total(q, k, v):
        y = attention(
            q, k, v, q_positions=positions, kv_positions=positions, implementation=implementation
        )
        return jnp.sum(y * jnp.arange(8.0)), y

    grads, y = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    assert (np.asarray(y)[:, :4] == 0).all()
    for g in grads:
        assert np.isfinite(g).all()
        assert (np.asarray(g)[:, :4] == 0).all()
        assert (np.asarray(g)[:, 5:] != 0).any()


def test_gradients_are_those_of_the_reference() -> None:
    q, k, v = qkv(12, 12)
    weights = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    settings = dict(CASES["documents"], window=4, softcap=3.0)

    def loss(qkv, implementation):
        return jnp.sum(attention(*qkv, **settings, implementation=implementation) * weights)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for got, want in zip(gradient((q, k, v), "xla"), gradient((q, k, v), "reference"), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("length", [128, 200])
def test_skipping_what_is_hidden_changes_nothing(length: int, window: int | None) -> None:
    q, k, v = qkv(length, length)
    segments = np.where(np.arange(length) < 70, 1, 2)[None].repeat(2, 0)
    positions = np.where(segments == 1, np.arange(length), np.arange(length) - 70)
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def loss(qkv: tuple[jax.Array, ...], in_order: bool) -> tuple[jax.Array, jax.Array]:
        out = run(
            *qkv,
            q_positions=positions,
            kv_positions=positions,
            q_segments=segments,
            kv_segments=segments,
            in_order=in_order,
            window=window,
        )
        return jnp.sum(out * cotangent), out

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (grads, skipped), (wanted, whole) = gradient((q, k, v), True), gradient((q, k, v), False)
    np.testing.assert_allclose(skipped, whole, atol=1e-5)
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_bfloat16_is_as_near_as_its_rounding() -> None:
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(12, 12))
    settings = dict(q_positions=ROW, kv_positions=ROW)
    got = run(q, k, v, **settings, implementation="xla")
    assert got.dtype == jnp.bfloat16
    want = oracle(*(np.asarray(x, np.float64) for x in (q, k, v)), **settings)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=3 * 2**-8)


def test_errors_name_what_does_not_fit() -> None:
    q, k, v = qkv(4, 6)
    index = np.arange(6)[None]
    with pytest.raises(ValueError, match="in_order=True needs as many keys as queries"):
        attention(q, k, v, q_positions=index[:, :4], kv_positions=index, in_order=True)
    q, k, v = qkv(12, 12)
    places = dict(q_positions=ROW, kv_positions=ROW)
    with pytest.raises(ValueError, match="n_heads=4 is not a multiple of n_kv_heads=3"):
        attention(q, *(np.zeros((2, 12, 3, 8), np.float32),) * 2, **places)
    with pytest.raises(ValueError, match="batch and head_dim must agree"):
        attention(q, k, v[:, :5], **places)
    with pytest.raises(ValueError, match="given together or not at all"):
        attention(q, k, v, **places, q_segments=PACKED)
    with pytest.raises(ValueError, match=r"implementation='flash' does not exist.*reference, xla"):
        attention(q, k, v, **places, implementation="flash")
