"""The folder of a quantised model: what is read is what was written, and damage is refused."""

import hashlib
import json
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from slm_jax.compress import parse_spec, quantise
from slm_jax.compress.io import (
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    check_out,
    load_quantised,
    save_quantised,
)
from slm_jax.compress.quantise import KEEP
from slm_jax.data import ByteTokenizer
from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.nn.module import named_leaves
from tests.nn.tiny import tiny_config, tiny_lm

SPEC, VOCAB = parse_spec("w4g8"), parse_spec("w8a8")


def build(data):
    config = tiny_config(data["name"])
    return jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))


def save(folder: Path, **changes) -> None:
    save_quantised(
        quantise(tiny_lm("moe"), SPEC, vocab=VOCAB),
        folder,
        **dict(
            config={"name": "moe"}, spec=SPEC, vocab=VOCAB, keep=KEEP,
            tokenizer=ByteTokenizer().to_json(), facts={"method": "rtn"},
        ) | changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "model"
    save(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_what_is_read_is_what_was_written(saved: Path) -> None:
    model, manifest = load_quantised(saved, build)
    want = quantise(tiny_lm("moe"), SPEC, vocab=VOCAB)
    assert jax.tree.structure(model) == jax.tree.structure(want)
    for name, leaf in named_leaves(want).items():
        got = named_leaves(model)[name]
        assert got.dtype == leaf.dtype
        np.testing.assert_array_equal(got[...], leaf[...])
    assert (manifest["method"], manifest["spec"]) == ("rtn", "w4g8")
    assert sorted(f.name for f in saved.iterdir()) == sorted([MANIFEST, TOKENIZER, WEIGHTS])
    assert [f.name for f in saved.parent.iterdir()] == ["model"]  # nothing temporary is left


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_quantised(folder, build)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, manifest: str = MANIFEST, **changes) -> None:
    file = folder / manifest
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def test_a_changed_byte_is_found(copy: Path) -> None:
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    assert "sha256 differs" in refusal(copy)


@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER])
def test_short_and_missing_files_are_found(copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2])
    assert f"{name} is not the file that {MANIFEST} was written with" in refusal(copy)
    (copy / name).unlink()
    assert f"has no {name}" in refusal(copy)


def test_broken_manifests_are_refused(copy: Path) -> None:
    rewrite(copy, version=2)
    assert "has version=2, not 1" in refusal(copy)
    rewrite(copy, version=1, spec="w5")
    assert "spec='w5' is no format" in refusal(copy)
    rewrite(copy, spec=None)
    assert "field 'spec' is missing or broken" in refusal(copy)
    (copy / MANIFEST).write_text("[1")
    assert "is not JSON" in refusal(copy)
    (copy / MANIFEST).write_text("[1]")
    assert "has version=None" in refusal(copy)
    (copy / MANIFEST).unlink()
    assert "cannot be read" in refusal(copy)


def with_weights(folder: Path, arrays: dict[str, np.ndarray], manifest: str = MANIFEST) -> None:
    """Other weights, and a manifest that vouches for them."""
    save_file(arrays, folder / WEIGHTS)
    sums = json.loads((folder / manifest).read_text())["sha256"]
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    rewrite(folder, manifest, sha256=sums | {WEIGHTS: digest})


def test_arrays_that_are_not_the_models_are_refused(copy: Path) -> None:
    arrays = {k: np.asarray(v.get_value()) for k, v in named_leaves(
        quantise(tiny_lm("moe"), SPEC, vocab=VOCAB)).items()}  # fmt: skip
    norm = arrays.pop("final_norm.scale")
    with_weights(copy, arrays)
    assert "lacks final_norm.scale" in refusal(copy)
    with_weights(copy, arrays | {"final_norm.scale": norm, "more": norm})
    assert "holds more" in refusal(copy)
    with_weights(copy, arrays | {"final_norm.scale": norm[:-1]})
    assert "final_norm.scale is float32[15]" in refusal(copy)
    with_weights(copy, arrays | {"final_norm.scale": norm.astype(np.float16)})
    assert "is float16[16], quantised.json asks for float32[16]" in refusal(copy)
    rewrite(copy, config={"name": "moe"}, spec="w8")
    with_weights(copy, arrays | {"final_norm.scale": norm})
    assert "asks for int8" in refusal(copy)


def test_weights_are_never_unpickled(copy: Path) -> None:
    (copy / WEIGHTS).write_bytes(pickle.dumps({"a": 1}))
    sums = json.loads((copy / MANIFEST).read_text())["sha256"]
    digest = hashlib.sha256((copy / WEIGHTS).read_bytes()).hexdigest()
    rewrite(copy, sha256=sums | {WEIGHTS: digest})
    assert "cannot be read" in refusal(copy)


def test_a_folder_in_use_is_left_alone(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a quantised model"):
        save(copy)
    save(copy, overwrite=True, facts={"method": "other"})
    assert load_quantised(copy, build)[1]["method"] == "other"
    (copy / MANIFEST).unlink()
    with pytest.raises(UserError, match="holds other things than a quantised model"):
        save(copy, overwrite=True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_out(file, overwrite=True)


def test_a_failure_leaves_no_half_folder(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save(tmp_path / "model", facts={"method": object()})
    assert list(tmp_path.iterdir()) == []
