"""Models to GGUF and back, and the logits that other programs computed with such files."""

import functools
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.data import ByteTokenizer
from slm_jax.errors import UserError
from slm_jax.export.gguf import load_gguf, load_gguf_tokenizer, save_gguf
from slm_jax.export.gguf.blocks import F32, Q8_0, decode, encode
from slm_jax.export.gguf.read import GGUF, read_gguf
from slm_jax.export.gguf.write import PlannedTensor, write_gguf
from slm_jax.models.lm import LM, LMConfig
from slm_jax.models.presets import PRESETS
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.module import named_leaves
from slm_jax.nn.rope import NTKScaling, RopeConfig
from slm_jax.nn.ssm import MambaConfig
from tests.export.cases import CASES, PROMPT, filled, make
from tests.export.cases import logits as logits_of

GOLDEN = Path(__file__).parent / "golden"
TOKENS = ByteTokenizer().encode(PROMPT)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case as a float32 file."""
    folder = tmp_path_factory.mktemp("gguf")
    for name in CASES:
        save_gguf(make(name), folder / f"{name}.gguf", tokenizer=ByteTokenizer())
    return folder


@functools.cache
def ours(name: str) -> np.ndarray:
    """Logits of a case."""
    return logits_of(make(name), TOKENS)


def weights(model: LM) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf.get_value()) for name, leaf in named_leaves(model).items()}


@pytest.mark.parametrize("name", [n for n in CASES if n != "adjacent"])
def test_a_float32_file_gives_the_same_weights_back(name: str, files: Path) -> None:
    model = make(name)
    back, sizes = load_gguf(files / f"{name}.gguf")
    assert sizes.parameters == sum(a.size for a in weights(model).values())
    assert sizes.encodings.keys() == {"F32"}
    for (path, want), got in zip(weights(model).items(), weights(back).values(), strict=True):
        if path.endswith("a_log"):  # through exp and log, each rounded once
            np.testing.assert_allclose(got, want, rtol=0, atol=3e-7)
        else:
            np.testing.assert_array_equal(got, want, err_msg=path)
    if name in ("biases", "mamba", "mamba-head"):  # the same function in other words
        np.testing.assert_allclose(logits_of(back, TOKENS), ours(name), atol=2e-5)
    else:
        assert back.config == model.config


def test_adjacent_pairs_are_stored_as_they_are_and_read_as_halves(files: Path) -> None:
    """llama.cpp's form of rope is ours with layout="adjacent"; on reading it becomes "half"."""
    model = make("adjacent")
    back, _ = load_gguf(files / "adjacent.gguf")
    stored = read_gguf(files / "adjacent.gguf").tensors["blk.1.attn_q.weight"].values()
    q = np.asarray(model.blocks[0].mixer.q.w[...])[1]
    np.testing.assert_array_equal(stored, q.reshape(64, 64).T)
    np.testing.assert_allclose(logits_of(back, TOKENS), ours("adjacent"), atol=2e-5)


@pytest.mark.parametrize("name", ["dense", "moe", "mamba"])
def test_eight_bits_are_the_rounding_of_every_matrix(name: str, tmp_path: Path) -> None:
    model = make(name)
    sizes = save_gguf(model, tmp_path / "q.gguf", dtype="q8_0")
    back, read = load_gguf(tmp_path / "q.gguf")
    assert read == sizes
    assert sizes.encodings["Q8_0"] > 0
    full = save_gguf(model, tmp_path / "f.gguf")
    float_file, file = read_gguf(tmp_path / "f.gguf"), read_gguf(tmp_path / "q.gguf")
    for tensor, stored in file.tensors.items():
        want = float_file.tensors[tensor].values()
        if stored.encoding is Q8_0:
            want = decode(Q8_0, encode(Q8_0, want, tensor)).reshape(want.shape)
        elif stored.encoding is not F32:
            assert stored.shape[-1] % 32  # a row that has no whole blocks
            want = want.astype(np.float16)
        np.testing.assert_array_equal(stored.values(), want, err_msg=tensor)
        assert stored.encoding is F32 or not re.search(r"norm|inp|conv|ssm_[ad]$", tensor)
    assert 8 * sizes.tensor_bytes / sizes.parameters < 10  # small vectors weigh more here
    assert sizes.tensor_bytes == sum(t.raw.size for t in file.tensors.values())
    assert full.tensor_bytes == 4 * full.parameters
    assert np.abs(logits_of(back, TOKENS) - ours(name)).max() < 0.3


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_halves_are_rounded_once(dtype: str, tmp_path: Path) -> None:
    model = make("dense")
    save_gguf(model, tmp_path / "h.gguf", dtype=dtype)
    back, sizes = load_gguf(tmp_path / "h.gguf")
    want = jnp.asarray(model.embed.w[...]).astype({"f16": "float16", "bf16": "bfloat16"}[dtype])
    np.testing.assert_array_equal(back.embed.w[...], want.astype(jnp.float32))
    assert sizes.encodings == {dtype.upper(): 15, "F32": 5}


def golden() -> dict[str, dict]:
    return json.loads((GOLDEN / "peers.json").read_text())


@pytest.mark.parametrize("name", json.loads((GOLDEN / "peers.json").read_text()))
def test_other_programs_read_the_same_logits_from_this_file(name: str, files: Path) -> None:
    """The file is, byte for byte, the one that they read when the golden logits were written."""
    raw = (files / f"{name}.gguf").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == golden()[name]["sha256"]
    theirs = np.load(GOLDEN / "peers.npz")
    peers = golden()[name]["peers"]
    assert peers
    for peer in peers:
        want = theirs[f"{peer}-{name}"]
        assert want.std() > 0.5
        np.testing.assert_allclose(ours(name), want, atol=1e-4, rtol=0, err_msg=peer)


def test_the_tokenizer_of_bytes_is_in_the_file(files: Path) -> None:
    tokenizer = load_gguf_tokenizer(files / "dense.gguf", 257)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


def test_a_published_model_has_llama_cpps_factors(tmp_path: Path) -> None:
    """Llama 3.2's factors: 1 for the fast rotations, 32 for the slow ones, rising between."""
    config = replace(
        PRESETS["llama-3.2-1b"],
        n_layers=1, vocab_size=64, d_model=64, dtype="float32",
    )  # fmt: skip
    mixer = replace(config.pattern[0].mixer, n_heads=2, n_kv_heads=1)
    config = replace(config, pattern=(LayerConfig(mixer, MLPConfig(64)),))
    model = filled(config)
    save_gguf(model, tmp_path / "x.gguf")
    factors = read_gguf(tmp_path / "x.gguf").tensors["rope_freqs.weight"].values()
    assert (factors[0], factors[-1]) == (1, 32)
    assert (np.diff(factors) >= 0).all()
    back, _ = load_gguf(tmp_path / "x.gguf")
    tokens = np.arange(60) % 64
    np.testing.assert_allclose(logits_of(back, tokens), logits_of(model, tokens), atol=1e-5)
    save_gguf(back, tmp_path / "y.gguf")  # and again, from the form that was read
    assert (tmp_path / "y.gguf").read_bytes()[200:] == (tmp_path / "x.gguf").read_bytes()[200:]


def with_layer(mixer, channel=None, **changes) -> LMConfig:
    return LMConfig(64, 64, 1, (LayerConfig(mixer, channel),), **changes)


ATTENTION = AttentionConfig(4, 2, 16)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (with_layer(replace(ATTENTION, window=8), MLPConfig(64)), "window=8"),
        (with_layer(ATTENTION, MLPConfig(64, "gelu")), "activation=gelu"),
        (with_layer(replace(ATTENTION, rope=RopeConfig(scaling=NTKScaling(2.0, 2048))),
                    MLPConfig(64)), "NTKScaling"),
        (with_layer(MambaConfig(192)), "d_inner=192"),
        (with_layer(MambaConfig(128, conv_bias=False)), "conv_bias=False"),
        (with_layer(AttentionConfig(4, 2, 16, rope=RopeConfig(layout="adjacent"),
                                    qk_norm="head"), MLPConfig(64)), "adjacent"),
        (with_layer(AttentionConfig(4, 2, 16), MLPConfig(64), embedding_scale=8.0), "."),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    config: LMConfig, says: str, tmp_path: Path
) -> None:
    model = jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))
    with pytest.raises(UserError, match=says):
        save_gguf(model, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="exists"):
        save_gguf(make("dense"), path)
    assert path.read_bytes() == b"mine"
    save_gguf(make("dense"), path, tokenizer=ByteTokenizer(), overwrite=True)
    assert load_gguf(path)[1].arch == "llama"
    with pytest.raises(UserError, match="is a folder"):
        save_gguf(make("dense"), tmp_path, overwrite=True)


def changed(file: GGUF, path: Path, drop: str = "", **metadata) -> Path:
    """The same file with other metadata (dots are written as __), without one tensor."""
    values = {**file.metadata, **{k.replace("__", "."): v for k, v in metadata.items()}}
    write_gguf(
        path,
        {k: v for k, v in values.items() if v is not None},
        {
            name: PlannedTensor(t.shape, t.encoding, lambda t=t: [t.values()])
            for name, t in file.tensors.items()
            if name != drop
        },
    )
    return path


BIG = np.uint32(2**32 - 1)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"general__architecture": "gemma"}, "general.architecture='gemma'"),
        ({"general__architecture": None}, "general.architecture='None'"),
        ({"llama__block_count": BIG}, "block_count=4294967295"),
        ({"llama__embedding_length": BIG}, "embedding_length=4294967295"),
        ({"llama__feed_forward_length": BIG}, "feed_forward_length=4294967295"),
        ({"llama__attention__head_count": BIG}, "head_count=4294967295"),
        ({"llama__attention__head_count_kv": BIG}, "head_count"),
        ({"llama__attention__key_length": BIG}, "head_count"),
        ({"llama__attention__head_count": "4"}, "head_count=4: it must be a whole number"),
        ({"llama__attention__head_count": None}, "no llama.attention.head_count"),
        ({"llama__attention__head_count_kv": np.int32([2, 2])}, "must be a whole number"),
        ({"llama__attention__layer_norm_rms_epsilon": np.float32("nan")}, "epsilon=nan"),
        ({"llama__rope__freq_base": np.float32(-1)}, "freq_base=-1"),
        ({"llama__rope__dimension_count": np.uint32(8)}, "dimension_count=8"),
        ({"llama__rope__scaling__type": "yarn"}, "scaling.type=yarn"),
        ({"llama__expert_count": np.uint32(3)}, "ffn_up_exps"),
        ({"llama__logit_scale": np.float32(2)}, "logit_scale is a setting"),
        ({"drop": "blk.1.ffn_up.weight"}, "lacks blk.1.ffn_up.weight"),
        ({"drop": "token_embd.weight"}, "no token_embd.weight"),
        ({"llama__block_count": np.uint32(1)}, "holds 'blk.1"),
        ({"llama__vocab_size": np.uint32(300)}, "vocab_size=300"),
    ],
)
def test_metadata_is_held_against_the_tensors(
    metadata: dict, says: str, files: Path, tmp_path: Path
) -> None:
    path = changed(read_gguf(files / "dense.gguf"), tmp_path / "x.gguf", **metadata)
    with pytest.raises(UserError, match=re.escape(says).replace("=", "=['\"]?")) as error:
        load_gguf(path)
    assert "\n" not in str(error.value)


def test_numbers_of_mamba_and_of_experts_are_held_too(files: Path, tmp_path: Path) -> None:
    for name, key in (
        ("mamba", "mamba__ssm__state_size"),
        ("mamba", "mamba__ssm__conv_kernel"),
        ("mamba", "mamba__ssm__time_step_rank"),
        ("moe", "llama__expert_count"),
        ("moe", "llama__expert_used_count"),
    ):
        path = changed(read_gguf(files / f"{name}.gguf"), tmp_path / "x.gguf", **{key: BIG})
        with pytest.raises(UserError, match="4294967295"):
            load_gguf(path)


def test_flipped_bits_never_end_in_anything_but_one_line(files: Path, tmp_path: Path) -> None:
    """In the header every flip is refused, or the file is still a whole one."""
    raw = bytearray((files / "dense.gguf").read_bytes())
    draw = np.random.RandomState(0)
    path, refused = tmp_path / "x.gguf", 0
    header = raw.index(b"tokenizer.ggml.tokens")
    entries = raw.index(b"token_embd.weight") - 8
    end = raw.index(b"output_norm.weight") + 40
    spots = [*draw.randint(0, header, 25), *draw.randint(entries, end, 25)]
    for at in spots:
        broken = bytearray(raw)
        broken[at] ^= 1 << draw.randint(8)
        path.write_bytes(broken)
        try:
            load_gguf(path)
        except UserError:
            refused += 1
    assert refused > 25
