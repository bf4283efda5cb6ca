"""State-space duality in every form, the TPU kernel interpreted, against a float64 recurrence."""

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
from slm_kernels.ssd import ssd, ssd_step
from slm_kernels.ssd.tpu import ssd_tpu
from slm_kernels.ssd.xla import ssd_xla

NAMES = ("x", "dt", "a", "b", "c", "d", "h0")
FORMS = {"xla": ssd_xla, "tpu": ssd_tpu}
# An unrolled kernel takes XLA:CPU longer to optimise than to run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def inputs(
    batch: int, length: int, heads: int, p: int, n: int, groups: int = 1, seed: int = 0
) -> dict[str, np.ndarray]:
    """Steps between 0.001 and 1 and rates between 1 and 16, as Mamba-2 begins with."""
    rng = np.random.default_rng(seed)
    x = dict(
        x=rng.normal(size=(batch, length, heads, p)),
        dt=np.exp(rng.uniform(np.log(1e-3), np.log(1.0), (batch, length, heads))),
        a=-rng.uniform(1, 16, heads),
        b=rng.normal(size=(batch, length, groups, n)),
        c=rng.normal(size=(batch, length, groups, n)),
        d=rng.normal(size=heads),
        h0=rng.normal(size=(batch, heads, p, n)),
    )
    return {name: v.astype(np.float32) for name, v in x.items()}


def resets(batch: int, length: int, share: float = 0.2) -> np.ndarray:
    return np.random.default_rng(1).random((batch, length)) < share


def cotangents(x) -> tuple[np.ndarray, np.ndarray]:
    batch, _, heads, p = x["x"].shape
    rng = np.random.default_rng(9)
    shapes = x["x"].shape, (batch, heads, p, x["b"].shape[3])
    dy, dlast = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return dy, dlast


def oracle(x, reset, dy, dlast):
    """Outputs, and gradients of `sum(y dy) + sum(last dlast)`, token by token."""
    u, dt, a, b, c, d, h = (np.asarray(x[k], np.float64) for k in NAMES)
    dy = np.asarray(dy, np.float64)
    each = u.shape[2] // b.shape[2]
    b_heads, c_heads = (np.repeat(v, each, axis=2)[:, :, :, None] for v in (b, c))
    keep = np.ones(u.shape[:2]) if reset is None else 1.0 - reset
    decay = (np.exp(dt * a) * keep[:, :, None])[..., None, None]
    dtu = (dt[..., None] * u)[..., None]
    before, after = [], []
    for t in range(u.shape[1]):
        before.append(h)
        h = decay[:, t] * h + dtu[:, t] * b_heads[:, t]
        after.append(h)
    y = (np.stack(after, 1) * c_heads).sum(-1) + d[:, None] * u
    grads = {k: np.zeros(x[k].shape) for k in NAMES}
    grads["d"] = (dy * u).sum((0, 1, 3))
    grads["x"] = d[:, None] * dy
    db, dc = np.zeros(b_heads.shape), np.zeros(c_heads.shape)
    e = np.asarray(dlast, np.float64)
    for t in reversed(range(u.shape[1])):
        g = e + c_heads[:, t] * dy[:, t, ..., None]
        e = decay[:, t] * g
        q = (e * before[t]).sum((2, 3))  # the adjoint of dt a
        s = (g * b_heads[:, t]).sum(-1)  # the adjoint of dt u
        grads["x"][:, t] += dt[:, t, :, None] * s
        grads["dt"][:, t] = (u[:, t] * s).sum(-1) + a * q
        grads["a"] += (dt[:, t] * q).sum(0)
        db[:, t, :, 0] = (g * dtu[:, t]).sum(2)
        dc[:, t, :, 0] = (after[t] * dy[:, t, ..., None]).sum(2)
    grads["b"], grads["c"] = (v.reshape(*b.shape[:3], each, b.shape[3]).sum(3) for v in (db, dc))
    grads["h0"] = e
    return y, h, grads


def run(implementation: str, x, reset=None, chunk: int = 8, strict: bool = False):
    """Outputs and gradients; strictly interpreted, memory starts as NaN and races are errors."""
    dy, dlast = cotangents(x)
    x = {k: jnp.asarray(v) for k, v in x.items()}
    form = functools.partial(
        FORMS[implementation], chunk=chunk, reset=None if reset is None else jnp.asarray(reset)
    )

    def both(x, dy, dlast):
        (y, last), vjp = jax.vjp(lambda x: form(**({"d": None, "h0": None} | x)), x)
        return y, last, vjp((dy.astype(y.dtype), dlast))[0]

    with interpreted(None if strict else True):
        return jax.device_get(jax.jit(both, compiler_options=QUICK)(x, dy, dlast))


def assert_close(got, want, bar: float = 1e-5, what: str = "") -> None:
    """The largest error over the largest value."""
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape, what
    assert np.max(np.abs(got - want)) <= bar * np.max(np.abs(want)), what


def check(implementation: str, x, reset=None, **options) -> None:
    y, last, grads = run(implementation, x, reset, **options)
    want_y, want_last, want = oracle(x, reset, *cotangents(x))
    assert_close(y, want_y, what="y")
    assert_close(last, want_last, what="last")
    for name in want:
        assert_close(grads[name], want[name], what=name)


def test_reference_is_the_float64_recurrence() -> None:
    x, reset = inputs(2, 4, 4, 3, 2, groups=2), resets(2, 4)
    x["dt"][0, 2] = 0
    got = ssd(**x, reset=reset, implementation="reference")
    for g, want in zip(got, oracle(x, reset, *cotangents(x))[:2], strict=True):
        assert_close(g, want)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(
    ("length", "heads", "p", "n", "groups", "with_reset"),
    [
        (1, 1, 8, 1, 1, False),  # one step; a tile that one head does not fill
        (19, 4, 64, 3, 2, True),  # three chunks, padded; two groups of a tile each
        (43, 3, 100, 5, 1, True),  # two blocks of four chunks; heads of padded channels
    ],
)
def test_form_and_gradients_are_the_float64_recurrence(
    implementation, length, heads, p, n, groups, with_reset
) -> None:
    batch = 2 if length == 19 else 1
    x = inputs(batch, length, heads, p, n, groups)
    check(implementation, x, resets(batch, length) if with_reset else None)


@pytest.mark.slow
def test_no_memory_is_read_unwritten_or_raced_for() -> None:
    check("tpu", inputs(2, 43, 4, 64, 3, groups=2), resets(2, 43), strict=True)


def test_forward_reads_no_unwritten_memory_and_has_no_race() -> None:
    x = inputs(1, 19, 2, 64, 2)
    want = oracle(x, None, *cotangents(x))
    with interpreted():
        y, last = jax.device_get(ssd_tpu(**x, reset=None, chunk=8))
    assert_close(y, want[0])
    assert_close(last, want[1])


@pytest.mark.parametrize("implementation", FORMS)
def test_resets_and_decays_of_any_strength(implementation: str) -> None:
    x, reset = inputs(2, 24, 2, 64, 2), np.zeros((2, 24), bool)
    reset[0] = True
    reset[1, [0, 8]] = True  # and the first of a chunk
    # Strong decays before weak ones: sums of their logarithms lose what follows in float32.
    x["dt"][1, 9:13] = 60
    x["dt"][1, 13:], x["a"][:] = 1e-3, [-16, -1]
    x["dt"][1, 20] = 0  # passes the state on
    check(implementation, x, reset)


@pytest.mark.parametrize("implementation", FORMS)
def test_optional_arguments(implementation: str) -> None:
    x = inputs(1, 9, 2, 64, 2)
    y, last, grads = run(implementation, {k: v for k, v in x.items() if k not in ("d", "h0")})
    x |= {"d": 0 * x["d"], "h0": 0 * x["h0"]}
    want_y, want_last, want = oracle(x, None, *cotangents(x))
    assert_close(y, want_y)
    assert_close(last, want_last)
    for name, got in grads.items():
        assert_close(got, want[name], what=name)


@pytest.mark.parametrize("implementation", FORMS)
def test_bfloat16_inputs_keep_a_float32_state(implementation: str) -> None:
    low = "x", "b", "c"
    x = inputs(1, 20, 2, 64, 16)
    x |= {k: np.asarray(jnp.asarray(x[k], jnp.bfloat16)) for k in low}
    y, last, grads = run(implementation, x)
    assert (y.dtype, last.dtype) == (jnp.bfloat16, np.float32)
    dy, dlast = cotangents(x)
    dy = np.asarray(jnp.asarray(dy, jnp.bfloat16), np.float64)
    want_y, want_last, want = oracle(x, None, dy, dlast)
    # The kernel rounds the operands of products once, sums in float32: a bfloat16 is 2^-9 off.
    bar = 2**-7 if implementation == "tpu" else 2**-8
    assert_close(y, want_y, bar)
    assert_close(last, want_last, bar)
    for name in grads:
        assert grads[name].dtype == x[name].dtype
        assert_close(grads[name], want[name], bar, name)


def test_state_goes_from_chunk_to_chunk() -> None:
    x = inputs(2, 19, 2, 4, 3)
    want, want_last = ssd(**x)
    state, ys = x["h0"], []
    for begin, end in ((0, 8), (8, 9), (9, 19)):
        part = {k: v[:, begin:end] if k in ("x", "dt", "b", "c") else v for k, v in x.items()}
        y, state = ssd(**part | {"h0": state})
        ys.append(y)
    np.testing.assert_allclose(np.concatenate(ys, 1), want, atol=1e-5)
    np.testing.assert_allclose(state, want_last, atol=1e-5)


def test_steps_are_the_recurrence() -> None:
    x, reset = inputs(2, 5, 4, 3, 2, groups=2), resets(2, 5, 0.5)
    want, want_last, _ = oracle(x, reset, *cotangents(x))
    state, step = x["h0"], jax.jit(ssd_step)
    for t in range(5):
        u, dt, b, c = (x[k][:, t] for k in ("x", "dt", "b", "c"))
        state, y = step(state, u, dt, x["a"], b, c, x["d"], 1.0 - reset[:, t])
        np.testing.assert_allclose(y, want[:, t], atol=1e-5)
    np.testing.assert_allclose(state, want_last, atol=1e-5)


def test_long_rows_keep_float32_accuracy() -> None:
    check("xla", inputs(1, 500, 2, 4, 4), chunk=64)


def test_rows_and_heads_may_be_split_over_devices() -> None:
    x, reset = inputs(2, 9, 4, 64, 2), resets(2, 9)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Explicit,) * 2)
    specs = {k: P("data", None, "tensor") for k in ("x", "dt")}
    specs |= {"a": P("tensor"), "d": P("tensor"), "b": P("data"), "c": P("data"), "h0": P("data")}

    def loss(x):
        y, last = ssd(**x, reset=reset, implementation="tpu")
        return jnp.sum(y**2) + jnp.sum(last)

    with interpreted(True):
        want = jax.device_get(jax.jit(jax.grad(loss), compiler_options=QUICK)(x))
        with jax.set_mesh(mesh):
            split = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in x.items()}
            got = jax.jit(jax.grad(loss), compiler_options=QUICK)(split)
    for name in x:
        assert_close(got[name], np.float64(want[name]), what=name)


@pytest.mark.slow
def test_kernel_under_vmap_scan_and_remat() -> None:
    x = inputs(2, 9, 2, 64, 2)
    rest = [x[k] for k in ("dt", "b", "c")]

    def depth(implementation):
        def layer(u, dt, b, c):
            u, dt, b, c = (v[None] for v in (u, dt, b, c))
            y, _ = ssd(u, dt, x["a"], b, c, implementation=implementation)
            return y[0]

        def loss(u):
            step = jax.checkpoint(lambda u, _: (jax.vmap(layer)(u, *rest), None))
            return jnp.sum(jax.lax.scan(step, u, length=2)[0] ** 2)

        return jax.jit(jax.grad(loss), compiler_options=QUICK)(x["x"])

    with interpreted(True):
        got = jax.device_get(depth("tpu"))
    assert_close(got, np.float64(depth("xla")))


@pytest.mark.slow
@settings(max_examples=3)
@given(
    length=st.integers(1, 30),
    heads=st.integers(1, 4),
    p=st.integers(1, 128),
    n=st.integers(1, 20),
    share=st.sampled_from([None, 0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_kernel_of_any_shape(length, heads, p, n, share, seed) -> None:
    groups = 2 if heads == 4 else 1
    reset = None if share is None else resets(1, length, share)
    check("tpu", inputs(1, length, heads, p, n, groups, seed), reset, chunk=16)


def test_errors_name_the_argument() -> None:
    x = inputs(2, 4, 4, 3, 2, groups=2)
    with pytest.raises(ValueError, match=r"dt\(2, 3, 4\): want \(2, 4, 4\) to go with x"):
        ssd(**x | {"dt": x["dt"][:, :3]})
    with pytest.raises(ValueError, match="4 heads are no multiple of the 3 groups of b"):
        ssd(**x | {k: np.zeros((2, 4, 3, 2), np.float32) for k in "bc"})
    with pytest.raises(ValueError, match=r"implementation='fast' does not exist.*reference, xla"):
        ssd(**x, implementation="fast")
    with pytest.raises(ValueError, match="x is float16: cast it to"):
        ssd(**x | {"x": x["x"].astype(np.float16)}, implementation="tpu")
    with pytest.raises(ValueError, match="heads of 130 channels, at most 128"):
        ssd(**inputs(1, 1, 1, 130, 2), implementation="tpu")
    with pytest.raises(ValueError, match="chunk=12: want a multiple of 8 from 8 to 256"):
        ssd_tpu(**x, reset=None, chunk=12)
