"""config.json to LMConfig and back, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slm_jax.errors import UserError
from slm_jax.models.hf import FAMILIES, config_from_hf, config_to_hf
from slm_jax.models.lm import LMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.norm import NormConfig
from slm_jax.nn.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from slm_jax.nn.ssm import MambaConfig
from tests.golden.cases import CASES
from tests.models.hf_golden import GOLDEN
from tests.models.hf_variants import VARIANTS

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def golden_config(name: str) -> dict[str, Any]:
    return json.loads(Path(GOLDEN / f"{name}-init" / "config.json").read_text())


def attention(hf: dict[str, Any], layer: int = 0) -> AttentionConfig:
    mixer = config_from_hf(hf).layer(layer).mixer
    assert isinstance(mixer, AttentionConfig)
    return mixer


@pytest.mark.parametrize("name", CASES)
def test_golden_config_survives_the_round_trip(name: str) -> None:
    hf = golden_config(name)
    config = config_from_hf(hf)
    written = config_to_hf(config, hf["model_type"])
    assert config_from_hf(json.loads(json.dumps(written))) == config
    # What is written under a name that transformers wrote too has the value it had there.
    own = {"eos_token_id", "rope_parameters", "pad_token_id"}
    common = (set(hf) & set(written)) - own
    assert {"hidden_size", "tie_word_embeddings", "architectures"} <= common
    if hf.get("head_dim", 0) is None:
        common -= {"head_dim"}
    assert {key: written[key] for key in common} == {key: hf[key] for key in common}


@pytest.mark.parametrize("name", CASES)
def test_class_is_found_without_being_named(name: str) -> None:
    hf = golden_config(name)
    # Phi-3 without LongRoPE is a Llama with other tensor names.
    want = "llama" if name == "phi3" else hf["model_type"]
    assert config_to_hf(config_from_hf(hf))["model_type"] == want


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_survives_the_round_trip(name: str) -> None:
    model_type, config = VARIANTS[name]
    written = config_to_hf(config)
    assert written["model_type"] == model_type
    back = config_from_hf(json.loads(json.dumps(written)))
    assert config_to_hf(back) == written
    assert (back.n_layers, back.norm, back.d_model) == (
        config.n_layers,
        config.norm,
        config.d_model,
    )


def test_what_has_no_word_is_left_out() -> None:
    config = config_from_hf(LLAMA)
    tuned = replace(config, dtype="bfloat16", remat="full", scan_unroll=2)
    assert config_to_hf(tuned) == config_to_hf(config)


def test_pattern_is_the_shortest_period() -> None:
    gemma2 = golden_config("gemma2") | {"num_hidden_layers": 5, "layer_types": None}
    config = config_from_hf(gemma2)
    assert [config.layer(i).mixer.window for i in range(5)] == [8, None, 8, None, 8]
    assert len(config.pattern) == 2


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"type": "linear", "factor": 2.0}, LinearScaling(2.0)),
        (
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            Llama3Scaling(32.0, 64, 1.0, 4.0),
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            YarnScaling(4.0, 32),
        ),
        (
            {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
            YarnScaling(4.0, 128, attention_factor=1.0),
        ),
    ],
)
def test_rope_scaling_of_older_configurations(settings: dict, scaling: RopeScaling) -> None:
    hf = LLAMA | {"rope_theta": 500_000.0, "rope_scaling": settings}
    assert attention(hf).rope == RopeConfig(theta=500_000.0, scaling=scaling)


def test_phi3_reads_its_older_names() -> None:
    short, long = (1.0, 1.1, 1.2), (2.0, 3.0, 4.0)
    hf = LLAMA | {
        "model_type": "phi3",
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "su", "short_factor": list(short), "long_factor": list(long)},
    }
    # sqrt(1 + ln(128 / 32) / ln 32) = sqrt(1.4)
    want = LongRopeScaling(short, long, 32, pytest.approx(1.4**0.5))
    assert attention(hf).rope == RopeConfig(fraction=0.75, scaling=want)


def test_default_theta_is_the_class_s() -> None:
    hf = golden_config("smollm3")
    del hf["rope_parameters"]
    assert attention(hf).rope == RopeConfig(theta=2e6)


def test_fields_that_a_class_does_not_read_are_ignored() -> None:
    hf = LLAMA | {"sliding_window": 4, "attention_dropout": 0.1, "attention_bias": True}
    assert attention(hf).window is None
    assert attention(hf).out_bias
    assert not attention(hf | {"model_type": "mistral"}).out_bias
    assert attention(hf | {"model_type": "mistral"}).window == 4


def test_windows_of_qwen_need_their_switch() -> None:
    hf = LLAMA | {"model_type": "qwen2", "sliding_window": 4, "max_window_layers": 1}
    assert attention(hf, 1).window is None
    hf |= {"use_sliding_window": True}
    assert (attention(hf, 0).window, attention(hf, 1).window) == (None, 4)


def test_gelu_of_gemma_is_the_tanh_form() -> None:
    hf = LLAMA | {"model_type": "gemma", "hidden_act": "gelu", "head_dim": 8}
    assert config_from_hf(hf).pattern[0].channel == MLPConfig(48, "gelu_tanh")
    assert config_from_hf(hf).tie_embeddings
    assert config_from_hf(LLAMA | {"hidden_act": "gelu"}).pattern[0].channel == MLPConfig(
        48, "gelu"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type='gpt2' is unknown: choose from llama, mistral"),
        ({"model_type": None}, r"model_type=None is unknown"),
        ({"hidden_size": "32"}, r"hidden_size='32' is not supported .* whole numbers"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0 .* whole numbers"),
        ({"hidden_act": "xielu"}, r"hidden_act='xielu' .* only silu or gelu"),
        ({"rope_parameters": {"rope_type": "mrope"}}, r"rope_type='mrope' .* default or linear"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters.factor=None .* a value"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            r"rope_parameters=\['full_attention'\] .* one rotation for all layers",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            r"partial_rotary_factor=0.5 .* only 1.0",
        ),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=.* only None"),
        ({"num_key_value_heads": 3}, r"n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, r"use_bidirectional_atten"),
        (
            {"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2},
            r"layer_types='chunked",
        ),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, r"layer_types='1 entries'"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"no_rope_layers='1 entries'"),
        ({"model_type": "mamba"}, r"model_type=mamba has no layer_norm_epsilon: add it"),
        ({"model_type": "mamba", "hidden_act": "gelu"}, r"hidden_act='gelu' .* only silu"),
        (
            {"model_type": "olmoe", "clip_qkv": 8.0},
            r"clip_qkv=8.0 is not supported for model_type=olmoe: only None",
        ),
        (
            {"model_type": "phimoe", "rope_parameters": {"rope_type": "longrope"}},
            r"rope_type='longrope' .* only default",
        ),
    ],
)
def test_refused_configuration(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        config_from_hf(LLAMA | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", sorted(set(LLAMA) - {"model_type", "max_position_embeddings"}))
def test_missing_field_is_named(key: str) -> None:
    hf = {k: v for k, v in LLAMA.items() if k != key}
    with pytest.raises(UserError, match=f"model_type=llama has no {key}: add it"):
        config_from_hf(hf)


_MIXER = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8)
_DENSE = LayerConfig(_MIXER, MLPConfig(24))
_SSM = LayerConfig(MambaConfig(64), None)


@pytest.mark.parametrize(
    ("pattern", "settings", "message"),
    [
        # hybrids: Mamba without norms between attention with rope
        (
            (_DENSE, _SSM),
            {},
            r"no class of transformers computes this model: jamba needs layers\.0",
        ),
        ((_DENSE, LayerConfig(_MIXER, MoEConfig(2, 24))), {}, r"layers\.1\.channel="),
        (
            (LayerConfig(replace(_MIXER, softcap=30.0), MLPConfig(24)),),
            {},
            r"llama needs layers\.0\.mixer\.softcap=None instead of 30\.0 and 1 more changes",
        ),
        ((replace(_DENSE, parallel=True),), {}, r"parallel=False instead of True"),
        ((_DENSE,), {"norm": NormConfig("layer")}, r"norm\.kind='rms' instead of 'layer'"),
        ((_DENSE,), {"embedding_scale": 2.0}, r"embedding_scale=None instead of 2\.0"),
        (
            (LayerConfig(_MIXER, MLPConfig(24, gated=False)),),
            {},
            r"channel\.gated=True instead of False",
        ),
        (
            (LayerConfig(replace(_MIXER, rope=RopeConfig(layout="adjacent")), MLPConfig(24)),),
            {},
            r"rope\.layout='half' instead of 'adjacent'",
        ),
        (
            (LayerConfig(_MIXER, MoEConfig(2, 24, selection_bias=True)),),
            {},
            r"selection_bias=False instead of True",
        ),
        ((LayerConfig(MambaConfig(40), None),), {}, r"mamba needs layers\.0\.mixer\.d_inner=32"),
    ],
)
def test_model_without_a_class(
    pattern: tuple[LayerConfig, ...], settings: dict[str, Any], message: str
) -> None:
    config = LMConfig(47, 32, 2, pattern, **settings)
    with pytest.raises(UserError, match=message) as error:
        config_to_hf(config)
    assert "\n" not in str(error.value)


def test_named_class_that_does_not_fit() -> None:
    config = LMConfig(47, 32, 2, (_DENSE,))
    with pytest.raises(
        UserError, match=r"model_type=qwen2 does not compute this model: qwen2 needs"
    ):
        config_to_hf(config, "qwen2")
    with pytest.raises(UserError, match=r"model_type='bert' is unknown"):
        config_to_hf(config, "bert")
    _, odd = VARIANTS["width-not-of-heads"]
    with pytest.raises(UserError, match=r"d_model=32 must be a multiple of n_heads=3"):
        config_to_hf(odd, "llama")


def test_every_class_has_a_golden_case() -> None:
    assert {golden_config(name)["model_type"] for name in CASES} == set(FAMILIES)
