"""Learned step sizes: values, gradients and first steps, against the paper's formulas in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.compress.codes import decode, encode, largest_code, round_tokens, scale_dtype
from slm_jax.compress.lsq import first_step, groups_of, rounded_tokens, rounded_weight
from slm_jax.compress.spec import parse_spec
from slm_jax.parallel import MeshConfig, make_mesh
from slm_jax.parallel.rules import spec as places

# Unoptimised code: it runs once.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Two experts of (3 heads x 4) inputs and 5 outputs; 12 inputs are two groups of 8 and a rest of 4.
SHAPE, N_IN, N_OUT = (2, 3, 4, 5), 2, 1
RNG = np.random.default_rng(0)
W = RNG.normal(size=SHAPE).astype(np.float32)
DY = RNG.normal(size=SHAPE).astype(np.float32)


def paper(w: np.ndarray, s: np.ndarray, dy: np.ndarray, top: int):
    """Equations 1, 2, 3, 5 and the gain of section 2.2, for the weights of one step; float64."""
    x = w / s
    inside = (-top < x) & (x < top)
    slope = np.where(inside, np.rint(x) - x, np.where(x >= top, top, -top))
    gain = 1 / np.sqrt(w.size * top)
    return np.rint(np.clip(x, -top, top)) * s, np.where(inside, dy, 0), (dy * slope).sum() * gain


@pytest.mark.parametrize("name", ["w8", "w3", "w4g8"])
def test_gradients_are_those_of_the_paper(name: str) -> None:
    spec = parse_spec(name)
    groups = groups_of(SHAPE, N_IN, N_OUT, spec)
    top = largest_code(spec)
    # Small enough for some weights to be cut off.
    factors = RNG.uniform(0.5, 0.7, (2, 5, len(groups.sizes))).astype(np.float32)
    step = factors / np.float32(np.sqrt(top))

    @jit
    def run(w: jax.Array, s: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        got, back = jax.vjp(lambda w, s: rounded_weight(w, s, groups, spec, top), w, s)
        return got, *back(dy)

    got, dw, ds = run(W, step, DY)
    stored = np.float64(np.float32(step.astype(scale_dtype(spec))))
    w, dy = (np.float64(a).transpose(0, 3, 1, 2).reshape(2, 5, 12) for a in (W, DY))
    want, want_dw, want_ds = np.empty(w.shape), np.empty(w.shape), np.empty(step.shape)
    for row in np.ndindex(2, 5):
        for i, start in enumerate(range(0, 12, groups.size)):
            part = (*row, slice(start, start + groups.size))
            want[part], want_dw[part], want_ds[*row, i] = paper(
                w[part], stored[*row, i], dy[part], top
            )
    as_matrix = [np.asarray(a).transpose(0, 3, 1, 2).reshape(2, 5, 12) for a in (got, dw)]
    np.testing.assert_allclose(as_matrix[0], want, rtol=1e-6)
    np.testing.assert_array_equal(as_matrix[1], want_dw.astype(np.float32))
    np.testing.assert_allclose(ds, want_ds, rtol=2e-5, atol=1e-6)
    cut = (want_dw == 0).mean()
    assert cut == 0 if name == "w8" else 0.01 < cut < 0.5


def test_first_step_is_that_of_the_paper_cuts_nothing_needlessly_and_is_never_zero() -> None:
    w = W.copy()
    w[0, ..., 0] = 0  # an output that is zero as a whole: a group must be trainable all the same
    w[1, ..., 0] = np.sign(w[1, ..., 0])  # the paper's step would leave codes without use
    w[1, 0, 0, 1] = 10.0
    groups = groups_of(SHAPE, N_IN, N_OUT, parse_spec("w3g8"))
    got = jit(lambda w: first_step(w, groups, 3))(w)
    rows = np.abs(w).transpose(0, 3, 1, 2).reshape(2, 5, 12)
    want = np.stack([rows[..., :8].mean(-1), rows[..., 8:].mean(-1)], axis=-1) * 2 / np.sqrt(3)
    want[0, 0] = 2 * np.sqrt(2 / np.pi / 12) / np.sqrt(3)  # mean |w| at std 1/sqrt(12)
    largest = np.stack([rows[..., :8].max(-1), rows[..., 8:].max(-1)], axis=-1) / 3
    assert (want[1, 0] > largest[1, 0]).all()
    assert want[1, 1, 0] < largest[1, 1, 0]
    want = np.where(largest > 0, np.minimum(want, largest), want)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("name", ["w3", "w4g8"])
def test_numbers_are_what_the_written_codes_stand_for(name: str) -> None:
    spec = parse_spec(name)
    groups = groups_of(SHAPE, N_IN, N_OUT, spec)
    top = largest_code(spec)
    step = jit(lambda w: 0.9 * first_step(w, groups, top))(W)
    got = jax.jit(lambda w, s: rounded_weight(w, s, groups, spec, top))(W, step)
    rows = W.transpose(0, 3, 1, 2).reshape(2, 5, 12)
    want = jit(lambda w, s: decode(encode(w, spec, s), spec, 12))(rows, step)
    as_matrix = np.asarray(got).transpose(0, 3, 1, 2).reshape(2, 5, 12)
    np.testing.assert_array_equal(as_matrix, want)  # to the last bit


def test_largest_code_may_be_traced() -> None:
    spec = parse_spec("w3")
    groups = groups_of(SHAPE, N_IN, N_OUT, spec)
    step = np.full((2, 5, 1), 0.1, np.float32)
    run = jit(lambda top: rounded_weight(W, step, groups, spec, top))
    for top in (3.0, 7.0, 127.0):
        want = np.clip(np.rint(W / np.float32(0.1)), -top, top) * np.float32(0.1)
        np.testing.assert_array_equal(run(top), want)
    assert run._cache_size() == 1


def test_tokens_are_rounded_as_for_an_integer_product_and_go_straight_back() -> None:
    x = RNG.normal(size=(3, 6)).astype(np.float32)
    dy = RNG.normal(size=(3, 6)).astype(np.float32)

    @jit
    def run(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        got, back = jax.vjp(rounded_tokens, x)
        codes, scales = round_tokens(x)
        return got, codes.astype(jnp.float32) * scales, *back(dy)

    got, want, dx = run(x, dy)
    np.testing.assert_array_equal(got, want)
    assert np.abs(got - x).max() > 1e-3
    np.testing.assert_array_equal(dx, dy)


def test_groups_may_be_torn_apart_by_a_mesh() -> None:
    """32 inputs over four devices: eight on each."""
    spec = parse_spec("w4g12")
    w = RNG.normal(size=(2, 32, 8)).astype(np.float32)
    dy = RNG.normal(size=w.shape).astype(np.float32)
    groups = groups_of(w.shape, 1, 1, spec)

    def run(w: jax.Array, step: jax.Array, dy: jax.Array):
        got, back = jax.vjp(lambda w, s: rounded_weight(w, s, groups, spec, 7), w, step)
        return got, *back(dy), first_step(w, groups, 7)

    step = RNG.uniform(0.2, 0.4, (2, 8, len(groups.sizes))).astype(np.float32)
    want = jit(run)(w, step, dy)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        split = [
            jax.reshard(jnp.asarray(a), places(axes))
            for a, axes in (
                (w, (None, "embed", "mlp")),
                (step, (None, "mlp", None)),
                (dy, (None, "embed", "mlp")),
            )
        ]
        got = jit(run)(*split)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-6)
    weight, step_size = (a.sharding.spec for a in split[:2])
    assert [a.sharding.spec for a in got] == [weight, weight, step_size, step_size]
