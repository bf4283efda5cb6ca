"""The next-token loss against numpy, whole and in chunks."""

import jax
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.models.loss import cross_entropy, next_token_loss
from tests.nn.tiny import tiny_lm, tokens

RNG = np.random.default_rng(0)


def batch() -> dict[str, np.ndarray]:
    ids = tokens(2, 13)
    segments = np.array([[1] * 8 + [2] * 4, [1] * 10 + [0] * 2])
    weights = RNG.uniform(0.5, 2, (2, 12)).astype(np.float32) * (segments > 0)
    return dict(tokens=ids[:, :-1], targets=ids[:, 1:], segments=segments, weights=weights)


def test_cross_entropy_is_numpys() -> None:
    logits = RNG.normal(0, 5, (3, 4, 7)).astype(np.float32)
    logits[0, 0, 2] = 300.0  # exp would overflow
    targets = RNG.integers(0, 7, (3, 4))
    wide = np.float64(logits)
    top = wide.max(-1, keepdims=True)
    lse = np.log(np.exp(wide - top).sum(-1)) + top[..., 0]
    want = lse - np.take_along_axis(wide, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(cross_entropy(logits, targets), want, rtol=1e-5, atol=1e-5)


def test_loss_is_the_weighted_sum_and_chunks_do_not_change_it() -> None:
    model, b = tiny_lm("dense", final_softcap=5.0, n_layers=1), batch()

    def total(model, chunk):
        nll, weight, _ = next_token_loss(model, b, chunk=chunk)
        return nll, weight

    run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    (loss, weight), gradient = run(model, None)
    logits, _, _ = jax.jit(lambda m: m(b["tokens"], segments=b["segments"]))(model)
    want = np.sum(np.asarray(cross_entropy(logits, b["targets"])) * b["weights"])
    assert loss == pytest.approx(want, rel=1e-5)
    assert weight == pytest.approx(b["weights"].sum(), rel=1e-6)
    (part, part_weight), part_gradient = run(model, 4)
    assert part == pytest.approx(float(loss), rel=1e-6)
    assert part_weight == weight
    for a, g in zip(jax.tree.leaves(part_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, g, atol=1e-5 * np.abs(g).max())


@pytest.mark.parametrize("chunk", [0, 5, 24])
def test_chunk_that_does_not_divide_is_an_error(chunk: int) -> None:
    with pytest.raises(UserError, match=f"chunk={chunk} does not divide seq_len=12"):
        next_token_loss(tiny_lm("dense"), batch(), chunk=chunk)
