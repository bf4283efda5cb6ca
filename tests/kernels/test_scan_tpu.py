"""The TPU selective scan, interpreted, against a float64 loop and its hand-written adjoint."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slm_kernels.pallas import interpreted
from slm_kernels.scan.tpu import selective_scan_tpu

from tests.kernels.inputs import scan_inputs

NAMES = ("u", "dt", "a", "b", "c", "d", "initial_state")
KERNEL = partial(selective_scan_tpu, chunk=8)
# With memory that starts as NaN and races that are errors it is a hundred times slower.
QUICKLY = partial(interpreted, True)
# An unrolled kernel takes XLA:CPU longer to optimise than to run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def oracle(x, reset, dy, dlast):
    """Outputs and gradients of `sum(y dy) + sum(last dlast)` in float64, token by token."""
    u, dt, a, b, c, d, h = (np.asarray(x[k], np.float64) for k in NAMES)
    length = u.shape[1]
    keep = np.ones(u.shape[:2]) if reset is None else 1.0 - reset
    decay = np.exp(dt[..., None] * a) * keep[:, :, None, None]
    before, after, y = [], [], np.zeros(u.shape)
    for t in range(length):
        before.append(h)
        h = decay[:, t] * h + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
        after.append(h)
        y[:, t] = (h * c[:, t, None]).sum(-1) + d * u[:, t]
    grads = {k: np.zeros(x[k].shape) for k in NAMES}
    grads["d"] = (dy * u).sum((0, 1))
    e = np.asarray(dlast, np.float64)
    for t in reversed(range(length)):
        g = e + c[:, t, None] * dy[:, t, :, None]
        e = decay[:, t] * g
        q = e * before[t]
        s = (g * b[:, t, None]).sum(-1)
        grads["u"][:, t] = dt[:, t] * s + d * dy[:, t]
        grads["dt"][:, t] = u[:, t] * s + (q * a).sum(-1)
        grads["b"][:, t] = ((dt[:, t] * u[:, t])[..., None] * g).sum(1)
        grads["c"][:, t] = (after[t] * dy[:, t, :, None]).sum(1)
        grads["a"] += (q * dt[:, t, :, None]).sum(0)
    grads["initial_state"] = e
    return y, h, grads


def cotangents(x) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(9)
    shapes = x["u"].shape, x["initial_state"].shape
    dy, dlast = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return dy, dlast


def run(x, reset=None, kernel=KERNEL, interpreter=QUICKLY, without: tuple[str, ...] = ()):
    """Outputs and gradients of the kernel; `without` drops optional arguments."""
    dy, dlast = cotangents(x)
    x = {k: jnp.asarray(v) for k, v in x.items() if k not in without}

    def scan(x):
        reset_or_none = None if reset is None else jnp.asarray(reset)
        return kernel(**({"initial_state": None} | x), reset=reset_or_none)

    def both(x, dy, dlast):
        (y, last), vjp = jax.vjp(scan, x)
        return y, last, vjp((dy.astype(y.dtype), dlast))[0]

    with interpreter():
        return jax.device_get(jax.jit(both, compiler_options=QUICK)(x, dy, dlast))


def assert_close(got, want, bar: float = 1e-5, what: str = "") -> None:
    """The largest error over the largest value."""
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape, what
    assert np.max(np.abs(got - want)) <= bar * np.max(np.abs(want)), what


def check(x, reset=None, **options) -> None:
    y, last, grads = run(x, reset, **options)
    want_y, want_last, want = oracle(x, reset, *cotangents(x))
    assert_close(y, want_y, what="y")
    assert_close(last, want_last, what="last")
    for name in grads:
        assert_close(grads[name], want[name], what=name)


def resets(batch: int, length: int, share: float = 0.2) -> np.ndarray:
    return np.random.default_rng(1).random((batch, length)) < share


@pytest.mark.parametrize(
    ("length", "width", "n", "with_reset"),
    [
        (1, 128, 1, False),  # one step, one state
        (19, 130, 3, True),  # two chunks and a part; a part of a second group of lanes
        (8, 1100, 8, True),  # two blocks of channels, padded; db and dc add over them
        (9, 128, 24, False),  # three groups of states
    ],
)
def test_scan_and_gradients_are_the_float64_loop(length, width, n, with_reset) -> None:
    batch = 2 if length == 19 else 1
    x = scan_inputs(batch, length, width, n)
    check(x, resets(batch, length) if with_reset else None)


@pytest.mark.slow
def test_no_memory_is_read_unwritten_or_raced_for() -> None:
    x = scan_inputs(2, 19, 130, 3)
    check(x, resets(2, 19), interpreter=interpreted)


def test_first_token_resets_and_every_token_resets() -> None:
    x = scan_inputs(2, 12, 128, 2)
    reset = np.zeros((2, 12), bool)
    reset[0] = True
    reset[1, [0, 8]] = True  # and the first of a chunk
    x["a"][:, 0] = [-1e-30, -1e4] * 64  # rates that neither a long step nor float32 can tell from 0
    check(x, reset)


def test_without_initial_state() -> None:
    x = scan_inputs(1, 5, 128, 2)
    y, last, _ = run(x, without=("initial_state",))
    x["initial_state"][:] = 0
    want_y, want_last, _ = oracle(x, None, *cotangents(x))
    assert_close(y, want_y)
    assert_close(last, want_last)


def check_bfloat16(x, **options) -> None:
    """With u, b and c in bfloat16, rounding happens once, at the end."""
    low = "u", "b", "c"  # their tiles are longer than those of dt
    x |= {k: np.asarray(jnp.asarray(x[k], jnp.bfloat16)) for k in low}
    y, last, grads = run(x, **options)
    assert (y.dtype, last.dtype) == (jnp.bfloat16, np.float32)
    dy, dlast = cotangents(x)
    dy = np.asarray(jnp.asarray(dy, jnp.bfloat16), np.float64)
    want_y, want_last, want = oracle(x, None, dy, dlast)
    assert_close(last, want_last)
    assert_close(y, want_y, 2**-8)
    for name in grads:
        assert grads[name].dtype == x[name].dtype
        assert_close(grads[name], want[name], 2**-8 if name in low else 1e-5, name)


def test_bfloat16_inputs_keep_a_float32_state() -> None:
    check_bfloat16(scan_inputs(1, 20, 128, 3), kernel=partial(selective_scan_tpu, chunk=16))


def test_a_permuted_batch_gives_permuted_results() -> None:
    x, order = scan_inputs(3, 9, 128, 2), [2, 0, 1]
    moved = {k: v if k in ("a", "d") else v[order] for k, v in x.items()}
    with interpreted(True):
        scan = jax.jit(lambda x: KERNEL(**x, reset=None), compiler_options=QUICK)
        for one, other in zip(scan(x), scan(moved), strict=True):
            np.testing.assert_array_equal(np.asarray(one)[order], other)


@settings(max_examples=2)
@given(
    length=st.integers(1, 17),
    width=st.integers(1, 140),
    n=st.integers(1, 9),
    share=st.sampled_from([None, 0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_scan_of_any_shape(length, width, n, share, seed) -> None:
    reset = None if share is None else resets(1, length, share)
    check(scan_inputs(1, length, width, n, seed), reset)


def test_errors_name_the_argument() -> None:
    x = scan_inputs(1, 4, 4, 2)
    with pytest.raises(ValueError, match="chunk=12: want 8 or a positive multiple of 16"):
        selective_scan_tpu(**x, reset=None, chunk=12)
    with pytest.raises(ValueError, match="dt is float16: cast it to"):
        selective_scan_tpu(**x | {"dt": x["dt"].astype(np.float16)}, reset=None)
    with pytest.raises(ValueError, match="257 states a channel, at most 256"):
        selective_scan_tpu(**scan_inputs(1, 1, 2, 257), reset=None)
