"""The Hopper kernel, interpreted, against a float64 softmax; bars relative to the "xla" form.

Memory starts as NaN and races are errors. FlashAttention's rule: the kernel's error is at most
twice (gradients: three times) that of plain attention in the same dtype. The interpreter runs
wgmma at once: a missing wait for one does not show here.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slm_kernels import attention as package
from slm_kernels.aot.compile import pallas_calls
from slm_kernels.attention import attention
from slm_kernels.attention.cudnn import attention_cudnn
from slm_kernels.attention.gpu import attention_gpu
from slm_kernels.attention.xla import attention_xla

from tests.kernels.interpret_gpu import interpreted_gpu
from tests.kernels.test_attention_tpu import check as check_kernel
from tests.kernels.test_attention_tpu import plain_call, transformed

# On the tiles of the kernel, in its dtypes; the bars are those of the TPU's.
check = partial(
    check_kernel, dim=64, dtype=jnp.bfloat16, kernel=attention_gpu, interpreter=interpreted_gpu
)

EMPTY = np.where(np.arange(200) == 60, -1, np.arange(200))[None]
CASES = {
    "causal, grouped heads": dict(s=256, heads=(2, 1)),
    "softcap, documents, window": dict(s=200, softcap=2.0, scale=1.0, packed=True, window=90),
    "prefill of a chunk, empty slot": dict(s=100, t=200, kv_positions=EMPTY, dim=128),
}
MORE_CASES = {
    "causal, wide heads": dict(s=384, heads=(4, 2), dim=128),
    "causal, one token more than a block": dict(s=129),
    "documents": dict(s=300, packed=True, heads=(2, 2), batch=2),
    "window": dict(s=400, window=100, heads=(2, 1)),
    "window of 1": dict(s=150, window=1),
    "softcap": dict(s=130, softcap=2.0, scale=1.0, dim=128),
    "two-sided": dict(s=150, in_order=False, causal=False, heads=(3, 1)),
    "two-sided, window": dict(s=300, in_order=False, causal=False, window=40),
    "two-sided, documents": dict(s=150, in_order=False, causal=False, packed=True),
    "prefill on a ring, window": dict(
        s=140, t=200, kv_positions=np.roll(EMPTY, 77, axis=1), window=50
    ),
    "one query": dict(s=1, t=300, heads=(2, 1), batch=2),
    "float16": dict(s=200, dtype=jnp.float16),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_is_as_near_to_float64_as_plain_attention(case: str) -> None:
    check(**CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES)
def test_every_kind_of_mask_and_shape(case: str) -> None:
    check(**MORE_CASES[case])


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    s=st.integers(1, 280),
    extra=st.integers(0, 60),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3)]),
    window=st.none() | st.integers(1, 200),
    softcap=st.none() | st.just(3.0),
    causal=st.booleans(),
)
def test_any_shape_and_mask(s, extra, heads, window, softcap, causal) -> None:
    in_order = causal and extra == 0
    check(s, s + extra, heads, causal=causal, window=window, softcap=softcap, in_order=in_order)


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 128, 1, 64)), jnp.bfloat16) for _ in range(3))
    positions = np.where(np.arange(128) < 4, -1, np.arange(128) - 4)[None]  # four of left padding

    def total(q, k, v):
        y = attention_gpu(
            q, k, v, q_positions=positions, kv_positions=positions, q_segments=None,
            kv_segments=None, causal=True, in_order=False, window=None, softcap=None, scale=0.3,
        )  # fmt: skip
        return jnp.sum(y * jnp.arange(64.0)), y

    with interpreted_gpu():
        grads, y = jax.block_until_ready(jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v))
    assert (np.asarray(y)[:, :4] == 0).all()
    for g in grads:
        assert np.isfinite(np.asarray(g, np.float32)).all()
        assert (np.asarray(g)[:, :4] == 0).all()
        assert (np.asarray(g)[:, 5:] != 0).any()


def test_kernel_can_be_traced_under_vmap_scan_and_remat() -> None:
    x = jax.ShapeDtypeStruct((2, 1, 128, 1, 64), jnp.bfloat16)  # the interpreter refuses remat

    def total(q, k, v):
        return jnp.sum(transformed(attention_gpu, q, k, v).astype(jnp.float32))

    grads = jax.eval_shape(jax.grad(total, (0, 1, 2)), x, x, x)
    assert [g.shape for g in grads] == [x.shape] * 3


@pytest.mark.slow
def test_kernel_works_under_vmap() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 1, 128, 1, 64)), jnp.bfloat16) for _ in range(3))

    def gradient(attention):
        run = jax.vmap(partial(plain_call, attention))
        return jax.jit(jax.grad(lambda *x: jnp.sum(run(*x).astype(jnp.float32) ** 2), (0, 1, 2)))

    want = gradient(attention_xla)(*(x.astype(jnp.float32) for x in (q, k, v)))
    with interpreted_gpu():
        got = jax.block_until_ready(gradient(attention_gpu)(q, k, v))
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


@pytest.mark.slow
def test_kernel_works_under_shard_map() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 130, 1, 64)), jnp.bfloat16) for _ in range(3))

    def gradient(attention):
        run = jax.shard_map(
            partial(plain_call, attention), mesh=mesh, in_specs=spec, out_specs=spec
        )
        return jax.grad(lambda *x: jnp.sum(run(*x).astype(jnp.float32) ** 2), (0, 1, 2))

    want = jax.jit(gradient(attention_xla))(*(x.astype(jnp.float32) for x in (q, k, v)))
    with interpreted_gpu():
        got = jax.block_until_ready(jax.jit(gradient(attention_gpu))(q, k, v))
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


def gpu(kind: str) -> jax.sharding.AbstractMesh:
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return jax.sharding.AbstractMesh(
        (1,), ("d",), (jax.sharding.AxisType.Auto,), abstract_device=device
    )


@pytest.mark.parametrize(
    ("kind", "length", "dim", "dtype", "chosen"),
    [
        ("NVIDIA H100 80GB HBM3", 256, 64, jnp.bfloat16, "gpu"),
        ("NVIDIA H200", 128, 128, jnp.float16, "gpu"),
        ("NVIDIA H100 80GB HBM3", 127, 64, jnp.bfloat16, "xla"),
        ("NVIDIA H100 80GB HBM3", 256, 80, jnp.bfloat16, "xla"),
        ("NVIDIA H100 80GB HBM3", 256, 64, jnp.float32, "xla"),
        ("NVIDIA A100-SXM4-80GB", 256, 64, jnp.bfloat16, "xla"),
        ("NVIDIA B200", 256, 64, jnp.bfloat16, "xla"),
    ],
)
def test_default_on_gpus(
    kind: str, length: int, dim: int, dtype: Any, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    for name in ("gpu", "xla"):

        def run(q, name=name, **_):
            ran.append(name)
            return q

        monkeypatch.setitem(package.IMPLEMENTATIONS, name, run)
    x = jax.ShapeDtypeStruct((1, length, 1, dim), dtype)
    index = np.arange(length)[None]
    with jax.sharding.use_abstract_mesh(gpu(kind)):
        jax.eval_shape(
            partial(attention, q_positions=index, kv_positions=index, in_order=True), x, x, x
        )
    assert ran == [chosen]


def test_a_plan_finds_the_calls_of_the_kernel() -> None:
    x = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    index = np.arange(128)[None]
    call = partial(attention, q_positions=index, kv_positions=index, in_order=True)
    with jax.sharding.use_abstract_mesh(gpu("NVIDIA H100 80GB HBM3")):
        (found,) = pallas_calls(jax.make_jaxpr(call)(x, x, x).jaxpr)
    assert (found.name, found.runs) == ("attention_forward", 1)
    assert found.flops > 0


def test_errors_name_what_does_not_fit() -> None:
    def x(dim=64, dtype=jnp.bfloat16):
        return jnp.zeros((1, 128, 1, dim), dtype)

    with pytest.raises(ValueError, match="q is float16, k bfloat16, v float16"):
        plain_call(attention_gpu, x(dtype=jnp.float16), x(), x(dtype=jnp.float16))
    with pytest.raises(
        ValueError, match=r"dtype=float32 is not for wgmma.*use implementation='xla'"
    ):
        plain_call(attention_gpu, *(x(dtype=jnp.float32),) * 3)
    with pytest.raises(ValueError, match=r"head_dim=80 has no.*choose 64 or 128.*'xla'"):
        plain_call(attention_gpu, *(x(80),) * 3)
    rest = dict(q_positions=None, kv_positions=None, q_segments=None, kv_segments=None)
    rest |= dict(causal=True, in_order=True, window=None, softcap=None, scale=1.0)
    with pytest.raises(ValueError, match=r"scale=-1.0 is not positive.*use implementation='xla'"):
        attention_gpu(x(), x(), x(), **rest | dict(scale=-1.0))
    with (
        jax.sharding.use_abstract_mesh(gpu("NVIDIA A100-SXM4-80GB")),
        pytest.raises(ValueError, match=r"for Hopper GPUs.*use implementation='cudnn' or 'xla'"),
    ):
        attention_gpu(x(), x(), x(), **rest)
    for wrong, message in {
        "in_order": "wants causal=True and in_order=True, got True and False",
        "q_segments": "knows no documents",
        "softcap": "softcap=3.0: .* no soft-cap",
    }.items():
        value = {"in_order": False, "q_segments": np.zeros((1, 128)), "softcap": 3.0}[wrong]
        with pytest.raises(ValueError, match=message):
            attention_cudnn(x(), x(), x(), **rest | {wrong: value})
