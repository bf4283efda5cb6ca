"""The selective scan and its convolution against float64 loops in numpy."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slm_kernels.scan import causal_conv1d, selective_scan

from tests.kernels.inputs import scan_inputs

B, D, N = 2, 4, 3
IMPLEMENTATIONS = ["reference", "xla"]
jitted = jax.jit(selective_scan, static_argnames="implementation")


def scan(*, implementation: str, **x):
    """The reference is a Python loop: compiling it takes longer than running it."""
    run = selective_scan if implementation == "reference" else jitted
    return run(**x, implementation=implementation)


def inputs(length: int, seed: int = 0) -> dict[str, np.ndarray]:
    return scan_inputs(B, length, D, N, seed)


def oracle(u, dt, a, b, c, d, reset=None, initial_state=None):
    """Every channel by itself, one token after another, in float64."""
    u, dt, a, b, c, d = (np.asarray(x, np.float64) for x in (u, dt, a, b, c, d))
    y, last = np.zeros(u.shape), np.zeros((B, D, N))
    for i in range(B):
        for ch in range(D):
            h = np.zeros(N) if initial_state is None else np.float64(initial_state[i, ch])
            for t in range(u.shape[1]):
                if reset is not None and reset[i, t]:
                    h = np.zeros(N)
                h = np.exp(dt[i, t, ch] * a[ch]) * h + dt[i, t, ch] * b[i, t] * u[i, t, ch]
                y[i, t, ch] = c[i, t] @ h + d[ch] * u[i, t, ch]
            last[i, ch] = h
    return y, last


def assert_close(got, want, bar: float = 1e-5) -> None:
    """The largest error over the largest value."""
    for g, w in zip(got, want, strict=True):
        assert np.max(np.abs(np.asarray(g) - w)) <= bar * np.max(np.abs(w))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1, 2, 8, 19])  # 8: a chunk; 19: two and a part of one
def test_scan_is_the_float64_loop(implementation: str, length: int) -> None:
    x = inputs(length)
    reset = np.random.default_rng(1).random((B, length)) < 0.2
    got = scan(**x, reset=reset, implementation=implementation)
    assert_close(got, oracle(**x, reset=reset))
    del x["initial_state"]
    assert_close(scan(**x, implementation=implementation), oracle(**x))


def test_long_scan_keeps_float32_accuracy() -> None:
    x = inputs(500)
    assert_close(scan(**x, implementation="xla"), oracle(**x))


def test_reset_is_a_new_document() -> None:
    x, cuts = inputs(19), [0, 5, 6, 19]
    reset = np.zeros((B, 19), bool)
    reset[:, cuts[1:-1]] = True
    y, last = scan(**x, reset=reset, implementation="xla")
    for begin, end in pairwise(cuts):
        part = {k: v[:, begin:end] if k in ("u", "dt", "b", "c") else v for k, v in x.items()}
        if begin:
            del part["initial_state"]
        alone, alone_last = scan(**part, implementation="xla")
        np.testing.assert_allclose(y[:, begin:end], alone, atol=1e-6)
    np.testing.assert_allclose(last, alone_last, atol=1e-6)


def test_state_goes_from_chunk_to_chunk() -> None:
    x = inputs(19)
    whole, _ = scan(**x, implementation="xla")
    state, ys = x["initial_state"], []
    for begin, end in ((0, 8), (8, 9), (9, 19)):
        part = {k: v[:, begin:end] for k, v in x.items() if k in ("u", "dt", "b", "c")}
        y, state = scan(**part, a=x["a"], d=x["d"], initial_state=state, implementation="xla")
        ys.append(y)
    np.testing.assert_allclose(np.concatenate(ys, 1), whole, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_of_size_zero_passes_the_state_on(implementation: str) -> None:
    x = inputs(19)
    x["dt"][:, 12:] = 0
    y, last = scan(**x, implementation=implementation)
    head = {k: v[:, :12] if k in ("u", "dt", "b", "c") else v for k, v in x.items()}
    _, want = scan(**head, implementation=implementation)
    np.testing.assert_array_equal(last, want)
    tail = np.einsum("bln,bdn->bld", x["c"][:, 12:], want) + x["d"] * x["u"][:, 12:]
    np.testing.assert_allclose(y[:, 12:], tail, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_inputs_keep_a_float32_state(implementation: str) -> None:
    x = inputs(19)
    low = {k: jnp.asarray(x[k], jnp.bfloat16) for k in ("u", "dt", "b", "c")}
    y, last = scan(**x | low, implementation=implementation)
    assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    exact_y, exact_last = oracle(**x | {k: np.float64(v) for k, v in low.items()})
    assert_close([last], [exact_last])
    assert_close([y], [exact_y], 2**-8)  # rounded once, at the end


def weighted_sum(y, last, weights) -> float:
    return (y * weights[0]).sum() + (last * weights[1]).sum()


def test_gradients_are_those_of_the_reference_and_of_float64_differences() -> None:
    x = inputs(19)
    rng = np.random.default_rng(2)
    reset = np.zeros((B, 19), bool)
    reset[0, 7] = True
    weights = rng.normal(size=(B, 19, D)), rng.normal(size=(B, D, N))

    def loss(x, implementation):
        y, last = selective_scan(**x, reset=reset, implementation=implementation)
        return weighted_sum(y, last, [jnp.asarray(w, jnp.float32) for w in weights])

    reference = jax.grad(loss)(x, "reference")
    xla = jax.jit(jax.grad(loss), static_argnums=1)(x, "xla")
    for name, value in x.items():
        assert_close([xla[name]], [np.asarray(reference[name])])
        v, eps = rng.normal(size=value.shape), 1e-5
        moved = [
            weighted_sum(*oracle(**x | {name: value + s * eps * v}, reset=reset), weights)
            for s in (1, -1)
        ]
        slope = (moved[0] - moved[1]) / (2 * eps)
        terms = np.asarray(xla[name], np.float64) * v
        assert abs(terms.sum() - slope) <= 1e-5 * np.abs(terms).sum(), name
    assert (xla["initial_state"] != 0).all()


def test_scan_errors_name_the_argument() -> None:
    x = inputs(4)
    with pytest.raises(ValueError, match=r"dt\(2, 3, 4\): want \(2, 4, 4\)"):
        selective_scan(**x | {"dt": x["dt"][:, :3]})
    with pytest.raises(ValueError, match=r"initial_state\(1, 4, 3\): want"):
        selective_scan(**x | {"initial_state": x["initial_state"][:1]})
    with pytest.raises(ValueError, match=r"implementation='fast' does not exist.*reference, xla"):
        selective_scan(**x, implementation="fast")


def conv_oracle(x, w, bias, segments, history) -> np.ndarray:
    taps = len(w)
    y = np.zeros(x.shape)
    for i in range(x.shape[0]):
        for t in range(x.shape[1]):
            y[i, t] = bias
            for back in range(taps):
                if t - back >= 0:
                    same = segments is None or segments[i, t - back] == segments[i, t]
                    past = x[i, t - back] if same else 0
                else:
                    same = segments is None or segments[i, 0] == segments[i, t]
                    past = history[i, t - back] if history is not None and same else 0
                y[i, t] += w[taps - 1 - back] * past
    return y


@pytest.mark.parametrize("length", [1, 2, 9])  # two of them shorter than the taps
@pytest.mark.parametrize("with_history", [False, True])
@pytest.mark.parametrize("with_segments", [False, True])
def test_convolution_is_the_loop(length: int, with_history: bool, with_segments: bool) -> None:
    rng = np.random.default_rng(3)
    x, w, bias, past = (
        rng.normal(size=s).astype(np.float32) for s in ((2, length, 3), (4, 3), (3,), (2, 3, 3))
    )
    history = past if with_history else None
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 3], [1, 2, 3, 3, 4, 0, 0, 0, 0]])[:, :length]
    segments = segments if with_segments else None
    y, last = causal_conv1d(x, w, bias, segments=segments, history=history)
    np.testing.assert_allclose(y, conv_oracle(x, w, bias, segments, history), atol=1e-5)
    before = past if with_history else np.zeros_like(past)
    np.testing.assert_array_equal(last, np.concatenate([before, x], axis=1)[:, -3:])


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_convolution_in_chunks_is_one_convolution(chunk: int) -> None:
    rng = np.random.default_rng(4)
    x, w = (rng.normal(size=s).astype(np.float32) for s in ((2, 10, 3), (4, 3)))
    whole, last = causal_conv1d(x, w)
    history, ys = None, []
    for begin in range(0, 10, chunk):
        y, history = causal_conv1d(x[:, begin : begin + chunk], w, history=history)
        ys.append(y)
    np.testing.assert_array_equal(np.concatenate(ys, 1), whole)
    np.testing.assert_array_equal(history, last)
