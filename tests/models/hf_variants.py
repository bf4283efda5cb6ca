"""Small models that the golden cases do not cover, each with the class it must be written as."""

from dataclasses import replace

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
    NTKScaling,
    RopeConfig,
    YarnScaling,
)
from slm_jax.nn.ssm import MambaConfig

_ATTENTION = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8)
_MLP = MLPConfig(d_ff=24)
_MAMBA = MambaConfig(d_inner=64, d_state=4)
_GEMMA = NormConfig(eps=1e-6, scale="unit_offset")
_UNTIED = dict(tie_embeddings=False)


def _lm(*pattern: LayerConfig, n_layers: int = 2, **settings) -> LMConfig:
    return LMConfig(47, 32, n_layers, pattern, **{"max_seq_len": 64, **settings})


def _dense(channel=_MLP, n_layers: int = 2, settings: dict | None = None, **attention) -> LMConfig:
    mixer = replace(_ATTENTION, **attention)
    return _lm(LayerConfig(mixer, channel), n_layers=n_layers, **(settings or {}))


def _rope(scaling=None, **settings) -> RopeConfig:
    return RopeConfig(theta=500.0, scaling=scaling, **settings)


def _gemma2(n_layers: int, **attention) -> LMConfig:
    mixer = replace(_ATTENTION, softcap=50.0, **attention)
    channel = MLPConfig(24, "gelu_tanh")
    local, full = (
        LayerConfig(replace(mixer, window=w), channel, norm_position="sandwich") for w in (4, None)
    )
    scale = 32**0.5
    return _lm(local, full, n_layers=n_layers, norm=_GEMMA, embedding_scale=scale, **_UNTIED)


def _jamba(n_layers: int, attention_at: int, moe_at: int | None, **mamba) -> LMConfig:
    ssm = replace(_MAMBA, inner_norms=True, **mamba)
    experts = MoEConfig(n_experts=3, d_ff=24, routing="softmax")
    layers = [
        LayerConfig(
            replace(_ATTENTION, rope=None) if i == attention_at else ssm,
            experts if moe_at is not None and i % 2 == moe_at else _MLP,
        )
        for i in range(4)
    ]
    return _lm(*layers, n_layers=n_layers, **_UNTIED)


VARIANTS: dict[str, tuple[str, LMConfig]] = {
    "llama-biases": ("llama", _dense(replace(_MLP, bias=True), qkv_bias=True, out_bias=True)),
    "llama-gelu-1-layer": ("llama", _dense(MLPConfig(24, "gelu"), n_layers=1)),
    "llama-relu2-mha": ("llama", _dense(MLPConfig(24, "relu2"), n_kv_heads=4)),
    "llama-wide-heads": ("llama", _dense(head_dim=12, settings=_UNTIED)),
    "llama-linear": ("llama", _dense(rope=_rope(LinearScaling(2.0)))),
    "llama-dynamic": ("llama", _dense(rope=_rope(NTKScaling(2.0, 64)))),
    "llama-yarn": (
        "llama",
        _dense(rope=_rope(YarnScaling(4.0, 16, 16.0, 2.0, attention_factor=1.5, truncate=False))),
    ),
    "llama-llama3": ("llama", _dense(rope=_rope(Llama3Scaling(8.0, 32, 1.0, 4.0)))),
    "llama-longrope": (
        "llama",
        _dense(rope=_rope(LongRopeScaling((1.0,) * 4, (2.0, 3.0, 4.0, 5.0), 32, 1.2))),
    ),
    "width-not-of-heads": ("mistral", _dense(n_heads=3, n_kv_heads=1)),
    "mistral-window": ("mistral", _dense(window=5)),
    "qwen2-late-windows": (
        "qwen2",
        _lm(
            LayerConfig(replace(_ATTENTION, qkv_bias=True), _MLP),
            *[LayerConfig(replace(_ATTENTION, qkv_bias=True, window=4), _MLP)] * 2,
            n_layers=3,
        ),
    ),
    "qwen2-wide-heads": ("qwen2", _dense(qkv_bias=True, head_dim=12)),
    "qwen3-biases": ("qwen3", _dense(qk_norm="head", qkv_bias=True, out_bias=True)),
    "gemma-untied": (
        "gemma",
        _dense(
            MLPConfig(24, "gelu_tanh"),
            settings=dict(norm=_GEMMA, embedding_scale=32**0.5, **_UNTIED),
        ),
    ),
    "gemma2-tail": ("gemma2", _gemma2(3)),
    "gemma2-scale": ("gemma2", _gemma2(5, scale=20**-0.5)),
    "phi3-partial": ("phi3", _dense(rope=_rope(fraction=0.5), window=6)),
    "mixtral-window": (
        "mixtral",
        _dense(MoEConfig(3, 24), window=4, head_dim=12, settings=_UNTIED),
    ),
    "phimoe-plain": (
        "phimoe",
        _dense(
            MoEConfig(3, 24, routing="sparsemixer", jitter_eps=0.3),
            settings=dict(norm=NormConfig("layer", bias=True)),
        ),
    ),
    "olmoe-renormalised": ("olmoe", _dense(MoEConfig(3, 24), qk_norm="full")),
    "olmo2-biases": (
        "olmo2",
        _lm(
            LayerConfig(
                replace(_ATTENTION, qk_norm="full", qkv_bias=True, out_bias=True),
                _MLP,
                norm_position="post",
            )
        ),
    ),
    "smollm3-tail": (
        "smollm3",
        _lm(
            LayerConfig(_ATTENTION, _MLP),
            LayerConfig(replace(_ATTENTION, rope=None), _MLP),
            n_layers=3,
        ),
    ),
    "smollm3-windows": (
        "smollm3",
        _lm(
            *[LayerConfig(replace(_ATTENTION, window=4), _MLP)] * 2,
            LayerConfig(replace(_ATTENTION, rope=None), _MLP),
            n_layers=6,
        ),
    ),
    "mamba-untied": (
        "mamba",
        _lm(
            LayerConfig(
                MambaConfig(96, d_state=4, d_conv=3, dt_rank=5, conv_bias=False, proj_bias=True),
                None,
            ),
            **_UNTIED,
        ),
    ),
    "mamba-float32-residual": ("mamba", _lm(LayerConfig(_MAMBA, None), residual_dtype="float32")),
    "jamba-tail": ("jamba", _jamba(6, attention_at=2, moe_at=1, dt_rank=3)),
    "jamba-dense": ("jamba", _jamba(4, attention_at=0, moe_at=None, proj_bias=True)),
    "jamba-sparse-first": ("jamba", _jamba(4, attention_at=3, moe_at=0, conv_bias=False)),
}
