"""Zeros in a file: what is read is what was written, in the bytes that the form promises."""

from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from slm_jax.compress import Sparsity, parse_spec, prune, quantise
from slm_jax.compress.codes import decode, encode
from slm_jax.compress.io import (
    PRUNED,
    WEIGHTS,
    as_stored,
    load_pruned,
    load_quantised,
    save_pruned,
    save_quantised,
)
from slm_jax.compress.linear import QuantisedMatrix
from slm_jax.compress.quantise import KEEP, vocab_spec
from slm_jax.compress.sparse import expanded, squeezed, zero_share
from slm_jax.data import ByteTokenizer
from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.nn.module import named_leaves
from tests.compress.test_io import refusal, with_weights
from tests.nn.tiny import tiny_config, tiny_lm


def build(_):
    config = tiny_config("dense")
    return jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))


@hypothesis.given(st.lists(st.sampled_from([0.0, -1.5, 2.0, 1e-30]), min_size=1, max_size=40))
def test_floats_come_back_bit_for_bit(numbers: list[float]) -> None:
    values = np.array([numbers, numbers[::-1]], np.float32)
    mask, kept = squeezed(values, None)
    assert mask.nbytes == -(-values.size // 8)
    assert kept.tolist() == values[values != 0].tolist()
    np.testing.assert_array_equal(expanded(mask, kept, values.shape, None), values)


@pytest.mark.parametrize(
    "name", ["w3g8", *(pytest.param(n, marks=pytest.mark.slow) for n in ("w8", "w4g8", "nf4g8"))]
)
def test_codes_come_back_and_take_their_bits(name: str) -> None:
    spec, rng = parse_spec(name), np.random.default_rng(0)
    w = rng.normal(size=(5, 24)).astype(np.float32) * (rng.random((5, 24)) < 0.4)
    coded = encode(jnp.asarray(w), spec)
    matrix = QuantisedMatrix(coded, spec, ("mlp",), ("embed",), (24,))
    mask, kept = squeezed(np.asarray(coded.codes), matrix)
    again = expanded(mask, kept, coded.codes.shape, matrix)
    np.testing.assert_array_equal(again, coded.codes)
    assert again.dtype == coded.codes.dtype
    n = int(np.sum(np.asarray(decode(coded, spec, 24)) != 0))
    assert 0 < n < 60
    assert kept.nbytes == {8: n, 4: -(-n // 2), 3: 3 * -(-n // 8)}[spec.bits]
    for broken in (kept[:-1], np.append(kept, kept[:1])):
        with pytest.raises(UserError, match="entries, not"):
            expanded(mask, broken, coded.codes.shape, matrix)
    with pytest.raises(UserError, match="entries, not"):
        expanded(np.append(mask, mask[:1]), kept, coded.codes.shape, matrix)


@pytest.fixture(scope="module")
def pruned() -> LM:
    return prune(tiny_lm("dense"), (), Sparsity(0.75), method="magnitude")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pruned_model_is_read_as_it_was_stored(pruned: LM, tmp_path: Path, dtype: str) -> None:
    want = as_stored(pruned, dtype)
    facts = {"method": "magnitude"}
    save_pruned(
        want, tmp_path / "m", config={}, dtype=dtype, tokenizer=ByteTokenizer().to_json(),
        facts=facts,
    )  # fmt: skip
    model, manifest = load_pruned(tmp_path / "m", build)
    assert jax.tree.structure(model) == jax.tree.structure(want)
    for name, leaf in named_leaves(want).items():
        np.testing.assert_array_equal(named_leaves(model)[name][...], leaf[...])
    assert manifest["method"] == "magnitude"
    assert zero_share(model) == 0.75
    arrays = load_file(tmp_path / "m" / WEIGHTS)
    up = pruned.blocks[0].channel.up.w
    kept = arrays["blocks.0.channel.up.w.kept"]
    assert arrays["blocks.0.channel.up.w.mask"].nbytes + kept.nbytes == up.size / 8 + (
        up.size / 4 * jnp.dtype(dtype).itemsize
    )
    assert arrays["embed.w"].dtype == jnp.dtype(dtype)  # no zeros: as it is
    assert arrays["final_norm.scale"].dtype == np.float32


def test_what_was_pruned_and_quantised_takes_the_bits_of_the_rest(
    pruned: LM, tmp_path: Path
) -> None:
    spec = parse_spec("w4g8")
    small = quantise(pruned, spec)
    made = {}
    for sparse in (False, True):
        folder = tmp_path / str(sparse)
        save_quantised(
            small, folder, config={}, spec=spec, vocab=vocab_spec(spec), keep=KEEP,
            tokenizer=ByteTokenizer().to_json(), facts={}, sparse=sparse,
        )  # fmt: skip
        made[sparse] = load_quantised(folder, build)[0]
    for name, leaf in named_leaves(small).items():
        for model in made.values():
            np.testing.assert_array_equal(named_leaves(model)[name][...], leaf[...])
    up = load_file(tmp_path / "True" / WEIGHTS)
    whole = small.blocks[0].channel.up.w.codes.size
    assert up["blocks.0.channel.up.w.codes.mask"].size == whole / 4
    assert up["blocks.0.channel.up.w.codes.kept"].size <= whole / 4
    assert "blocks.0.channel.up.w.codes" not in up


def test_damage_is_refused(pruned: LM, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_pruned(
        pruned, folder, config={}, dtype="float32", tokenizer=ByteTokenizer().to_json(), facts={}
    )
    arrays = load_file(folder / WEIGHTS)
    name = "blocks.0.channel.up.w.kept"
    for changed, message in (
        ({name: arrays[name][:-1]}, "blocks.0.channel.up.w: .* entries, not"),
        ({name: arrays[name].astype(np.float16)}, r"is float16.*pruned.json asks for float32"),
        ({"more": arrays[name]}, "holds more"),
    ):
        with_weights(folder, arrays | changed, PRUNED)
        with pytest.raises(UserError, match=message):
            load_pruned(folder, build)
    with_weights(folder, {k: v for k, v in arrays.items() if k != name}, PRUNED)
    with pytest.raises(UserError, match=f"lacks {name}"):
        load_pruned(folder, build)
    assert "cannot be read" in refusal(folder)  # it is no quantised one
    text = (folder / PRUNED).read_text()
    (folder / PRUNED).write_text(text.replace('"float32"', '"float8"'))
    with pytest.raises(UserError, match="has dtype='float8'"):
        load_pruned(folder, build)
