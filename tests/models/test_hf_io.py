"""Folders of safetensors: the same bits out as in, and every fault named."""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from slm_jax.errors import UserError
from slm_jax.models.hf import config_from_hf, load_hf, save_hf, tensor_map
from slm_jax.models.hf import io as hf_io
from slm_jax.models.lm import LM, LMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.module import count_parameters, named_leaves
from tests.golden.cases import CASES
from tests.models.hf_golden import GOLDEN
from tests.models.hf_variants import VARIANTS

LLAMA = GOLDEN / "llama-reinit"
WEIGHTS = "model.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def folder_of(
    tmp_path: Path, tensors: dict[str, np.ndarray], source: Path = LLAMA, **changes: Any
) -> Path:
    """A folder with these tensors and the source's configuration, changed."""
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(read_config(source) | changes))
    save_file(tensors, folder / WEIGHTS)
    return folder


def assert_same(a: LM, b: LM) -> None:
    left, right = named_leaves(a), named_leaves(b)
    assert set(left) == set(right)
    for name, leaf in left.items():
        np.testing.assert_array_equal(leaf.get_value(), right[name].get_value(), err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_keeps_every_bit(name: str, tmp_path: Path) -> None:
    source, out = GOLDEN / f"{name}-reinit", tmp_path / "deep" / "out"
    model = load_hf(source)
    assert all(leaf.get_value().dtype == jnp.float32 for leaf in named_leaves(model).values())
    save_hf(model, out, model_type=read_config(source)["model_type"])
    want, have = load_file(source / WEIGHTS), load_file(out / WEIGHTS)
    assert set(have) == set(want)
    for key, value in want.items():
        assert have[key].dtype == value.dtype == np.float32
        np.testing.assert_array_equal(have[key], value, err_msg=key)
    with safe_open(out / WEIGHTS, "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert config_from_hf(read_config(out)) == model.config
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


@pytest.mark.parametrize("name", ["gemma2-tail", "jamba-tail", "smollm3-tail"])
def test_layers_of_a_last_incomplete_period(name: str, tmp_path: Path) -> None:
    model = LM(VARIANTS[name][1], jax.random.key(0))
    save_hf(model, tmp_path / "out")
    assert_same(load_hf(tmp_path / "out"), model)


def test_map_covers_both_sides_once() -> None:
    for name in CASES:
        folder = GOLDEN / f"{name}-reinit"
        config = read_config(folder)
        shapes = jax.eval_shape(lambda c=config: LM(config_from_hf(c), jax.random.key(0)))
        mapping = tensor_map(shapes, config["model_type"])
        sizes = {key: np.zeros(shape[0], int) for key, shape in mapping.shapes.items()}
        filled = {path: 0 for path in mapping.pieces}
        for path, pieces in mapping.pieces.items():
            value = named_leaves(shapes)[path].get_value()
            for piece in pieces:
                sizes[piece.name][piece.rows] += 1
                filled[path] += int(np.prod(value.shape[len(piece.at) :]))
            assert filled[path] == value.size
        assert all((rows == 1).all() for rows in sizes.values())
        total = sum(int(np.prod(shape)) for shape in mapping.shapes.values())
        assert total == count_parameters(shapes)


def test_sharded_folder(tmp_path: Path) -> None:
    tensors = load_file(LLAMA / WEIGHTS)
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / file)
    weight_map = {key: file for file, keys in files.items() for key in keys}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(LLAMA / "config.json", tmp_path)
    assert_same(load_hf(tmp_path), load_hf(LLAMA))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors cannot be read"):
        load_hf(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(dtype: Any, tmp_path: Path) -> None:
    tensors = load_file(LLAMA / WEIGHTS)
    folder = folder_of(tmp_path, {key: value.astype(dtype) for key, value in tensors.items()})
    embed = load_hf(folder).embed.w[...]
    assert embed.dtype == jnp.float32
    want = tensors["model.embed_tokens.weight"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(embed, want)


def test_compute_dtype() -> None:
    model = load_hf(LLAMA, dtype="bfloat16")
    assert model.config.dtype == "bfloat16"
    assert load_hf(LLAMA).config.dtype == "float32"
    assert_same(model, load_hf(LLAMA))


def test_reading_holds_one_array_at_a_time(tmp_path: Path) -> None:
    layer = LayerConfig(AttentionConfig(2, 2, 64), MLPConfig(256))
    model = LM(LMConfig(64, 128, 24, (layer,)), jax.random.key(0))
    save_hf(model, tmp_path / "out")
    load_hf(tmp_path / "out")  # whatever is made once is made before the measurement
    tracemalloc.start()
    loaded = load_hf(tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sizes = [leaf.get_value().nbytes for leaf in named_leaves(loaded).values()]
    assert max(sizes) < peak < sum(sizes) / 2  # numpy's memory, not that of jax's arrays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks model\.norm\.weight, which config\.json"),
        (
            lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp" in k],
            r"lacks model\.layers\.1\.mlp\.gate_proj\.weight and 2 more tensors",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros((2, 2))}),
            r"holds model\.layers\.2\.mlp\.up_proj\.weight, for which",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(31, np.float32)}),
            r"model\.norm\.weight is \[31\], config\.json asks for \[32\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(32, np.int8)}),
            r"model\.norm\.weight is of type I8: only F32, F16, BF16",
        ),
    ],
)
def test_wrong_tensors_are_named(change: Any, message: str, tmp_path: Path) -> None:
    tensors = load_file(LLAMA / WEIGHTS)
    change(tensors)
    with pytest.raises(UserError, match=message) as error:
        load_hf(folder_of(tmp_path, tensors))
    assert "\n" not in str(error.value)


def test_derived_constants_are_passed_over(tmp_path: Path) -> None:
    tensors = load_file(LLAMA / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert_same(load_hf(folder_of(tmp_path, tensors)), load_hf(LLAMA))


def test_tied_head_in_the_file_must_be_the_embedding(tmp_path: Path) -> None:
    source = GOLDEN / "qwen2-reinit"
    tensors = load_file(source / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    folder = folder_of(tmp_path, tensors, source)
    assert_same(load_hf(folder), load_hf(source))
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"lm_head\.weight is not .* tie_word_embeddings=true"):
        load_hf(folder)


def test_unreadable_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read \(No such file"):
        load_hf(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        load_hf(tmp_path)
    config.write_text("[]")
    with pytest.raises(UserError, match=r"config\.json holds a JSON list"):
        load_hf(tmp_path)
    shutil.copy(LLAMA / "config.json", config)
    with pytest.raises(UserError, match=r"has no model\.safetensors .* save it as safetensors"):
        load_hf(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((LLAMA / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_hf(tmp_path)


def test_overwriting(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is free
    save_hf(load_hf(LLAMA), out)
    with pytest.raises(UserError, match=r"holds a model: choose another or set overwrite=True"):
        save_hf(load_hf(LLAMA), out)
    (out / "model-00001-of-00002.safetensors").touch()
    other = load_hf(GOLDEN / "llama-init")
    save_hf(other, out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", WEIGHTS]
    assert_same(load_hf(out), other)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(UserError, match="holds other things than a model"):
        save_hf(other, tmp_path / "notes", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        save_hf(other, tmp_path / "notes" / "a.txt", overwrite=True)


def test_failure_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, model = tmp_path / "out", load_hf(LLAMA)
    save_hf(model, out)

    def fail(*args: Any) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(hf_io, "_write_json", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        save_hf(load_hf(GOLDEN / "llama-init"), out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert_same(load_hf(out), model)


def test_array_without_a_place_is_named(tmp_path: Path) -> None:
    model = load_hf(LLAMA)
    model.blocks[0].mixer.q.lora_a = nnx.Param(jnp.zeros((2, 32, 4)))
    with pytest.raises(UserError, match=r"blocks\.0\.mixer\.q\.lora_a has no place .* merge"):
        save_hf(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


class WordTokenizer:
    vocab_size = 3
    eos_id = 2

    def to_json(self) -> str:
        vocab = {"a": 0, "b": 1, "<eos>": 2}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
        return inner.to_str()


def test_tokenizer_is_written(tmp_path: Path) -> None:
    save_hf(load_hf(LLAMA), tmp_path / "out", tokenizer=WordTokenizer())
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert inner.token_to_id("b") == 1
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<eos>"
    assert read_config(tmp_path / "out")["eos_token_id"] == 2


def test_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    tokenizer = WordTokenizer()
    tokenizer.vocab_size = 48
    with pytest.raises(UserError, match=r"vocab_size=47 is less than the tokenizer's 48"):
        save_hf(load_hf(LLAMA), tmp_path / "out", tokenizer=tokenizer)
