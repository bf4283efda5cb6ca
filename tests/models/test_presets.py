import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from slm_jax.errors import UserError
from slm_jax.models.flops import forward_flops, training_flops
from slm_jax.models.lm import LM, LMConfig
from slm_jax.models.presets import (
    PRESETS,
    dense,
    hybrid,
    mamba,
    moe,
    preset,
    state_bytes,
    summary,
)
from slm_jax.models.recursion import RecursionConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.kv_cache import KVCache
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.module import count_parameters
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.norm import NormConfig
from slm_jax.nn.ssm import MambaConfig, MambaState

# Parameters of the published checkpoints, tied weights once: (total, active).
PARAMETERS = {
    "llama-3.2-1b": (1_235_814_400, 1_235_814_400),
    "tinyllama-1.1b": (1_100_048_384, 1_100_048_384),
    "smollm2-135m": (134_515_008, 134_515_008),
    "mistral-7b": (7_241_732_096, 7_241_732_096),
    "gemma-2b": (2_506_172_416, 2_506_172_416),
    "gemma-2-9b": (9_241_705_984, 9_241_705_984),
    "phi-3-mini": (3_821_079_552, 3_821_079_552),
    "phi-4-mini": (3_836_021_760, 3_836_021_760),
    "phi-4": (14_659_507_200, 14_659_507_200),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "phi-3.5-moe": (41_873_153_344, 6_640_999_744),
    "mamba-130m": (129_135_360, 129_135_360),
    "mamba-2.8b": (2_768_345_600, 2_768_345_600),
    "jamba": (51_570_323_328, 12_110_311_296),
    "qwen3-0.6b": (596_049_920, 596_049_920),
    "deepseek-r1-distill-qwen-1.5b": (1_777_088_000, 1_777_088_000),
    "deepseek-r1-distill-qwen-7b": (7_615_616_512, 7_615_616_512),
    "tiny-dense": (1_017_088, 1_017_088),
    "tiny-moe": (1_019_136, 625_920),
    "tiny-mamba": (965_888, 965_888),
    "tiny-hybrid": (925_304, 728_696),
    # tiny-dense, the 256 x 128 adapter and a norm.
    "tiny-looped": (1_049_984, 1_049_984),
}

_ATTENTION = AttentionConfig(4, 2, 10, qkv_bias=True, out_bias=True, qk_norm="full")
ODD = {
    "biases": LMConfig(
        50,
        24,
        3,
        (LayerConfig(_ATTENTION, MLPConfig(40, bias=True), norm_position="sandwich"),),
        NormConfig("layer", bias=True),
        tie_embeddings=False,
        head_bias=True,
    ),
    "ungated": LMConfig(
        50, 24, 3, (LayerConfig(_ATTENTION, MLPConfig(40, gated=False, bias=True), parallel=True),)
    ),
    "post-norm": LMConfig(
        50,
        24,
        5,
        (
            LayerConfig(replace(_ATTENTION, qk_norm="head"), None, norm_position="post"),
            LayerConfig(_ATTENTION, MoEConfig(4, 16, 1, selection_bias=True), "post"),
        ),
    ),
    "no-norm-weight": LMConfig(
        50, 24, 2, (LayerConfig(_ATTENTION, MLPConfig(40)),), NormConfig(scale="none")
    ),
    "looped": LMConfig(
        50,
        24,
        4,
        (LayerConfig(_ATTENTION, MLPConfig(40)),),
        NormConfig("layer", bias=True),
        recursion=RecursionConfig(1, 2, repeats=3, injection="add"),
    ),
    "ssm-options": LMConfig(
        50,
        24,
        3,
        (
            LayerConfig(
                MambaConfig(40, 5, 3, dt_rank=7, inner_norms=True, conv_bias=False, proj_bias=True),
                MLPConfig(40),
            ),
        ),
    ),
}


@functools.cache
def abstract(config: LMConfig) -> LM:
    return jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))


def test_every_preset_has_its_number() -> None:
    assert PRESETS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    total, active = PARAMETERS[name]
    config = preset(name)
    model = abstract(config)
    assert count_parameters(model) == total
    sizes = summary(config)
    assert (sizes.total, sizes.active) == (total, active)
    ends = count_parameters([model.embed, model.head])
    assert sizes.non_embedding == total - ends


@pytest.mark.parametrize("name", ODD)
def test_analytic_parameters_of_every_option(name: str) -> None:
    model, sizes = abstract(ODD[name]), summary(ODD[name])
    assert sizes.total == count_parameters(model)
    assert sizes.non_embedding == sizes.total - count_parameters([model.embed, model.head])


def test_tiny_presets_read_bytes_and_are_small() -> None:
    tiny = [name for name in PRESETS if name.startswith("tiny-")]
    assert len(tiny) == 5
    for name in tiny:
        assert preset(name).vocab_size == 257
        assert 0.9e6 < PARAMETERS[name][0] < 1.1e6


@pytest.mark.parametrize(
    ("name", "closest"),
    [("mistral7b", "mistral-7b"), ("Llama-3.2-1B-Instruct", "llama-3.2-1b"), ("tiny", "tiny-")],
)
def test_unknown_preset_names_the_closest(name: str, closest: str) -> None:
    with pytest.raises(UserError, match=f"preset='{name}' does not exist: choose .*{closest}"):
        preset(name)


def test_unlike_any_preset_names_all() -> None:
    with pytest.raises(UserError, match=r"llama-3\.2-1b, .*tiny-hybrid"):
        preset("xyzzy")


@pytest.mark.parametrize("name", [*PARAMETERS, *ODD])
@pytest.mark.parametrize(("length", "dtype"), [(37, "float32"), (6000, "bfloat16"), (6000, "int8")])
def test_state_bytes_are_those_of_the_state(name: str, length: int, dtype: str) -> None:
    config = ODD.get(name) or preset(name)
    model = abstract(config)
    state = jax.eval_shape(lambda: model.init_state(1, length, jnp.dtype(dtype)))
    held = 0
    for part in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, KVCache | MambaState)):
        if isinstance(part, KVCache):
            part = part._replace(positions=None)
        held += sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(part))
    assert state_bytes(config, length, dtype) == held


def test_window_caps_the_state() -> None:
    config = preset("mistral-7b")
    per_token = summary(config).kv_bytes_per_token
    assert per_token == 2 * 32 * 8 * 128 * 2
    assert state_bytes(config, 100) == 100 * per_token
    assert state_bytes(config, 4096) == state_bytes(config, 1_000_000) == 4096 * per_token


@pytest.mark.parametrize(("name", "gib"), [("mixtral-8x7b", 32), ("jamba", 4)])
def test_cache_of_256k_tokens_as_published(name: str, gib: int) -> None:
    # arXiv 2403.19887, table 1.
    assert summary(preset(name)).kv_bytes_per_token * 2**18 == gib * 2**30


def test_ssm_state_does_not_grow() -> None:
    config = preset("mamba-130m")
    sizes = summary(config)
    assert sizes.kv_bytes_per_token == 0
    assert sizes.ssm_state_bytes == 24 * 1536 * (3 * 2 + 16 * 4)
    assert state_bytes(config, 1) == state_bytes(config, 10**6) == sizes.ssm_state_bytes


def test_summary_flops() -> None:
    config = replace(preset("tiny-hybrid"), remat="full")
    sizes = summary(config, 100)
    assert sizes.seq_len == 100
    assert sizes.forward_flops == forward_flops(config, 100).total
    assert sizes.training_flops == 3 * sizes.forward_flops < training_flops(config, 100)
    assert summary(config).seq_len == config.max_seq_len


def test_dense_defaults() -> None:
    config = dense(96, 3, 6)
    assert config.pattern == (LayerConfig(AttentionConfig(6, 6, 16), MLPConfig(256)),)
    assert (config.vocab_size, config.n_layers, config.d_model) == (257, 3, 96)


def test_moe_and_mamba_defaults() -> None:
    assert moe(96, 3, 6).pattern[0].channel == MoEConfig(8, 256, 2)
    assert mamba(96, 3).pattern == (LayerConfig(MambaConfig(192, 16), None),)
    assert mamba(96, 3, expand=1.3).pattern[0].mixer == MambaConfig(125, 16)


def test_hybrid_places_attention_and_experts_as_jamba() -> None:
    config = preset("jamba")
    layers = [config.layer(i) for i in range(config.n_layers)]
    attention = [i for i, c in enumerate(layers) if isinstance(c.mixer, AttentionConfig)]
    experts = [i for i, c in enumerate(layers) if isinstance(c.channel, MoEConfig)]
    assert attention == [4, 12, 20, 28]
    assert experts == list(range(1, 32, 2))


def test_hybrid_without_experts_has_the_attention_period() -> None:
    config = hybrid(64, 6, 4, attention_period=3, attention_offset=2)
    kinds = [(type(c.mixer), type(c.channel)) for c in config.pattern]
    scan, attention = (MambaConfig, MLPConfig), (AttentionConfig, MLPConfig)
    assert kinds == [scan, scan, attention]


def test_bad_shapes() -> None:
    with pytest.raises(UserError, match="n_heads=5 does not divide d_model=64"):
        dense(64, 2, 5)
    with pytest.raises(UserError, match="n_heads=6 is not a multiple of n_kv_heads=4"):
        dense(96, 2, 6, 4)
    with pytest.raises(UserError, match="attention_offset=8 must be between 0 and its period 8"):
        hybrid(64, 8, 4, attention_offset=8)
    with pytest.raises(UserError, match="expert_offset=2 must be between 0 and its period 2"):
        hybrid(64, 8, 4, expert_offset=2)
