"""Whole models: every architecture, its shapes, its size, and decoding with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.compress import parse_spec, quantise, size, smoothed
from slm_jax.compress.codes import Coded
from slm_jax.compress.linear import QuantisedEmbedding, QuantisedLinear, QuantisedMatrix
from slm_jax.compress.quantise import is_matrix, path_name
from slm_jax.errors import UserError
from slm_jax.infer.step import decode, prefill
from slm_jax.models.recursion import RecursionConfig
from slm_jax.models.trm import TRM, TRMConfig
from slm_jax.nn.linear import Embedding, Linear
from slm_jax.nn.module import count_parameters, named_leaves
from tests.nn.tiny import PATTERNS, VOCAB, randomised, tiny_lm, tokens


def matrices(model) -> dict:
    flat, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_matrix)
    return {path_name(path): leaf for path, leaf in flat if is_matrix(leaf)}


def logits(model, ids):
    return model(ids)[0]


run = jax.jit(logits)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_matrix_of_every_architecture_is_replaced(name: str) -> None:
    model = tiny_lm(name)
    quantised = jax.eval_shape(lambda m: quantise(m, parse_spec("w4g8")), model)
    old, new = matrices(model), matrices(quantised)
    assert list(old) == list(new)
    for path, leaf in new.items():
        if path.endswith("router"):
            assert type(leaf) is Linear
            continue
        assert type(leaf) is (
            QuantisedEmbedding if isinstance(old[path], Embedding) else QuantisedLinear
        )
        assert leaf.w.n_weights == old[path].w.size
        wanted = "int8" if path in ("embed", "head") else "int4"
        assert leaf.w.spec.code == wanted
    # What is no matrix is as it was.
    kept = {k: v.shape for k, v in named_leaves(model).items() if not k.endswith(".w")}
    assert kept.items() <= {k: v.shape for k, v in named_leaves(quantised).items()}.items()


@pytest.mark.parametrize("name", ["dense", "moe", "hybrid"])
def test_eight_bits_change_the_logits_a_little(name: str) -> None:
    model, ids = tiny_lm(name), tokens(2, 12)
    before = np.asarray(run(model, ids))
    for spec in ("w8", "w8a8"):
        after = np.asarray(run(quantise(model, parse_spec(spec)), ids))
        error = np.linalg.norm(after - before) / np.linalg.norm(before)
        # Random weights; a router that changes its mind about one token costs the most.
        assert 1e-3 < error < 0.1, spec


def test_decoding_equals_the_full_pass() -> None:
    model = quantise(tiny_lm("hybrid"), parse_spec("w8a8"))
    ids = tokens(2, 17)
    full = run(model, ids)
    first, state = prefill(model, ids[:, :16], np.ones((2, 16), np.int32), 32)
    np.testing.assert_allclose(first, full[:, 15], atol=1e-4)
    step, _ = decode(model, ids[:, 16], np.full(2, 16, np.int32), state)
    np.testing.assert_allclose(step, full[:, 16], atol=1e-4)


def test_layers_that_repeat_are_rounded_but_not_calibrated() -> None:
    model = tiny_lm("dense", recursion=RecursionConfig(1, 1, repeats=3))
    quantised = jax.eval_shape(lambda m: quantise(m, parse_spec("w8a8")), model)
    assert all(isinstance(m.w, QuantisedMatrix) for m in matrices(quantised).values())
    assert jax.eval_shape(logits, quantised, tokens(2, 8)).shape == (2, 8, VOCAB)
    with pytest.raises(UserError, match=r"recursion: layers that repeat .* choose method=rtn"):
        smoothed(model, [{"tokens": tokens(2, 8)}])


def test_reasoner_is_quantised_by_the_same_function() -> None:
    config = TRMConfig(
        vocab_size=5, seq_len=9, d_model=16, n_heads=2, n_prefix=1, ff_multiple=8, n_puzzle_ids=2
    )
    model = randomised(jax.eval_shape(lambda key: TRM(config, key), jax.random.key(0)))
    new = matrices(quantise(model, parse_spec("w8")))
    assert new
    assert all(isinstance(m, QuantisedLinear | QuantisedEmbedding) for m in new.values())


def test_size_counts_bytes_and_weights() -> None:
    model = tiny_lm("moe", tie_embeddings=False)
    full = size(model)
    assert full.parameters == count_parameters(model)
    assert full.nbytes == 4 * full.parameters
    assert full.bits_per_weight == 32
    assert full.coded == 0
    small = size(quantise(model, parse_spec("w4g8")))
    assert small.parameters == full.parameters
    vocab = 48 * 16
    rest = full.parameters - small.coded
    # Embedding and head: 8 bits and a float32 scale a row. Else 4 bits and 16 bits for every 8.
    coded = 2 * (vocab + 48 * 4) + (small.coded - 2 * vocab) * (4 + 16 / 8) / 8
    assert small.coded_nbytes == coded
    assert small.nbytes == coded + 4 * rest
    abstract = jax.eval_shape(lambda m: quantise(m, parse_spec("w4g8")), model)
    assert size(abstract) == small


def test_codes_may_be_given() -> None:
    model, spec = tiny_lm("dense"), parse_spec("w8")
    up = quantise(model, spec).blocks[0].channel.up.w
    given = Coded(jnp.zeros_like(up.codes[...]), up.scales[...])
    quantised = quantise(model, spec, coded={"blocks.0.channel.up": given})
    assert not np.any(quantised.blocks[0].channel.up.w.codes[...])
    assert np.any(quantised.blocks[0].channel.gate.w.codes[...])
    with pytest.raises(UserError, match=r"coded='blocks.0.channel.nose' is no matrix"):
        quantise(model, spec, coded={"blocks.0.channel.nose": given})


def test_a_second_rounding_is_refused() -> None:
    quantised = quantise(tiny_lm("dense"), parse_spec("w8"))
    with pytest.raises(UserError, match="is quantised already: give a model of float weights"):
        quantise(quantised, parse_spec("w4"))
