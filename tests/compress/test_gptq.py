"""GPTQ against the published update rule, written out in NumPy without any Cholesky factor."""

import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.compress import parse_spec, quantise, quantise_gptq
from slm_jax.compress.calibrate import layer_errors
from slm_jax.compress.codes import decode, encode, nf4_levels
from slm_jax.compress.gptq import gptq_codes
from slm_jax.errors import UserError
from tests.nn.tiny import tiny_lm, tokens

N, K, ROWS = 6, 20, 64


def layer(dead: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Weights `[N, K]` and correlated inputs `[ROWS, K]`."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(N, K)).astype(np.float32)
    x = rng.normal(size=(ROWS, K)) @ rng.normal(size=(K, K)) + rng.normal(size=K)
    if dead:
        x[:, [3, 11]] = 0
    return w, x.astype(np.float32)


def published(w, gram, scales, levels, *, damping: float, act_order: bool) -> np.ndarray:
    """Equations 2 and 3 of arXiv 2210.17323 in float64, the inverse updated by elimination.

    Args:
        w: `[N, K]`.
        gram: `[K, K]`.
        scales: of every weight, `[N, K]`.
        levels: what a code can stand for at scale 1.
        damping: share of the mean diagonal added to the diagonal.
        act_order: largest diagonal first, else from left to right.
    """
    w, gram = np.float64(w), np.float64(gram)
    diagonal = np.diag(gram)
    gram = gram + np.diag(np.where(diagonal == 0, max(diagonal.mean(), 1.0), 0.0))
    inverse = np.linalg.inv(gram + damping * np.diag(gram).mean() * np.eye(len(gram)))
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(gram))
    out = np.zeros_like(w)
    for q in order:
        ratio = w[:, q] / np.where(scales[:, q] > 0, scales[:, q], 1)
        nearest = levels[np.abs(ratio[:, None] - levels).argmin(axis=1)]
        out[:, q] = nearest * scales[:, q]
        w = w - ((w[:, q] - out[:, q]) / inverse[q, q])[:, None] * inverse[q]  # eq. 2
        inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]  # eq. 3
        inverse[q, q] = 1.0  # its row is zero now
    return out


@pytest.mark.parametrize(
    ("name", "block", "act_order"),
    [
        ("w4", 128, True),
        ("w4g8", 8, True),
        ("w4g8", 6, False),
        ("nf4g8", 8, False),
        ("w8", 7, True),
    ],
)
def test_codes_are_those_of_the_published_rule(name: str, block: int, act_order: bool) -> None:
    spec, (w, x) = parse_spec(name), layer()
    gram = x.T @ x
    coded, healthy = gptq_codes(w, gram, spec, damping=0.01, act_order=act_order, block=block)
    got = np.asarray(decode(coded, spec, K))
    top = 127 if spec.bits == 8 else 7
    levels = nf4_levels() if spec.code == "nf4" else np.arange(-top, top + 1)
    each = np.repeat(np.float64(coded.scales), spec.group or K, axis=1)[:, :K]
    want = published(w, gram, each, np.float64(levels), damping=0.01, act_order=act_order)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.isfinite(healthy).all()

    nearest = np.asarray(decode(encode(jnp.asarray(w), spec), spec, K))
    error = {k: np.linalg.norm(x @ (v - w).T) for k, v in (("gptq", got), ("rtn", nearest))}
    assert error["gptq"] < 0.95 * error["rtn"]  # 0.7 to 0.8 on average, up to 0.99 of some layers


def test_inputs_that_never_come_are_rounded_to_nearest() -> None:
    spec, (w, x) = parse_spec("w4"), layer(dead=True)
    coded, healthy = gptq_codes(
        jnp.asarray(w), jnp.asarray(x.T @ x), spec, damping=0.01, act_order=True
    )
    assert np.isfinite(healthy).all()
    nearest = decode(encode(jnp.asarray(w), spec), spec, K)
    dead = [3, 11]
    np.testing.assert_array_equal(decode(coded, spec, K)[:, dead], nearest[:, dead])


def test_expert_that_saw_nothing_is_rounded_to_nearest() -> None:
    spec, (w, _) = parse_spec("w4g8"), layer()
    coded, _ = gptq_codes(jnp.asarray(w), jnp.zeros((K, K)), spec, damping=0.01, act_order=True)
    np.testing.assert_array_equal(coded.codes, encode(jnp.asarray(w), spec).codes)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers", "found"), [("moe", 1, 7), ("hybrid", 3, 23)])
def test_layers_of_a_whole_model_err_less_than_rounded_ones(
    name: str, layers: int, found: int
) -> None:
    model, spec = tiny_lm(name, n_layers=layers), parse_spec("w4")
    batches = [{"tokens": tokens(4, 32, seed)} for seed in (1, 2)]
    better = quantise_gptq(model, batches, spec)
    rounded = quantise(model, spec)
    errors = [layer_errors(model, m, batches) for m in (better, rounded)]
    assert list(errors[0]) == list(errors[1])
    assert all(v == 0 for k, v in errors[0].items() if k.endswith("router"))
    pairs = [(errors[0][k], errors[1][k]) for k in errors[0] if not k.endswith("router")]
    assert len(pairs) == found
    assert np.mean([g < r for g, r in pairs]) > 0.8
    assert np.mean([g / r for g, r in pairs]) < 0.9


def test_second_moments_that_cannot_be_inverted_are_reported() -> None:
    model = tiny_lm("dense")
    with pytest.raises(UserError, match=r"damping=-1: the second moments of the inputs of .*raise"):
        quantise_gptq(model, [{"tokens": tokens(1, 4)}], parse_spec("w4"), damping=-1)
