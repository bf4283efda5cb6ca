"""The linear recurrence in every form, the TPU kernel interpreted, against a float64 loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from slm_kernels.pallas import interpreted
from slm_kernels.recurrence import linear_recurrence, recurrence_step
from slm_kernels.recurrence.tpu import linear_recurrence_tpu

FORMS = ["xla", "tpu"]
# An unrolled kernel takes XLA:CPU longer to optimise than to run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def inputs(batch: int, length: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Decays of both signs, one of them 0 and one beyond 1."""
    rng = np.random.default_rng(seed)
    sign = rng.choice([-1, 1], (batch, length, width))
    x = dict(
        a=sign * rng.uniform(0, 1, (batch, length, width)) ** 0.25,
        b=rng.normal(size=(batch, length, width)),
        h0=rng.normal(size=(batch, width)),
    )
    x["a"][0, length // 2, 0], x["a"][0, length // 2, -1] = 0, 1.5
    return {name: v.astype(np.float32) for name, v in x.items()}


def resets(batch: int, length: int, share: float = 0.2) -> np.ndarray:
    return np.random.default_rng(1).random((batch, length)) < share


def cotangents(x) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(9)
    shapes = x["b"].shape, x["b"][:, 0].shape
    dh, dlast = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return dh, dlast


def oracle(x, reset, dh, dlast):
    """Outputs, and gradients of `sum(h dh) + sum(last dlast)`, token by token."""
    a, b, h, dh, e = (np.asarray(v, np.float64) for v in (x["a"], x["b"], x["h0"], dh, dlast))
    if reset is not None:
        keep = 1.0 - reset[:, :, None]
    else:
        keep = np.ones((*a.shape[:2], 1))
    hs = [h]
    for t in range(a.shape[1]):
        hs.append(keep[:, t] * a[:, t] * hs[-1] + b[:, t])
    da, db = np.zeros(a.shape), np.zeros(a.shape)
    for t in reversed(range(a.shape[1])):
        db[:, t] = e + dh[:, t]
        da[:, t] = db[:, t] * keep[:, t] * hs[t]
        e = db[:, t] * keep[:, t] * a[:, t]
    return np.stack(hs[1:], 1), hs[-1], {"a": da, "b": db, "h0": e}


def run(implementation: str, x, reset=None, chunk: int = 8, strict: bool = False):
    """Outputs and gradients; strictly interpreted, memory starts as NaN and races are errors."""
    x = {k: jnp.asarray(v) for k, v in x.items()}
    reset = None if reset is None else jnp.asarray(reset)
    dh, dlast = cotangents(x)
    if implementation == "tpu":
        form = functools.partial(linear_recurrence_tpu, chunk=chunk)
    else:
        form = functools.partial(linear_recurrence, implementation=implementation)

    def both(x, dh, dlast):
        (h, last), vjp = jax.vjp(lambda x: form(**({"h0": None} | x), reset=reset), x)
        return h, last, vjp((dh.astype(h.dtype), dlast))[0]

    if implementation == "reference":
        return both(x, dh, dlast)
    with interpreted(None if strict else True):
        return jax.device_get(jax.jit(both, compiler_options=QUICK)(x, dh, dlast))


def assert_close(got, want, bar: float = 1e-5, what: str = "") -> None:
    """The largest error over the largest value."""
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape, what
    assert np.max(np.abs(got - want)) <= bar * np.max(np.abs(want)), what


def check(implementation: str, x, reset=None, **options) -> None:
    h, last, grads = run(implementation, x, reset, **options)
    want_h, want_last, want = oracle(x, reset, *cotangents(x))
    assert_close(h, want_h, what="h")
    assert_close(last, want_last, what="last")
    for name in want:
        assert_close(grads[name], want[name], what=name)


def test_reference_is_the_float64_loop() -> None:
    check("reference", inputs(2, 4, 3), resets(2, 4))


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(
    ("length", "width", "with_reset"),
    [(1, 3, False), (8, 128, False), (21, 130, True)],
)
def test_form_and_gradients_are_the_float64_loop(
    implementation: str, length: int, width: int, with_reset: bool
) -> None:
    check(implementation, inputs(2, length, width), resets(2, length) if with_reset else None)


def test_no_memory_is_read_unwritten_or_raced_for() -> None:
    # Two chunks, the second shorter; 9 groups of channels, 8 of them a register, and padding.
    check("tpu", inputs(1, 21, 1030), resets(1, 21), chunk=16, strict=True)


@pytest.mark.slow
def test_channels_beyond_a_block() -> None:
    check("tpu", inputs(1, 9, 65 * 128))  # two blocks of 33 groups, one of them padding


@pytest.mark.parametrize("implementation", FORMS)
def test_first_token_resets_and_every_token_resets(implementation: str) -> None:
    x, reset = inputs(2, 12, 4), np.zeros((2, 12), bool)
    reset[0] = True
    reset[1, [0, 8]] = True  # and the first of a chunk
    check(implementation, x, reset)
    np.testing.assert_array_equal(run(implementation, x, reset)[2]["h0"], 0)


@pytest.mark.parametrize("implementation", FORMS)
def test_without_initial_state(implementation: str) -> None:
    x = inputs(1, 5, 4)
    h, last, grads = run(implementation, {k: x[k] for k in "ab"})
    want_h, want_last, want = oracle(x | {"h0": 0 * x["h0"]}, None, *cotangents(x))
    assert_close(h, want_h)
    assert_close(last, want_last)
    for name in "ab":
        assert_close(grads[name], want[name], what=name)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("low", [("b",), ("a", "b")])
def test_bfloat16_inputs_keep_a_float32_state(implementation: str, low: tuple[str, ...]) -> None:
    x = inputs(1, 20, 130)
    x |= {k: np.asarray(jnp.asarray(x[k], jnp.bfloat16)) for k in low}
    h, last, grads = run(implementation, x)
    assert (h.dtype, last.dtype) == (jnp.bfloat16, np.float32)
    dh, dlast = cotangents(inputs(1, 20, 130))
    dh = np.asarray(jnp.asarray(dh, jnp.bfloat16), np.float64)
    want_h, want_last, want = oracle(x, None, dh, dlast)
    assert_close(last, want_last)
    assert_close(grads["h0"], want["h0"])
    assert_close(h, want_h, 2**-8)  # rounded once, at the end
    for name in "ab":
        assert grads[name].dtype == x[name].dtype
        assert_close(grads[name], want[name], 2**-7, name)  # from h, rounded


@pytest.mark.parametrize("implementation", FORMS)
def test_state_goes_from_chunk_to_chunk(implementation: str) -> None:
    x = inputs(2, 12, 4)
    want, want_last, _ = oracle(x, None, *cotangents(x))
    state, hs = x["h0"], []
    for begin, end in ((0, 8), (8, 12)):
        part = {k: x[k][:, begin:end] for k in "ab"}
        h, state, _ = run(implementation, part | {"h0": state})
        hs.append(h)
    np.testing.assert_allclose(np.concatenate(hs, 1), want, atol=1e-6)
    np.testing.assert_allclose(state, want_last, atol=1e-6)


def test_steps_are_the_recurrence() -> None:
    x, reset = inputs(2, 6, 4), resets(2, 6, 0.5)
    want, _, _ = oracle(x, reset, *cotangents(x))
    state = x["h0"]
    for t in range(6):
        state = recurrence_step(state, x["a"][:, t], x["b"][:, t], 1.0 - reset[:, t])
        np.testing.assert_allclose(state, want[:, t], atol=1e-6)


def test_long_recurrence_keeps_float32_accuracy() -> None:
    x = inputs(1, 500, 8)
    x["a"] = np.abs(x["a"]).astype(np.float32) ** 0.01  # a memory of hundreds of steps
    check("xla", x)


def test_a_permuted_batch_gives_permuted_results() -> None:
    x, order = inputs(3, 9, 5), [2, 0, 1]
    one, other = run("tpu", x), run("tpu", {k: v[order] for k, v in x.items()})
    for got, want in zip(other[:2], one[:2], strict=True):
        np.testing.assert_array_equal(got, want[order])


def test_kernel_under_vmap_scan_and_remat() -> None:
    x = inputs(3, 9, 4)
    a, b = (jnp.asarray(x[k])[:, None] for k in "ab")  # mapped: rows of batch 1
    want = run("xla", {k: x[k] for k in "ab"})[0]

    def layer(h, _):
        h, last = linear_recurrence_tpu(a[0], h, h0=None, reset=None, chunk=8)
        return h, last

    def depth(form):
        return jax.grad(lambda b: (form(b) ** 2).sum())

    def scanned(b):
        return jax.lax.scan(jax.checkpoint(layer), b, length=2)[0]

    def twice(b):
        for _ in range(2):
            b = linear_recurrence(a[0], b, implementation="xla")[0]
        return b

    with interpreted(True):
        mapped = jax.vmap(lambda a, b: linear_recurrence_tpu(a, b, h0=None, reset=None)[0])
        np.testing.assert_allclose(mapped(a, b)[:, 0], want, atol=1e-6)
        np.testing.assert_allclose(depth(scanned)(b[0]), depth(twice)(b[0]), rtol=1e-4, atol=1e-5)


def test_rows_and_channels_may_be_split_over_devices() -> None:
    x, reset = inputs(2, 9, 8), resets(2, 9)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Explicit,) * 2)
    specs = {"a": P("data", None, "tensor"), "b": P("data", None, "tensor"), "h0": P("data")}

    def loss(x):
        h, last = linear_recurrence(**x, reset=reset, implementation="tpu")
        return jnp.sum(h**2) + jnp.sum(last)

    with interpreted(True):
        want = jax.device_get(jax.grad(loss)(x))
        with jax.set_mesh(mesh):
            split = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in x.items()}
            got = jax.jit(jax.grad(loss))(split)
            turned = NamedSharding(mesh, P(None, "tensor"))
            b = jax.device_put(np.zeros((2, 8, 8), np.float32), turned)
            with pytest.raises(ValueError, match="b is split over tensor along the sequence"):
                linear_recurrence(b, b, implementation="tpu")
    for name in x:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@settings(max_examples=5)
@given(
    length=st.integers(1, 40),
    width=st.integers(1, 300),
    chunk=st.sampled_from([8, 16, 24]),
    share=st.sampled_from([None, 0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_recurrence_of_any_shape(length, width, chunk, share, seed) -> None:
    reset = None if share is None else resets(1, length, share)
    check("tpu", inputs(1, length, width, seed), reset, chunk=chunk)


def test_errors_name_the_argument() -> None:
    x = inputs(2, 4, 4)
    with pytest.raises(ValueError, match=r"a\(2, 3, 4\): want \(2, 4, 4\) to go with b"):
        linear_recurrence(x["a"][:, :3], x["b"])
    with pytest.raises(ValueError, match=r"h0\(1, 4\): want \(2, 4\)"):
        linear_recurrence(x["a"], x["b"], x["h0"][:1])
    with pytest.raises(ValueError, match=r"implementation='fast' does not exist.*reference, xla"):
        linear_recurrence(x["a"], x["b"], implementation="fast")
    with pytest.raises(ValueError, match="a is float16: cast it to"):
        linear_recurrence(x["a"].astype(np.float16), x["b"], implementation="tpu")
    with pytest.raises(ValueError, match="chunk=12: want a positive multiple of 8"):
        linear_recurrence_tpu(x["a"], x["b"], h0=None, reset=None, chunk=12)
