"""Pruning against NumPy: one line for the scores, a dense float64 surgeon for SparseGPT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.compress import layer_errors, parse_sparsity, prune
from slm_jax.compress.linear import matrix_of
from slm_jax.compress.prune import (
    Sparsity,
    lowest_of_group,
    magnitude_weights,
    sparsegpt_weights,
    wanda_weights,
    with_matrix,
)
from slm_jax.errors import UserError
from slm_jax.nn.module import named_leaves
from tests.compress.test_gptq import layer
from tests.nn.tiny import tiny_lm, tokens

N, K = 6, 20
SHARES = [0.0, 0.3, 0.5, 0.9]


@pytest.mark.parametrize("share", SHARES)
def test_magnitude_is_a_numpy_one_liner(share: float) -> None:
    w, _ = layer()
    got = magnitude_weights(jnp.asarray(w), Sparsity(share))
    n = round(share * w.size)
    want = np.where(np.abs(w) > np.sort(np.abs(w), axis=None)[n - 1] * (n > 0), w, 0)
    np.testing.assert_array_equal(got, want)
    assert np.sum(np.asarray(got) == 0) == n


@pytest.mark.parametrize("share", SHARES)
def test_wanda_is_a_numpy_one_liner(share: float) -> None:
    w, x = layer()
    got = np.asarray(wanda_weights(jnp.asarray(w), jnp.asarray((x**2).sum(0)), Sparsity(share)))
    order = np.argsort(np.abs(w) * np.linalg.norm(x, axis=0), axis=1)
    want = w.copy()
    np.put_along_axis(want, order[:, : round(share * K)], 0, axis=1)
    np.testing.assert_array_equal(got, want)


def test_two_of_four_remain_of_every_group() -> None:
    w, x = layer()
    squares = jnp.asarray((x**2).sum(0))
    for got, scores in (
        (magnitude_weights(jnp.asarray(w), parse_sparsity("2:4")), np.abs(w)),
        (
            wanda_weights(jnp.asarray(w), squares, parse_sparsity("2:4")),
            np.abs(w) * np.linalg.norm(x, axis=0),
        ),
    ):
        groups = scores.reshape(N, -1, 4)
        best = np.argsort(-groups, axis=-1)[..., :2]
        stays = np.zeros_like(groups, bool)
        np.put_along_axis(stays, best, True, axis=-1)
        np.testing.assert_array_equal(got, np.where(stays.reshape(w.shape), w, 0))
    # Of equals the first remain.
    drop = lowest_of_group(jnp.zeros((1, 8)), (1, 4))
    np.testing.assert_array_equal(drop[0], [False, True, True, True] * 2)


def surgeon(w, gram, share: float, pattern, *, damping: float, block: int) -> np.ndarray:
    """Algorithm 1 of arXiv 2301.00774 in float64, its inverse updated by elimination, no factor."""
    w, gram = np.float64(w), np.float64(gram)
    k = len(gram)
    gram = gram + np.diag(np.where(np.diag(gram) == 0, max(np.diag(gram).mean(), 1.0), 0.0))
    inverses = [np.linalg.inv(gram + damping * np.diag(gram).mean() * np.eye(k))]
    for q in range(k):
        last = inverses[-1]
        inverses.append(last - np.outer(last[:, q], last[q]) / last[q, q])
    # What zeroing weight q costs when the inputs before q are fixed (equation 3).
    cost = np.array([inverses[q][q, q] for q in range(k)])
    stays = np.ones(w.shape, bool)
    for q in range(k):
        if q % block == 0:
            end = min(q + block, k)
            scores = w[:, q:end] ** 2 / cost[q:end]
            if pattern is None:
                cut = np.argsort(scores, axis=None)[: round(share * scores.size)]
                part = np.ones(scores.shape, bool)
                part.flat[cut] = False
            else:
                part = np.zeros(scores.shape, bool)
                best = np.argsort(-scores, axis=1)[:, : pattern[0]]
                np.put_along_axis(part, best, True, axis=1)
            stays[:, q:end] = part
        error = np.where(stays[:, q], 0, w[:, q]) / inverses[q][q, q]
        w[:, q] *= stays[:, q]
        w[:, q + 1 :] -= error[:, None] * inverses[q][q, q + 1 :]
    return w


@pytest.mark.parametrize(
    ("share", "pattern", "block"), [(0.5, None, 8), (0.7, None, 20), (0.5, (2, 4), 4)]
)
@pytest.mark.parametrize("dead", [False, True])
def test_sparsegpt_is_the_surgeon_written_out(
    share: float, pattern: tuple[int, int] | None, block: int, dead: bool
) -> None:
    w, x = layer(dead)
    gram = x.T @ x
    got, healthy = sparsegpt_weights(
        jnp.asarray(w), jnp.asarray(gram), share, pattern, damping=0.01, block=block
    )
    want = surgeon(w, gram, share, pattern, damping=0.01, block=block)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4)
    np.testing.assert_array_equal(np.asarray(got) == 0, want == 0)
    assert np.isfinite(healthy).all()


def test_remaining_weights_are_the_least_squares_ones_of_the_last_block() -> None:
    # One block and no damping: what remains right of the last zero is the exact minimiser given
    # what is left of it.
    w, x = layer()
    gram = x.T @ x
    got = np.float64(sparsegpt_weights(jnp.asarray(w), gram, 0.5, damping=0.0, block=K)[0])
    first, last = got[0], int(np.flatnonzero(got[0] == 0)[-1])
    right = np.arange(K) > last
    if not right.any():
        pytest.fail("the last weight of the row is zero: choose another row")
    free = x[:, right].astype(np.float64)
    rest = x[:, ~right] @ (w[0, ~right] - first[~right])
    best = w[0, right] + np.linalg.lstsq(free, rest, rcond=None)[0]
    np.testing.assert_allclose(first[right], best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sparsity", ["0.5", "0.7", "2:4"])
def test_who_knows_more_errs_less_on_correlated_inputs(sparsity: str) -> None:
    rng = np.random.default_rng(1)
    factors = rng.normal(size=(256, 12)) @ rng.normal(size=(12, 32))
    x = (factors + 0.5 * rng.normal(size=(256, 32))) * np.geomspace(0.2, 5, 32)
    x = x.astype(np.float32)
    w, s = rng.normal(size=(48, 32)).astype(np.float32), parse_sparsity(sparsity)
    gram = jnp.asarray(x.T @ x)
    found = {
        "magnitude": magnitude_weights(jnp.asarray(w), s),
        "wanda": wanda_weights(jnp.asarray(w), jnp.diag(gram), s),
        "sparsegpt": sparsegpt_weights(jnp.asarray(w), gram, s.share, s.pattern, damping=0.01)[0],
    }
    error = {k: np.linalg.norm(x @ (np.asarray(v) - w).T) for k, v in found.items()}
    assert error["sparsegpt"] < 0.85 * error["wanda"]
    # Of four neighbours of similar size nearly the same two are largest either way.
    assert error["wanda"] < (0.6 if s.pattern is None else 1.0) * error["magnitude"]


def test_an_expert_that_saw_nothing_is_pruned_by_magnitude() -> None:
    w, _ = layer()
    by_wanda = wanda_weights(jnp.asarray(w), jnp.zeros(K), Sparsity(0.5))
    assert np.all(np.sum(np.asarray(by_wanda) == 0, axis=1) == K // 2)
    rows = np.sort(np.abs(w), axis=1)[:, K // 2 - 1 : K // 2]
    np.testing.assert_array_equal(by_wanda, np.where(np.abs(w) > rows, w, 0))
    by_surgeon = sparsegpt_weights(jnp.asarray(w), jnp.zeros((K, K)), 0.5, damping=0.01, block=K)[0]
    np.testing.assert_array_equal(by_surgeon, magnitude_weights(jnp.asarray(w), Sparsity(0.5)))


def zeros(model) -> dict[str, float]:
    return {
        name: float(np.mean(np.asarray(leaf.get_value()) == 0))
        for name, leaf in named_leaves(model).items()
        if name.endswith(".w")
    }


def test_a_whole_model_keeps_what_is_no_layer() -> None:
    model = tiny_lm("moe", n_layers=2, tie_embeddings=False)
    pruned = prune(model, (), Sparsity(0.5), method="magnitude")
    assert jax.tree.structure(pruned) == jax.tree.structure(model)
    for name, share in zeros(pruned).items():
        layers = name.startswith("blocks") and "router" not in name
        assert share == (0.5 if layers else 0), name
    kept = jax.tree.map(lambda a, b: jnp.all((a == b) | (b == 0)), model, pruned)
    assert all(bool(v) for v in jax.tree.leaves(kept))
    # Every expert of every layer on its own.
    down = np.asarray(pruned.blocks[0].channel.down.w[...])
    assert np.all(np.mean(down == 0, axis=(2, 3)) == 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("moe", 1), ("hybrid", 3)])
def test_layers_of_a_whole_model_err_less_the_more_is_known(name: str, layers: int) -> None:
    model = tiny_lm(name, n_layers=layers)
    batches = [{"tokens": tokens(4, 32, seed)} for seed in (1, 2)]
    mean = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        pruned = prune(model, batches, Sparsity(0.5), method=method)
        for path, share in zeros(pruned).items():
            layer = path.startswith(("blocks", "tail")) and "router" not in path
            if "mixer.dt" in path and method == "wanda":
                layer = False  # rows of one input: half of it, rounded down, is none
            assert share == pytest.approx(0.5 if layer else 0, abs=0.05), (method, path)
        errors = layer_errors(model, pruned, batches)
        mean[method] = np.mean([v for k, v in errors.items() if not k.endswith(("router", ".dt"))])
    assert mean["sparsegpt"] < 0.95 * mean["wanda"]
    assert mean["wanda"] < 0.97 * mean["magnitude"]


def test_a_matrix_is_put_back_as_it_was_taken() -> None:
    model = tiny_lm("moe")
    for linear in (model.blocks[0].mixer.q, model.blocks[0].mixer.out, model.blocks[0].channel.up):
        again = with_matrix(linear, matrix_of(linear))
        np.testing.assert_array_equal(again.w[...], linear.w[...])


@pytest.mark.parametrize(
    ("name", "share", "pattern"),
    [("0.5", 0.5, None), ("0", 0.0, None), ("2:4", 0.5, (2, 4)), ("1:4", 0.75, (1, 4))],
)
def test_sparsities_are_read_and_written(name: str, share: float, pattern) -> None:
    assert parse_sparsity(name) == Sparsity(share, pattern)
    assert parse_sparsity(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half", "sparsity='half': give a share as in 0.5, or n:m as in 2:4"),
        ("1", "sparsity=1 must be at least 0 and below 1"),
        ("-0.1", "sparsity=-0.1 must be at least 0"),
        ("nan", "sparsity=nan must be at least 0"),
        ("4:4", "sparsity=4:4: n of m remain, so n must be from 1 to m - 1"),
        ("0:4", "n must be from 1"),
    ],
)
def test_unknown_sparsities_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_sparsity(name)


def test_what_cannot_be_is_refused() -> None:
    model, batches = tiny_lm("dense", n_layers=1), [{"tokens": tokens(1, 4)}]
    with pytest.raises(UserError, match=r"sparsity=2:5: the 24 inputs of blocks.0.* multiple of 5"):
        prune(model, batches, parse_sparsity("2:5"), method="magnitude")
    with pytest.raises(UserError, match=r"damping=-1: the second moments of the inputs of .*raise"):
        prune(model, batches, Sparsity(0.5), method="sparsegpt", damping=-1)
