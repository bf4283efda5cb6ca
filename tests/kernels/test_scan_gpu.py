"""The Hopper scan, interpreted, against the float64 loop and adjoint of the TPU's tests.

Memory starts as NaN and races are errors. The interpreter has one thread a warpgroup: a barrier
that is missing between the threads of one does not show here.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slm_kernels.scan.gpu import selective_scan_gpu

from tests.kernels.inputs import scan_inputs
from tests.kernels.interpret_gpu import interpreted_gpu
from tests.kernels.test_scan_tpu import check, check_bfloat16, resets

SPANS = partial(selective_scan_gpu, spans=2)
on_gpu = partial(check, interpreter=interpreted_gpu)


def test_scan_of_two_spans_and_its_gradients_are_the_float64_loop() -> None:
    x = scan_inputs(1, 40, 100, 3)  # padded steps, channels and states
    on_gpu(x, resets(1, 40), kernel=SPANS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "length", "width", "n", "with_reset", "spans"),
    [
        (1, 1, 128, 1, False, None),  # one step, one state
        (2, 70, 130, 3, True, 2),  # rows and blocks; a span of two pieces and one of one
        (1, 60, 128, 20, True, 3),  # pieces of 16 steps
        (1, 130, 128, 16, False, 1),  # more pieces than slots
    ],
)
def test_every_shape(batch, length, width, n, with_reset, spans) -> None:
    x = scan_inputs(batch, length, width, n)
    reset = resets(batch, length) if with_reset else None
    on_gpu(x, reset, kernel=partial(selective_scan_gpu, spans=spans))


@pytest.mark.slow
def test_first_token_resets_and_every_token_resets() -> None:
    x = scan_inputs(2, 40, 128, 2)
    reset = np.zeros((2, 40), bool)
    reset[0] = True
    reset[1, [0, 32]] = True  # and the first of a span
    x["a"][:, 0] = [-1e-30, -1e4] * 64  # rates that neither a long step nor float32 can tell from 0
    on_gpu(x, reset, kernel=SPANS)


@pytest.mark.slow
def test_bfloat16_inputs_keep_a_float32_state() -> None:
    check_bfloat16(scan_inputs(1, 40, 128, 3), kernel=SPANS, interpreter=interpreted_gpu)


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 100),
    width=st.integers(1, 140),
    n=st.integers(1, 18),
    spans=st.integers(1, 3),
)
def test_any_shape(length, width, n, spans) -> None:
    x = scan_inputs(1, length, width, n)
    on_gpu(x, resets(1, length), kernel=partial(selective_scan_gpu, spans=spans))


def test_kernel_can_be_traced_under_vmap_scan_and_remat() -> None:
    x = scan_inputs(1, 8, 128, 2)
    many = {k: jax.ShapeDtypeStruct((3, *a.shape), a.dtype) for k, a in x.items()}

    def total(x):
        def step(carry, _):
            y, last = jax.checkpoint(partial(selective_scan_gpu, reset=None))(**x)
            return carry + jnp.sum(y) + jnp.sum(last), None

        return jax.lax.scan(step, jnp.zeros(()), None, length=2)[0]

    grads = jax.eval_shape(jax.vmap(jax.grad(total)), many)
    assert {k: g.shape for k, g in grads.items()} == {k: a.shape for k, a in many.items()}


def test_refuses_what_the_kernel_does_not_do() -> None:
    x = scan_inputs(1, 4, 128, 33)
    with pytest.raises(ValueError, match="33 states a channel, at most 32: use"):
        selective_scan_gpu(**x, reset=None)
    x = scan_inputs(1, 4, 128, 2)
    x["u"] = x["u"].astype(np.float16)
    with pytest.raises(ValueError, match="u is float16: cast it"):
        selective_scan_gpu(**x, reset=None)
