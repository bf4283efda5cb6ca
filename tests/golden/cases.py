"""The architectures whose logits are held against `transformers`: pure data, no torch.

One entry of `CASES` is one architecture: the class of its configuration, the keyword arguments
and the parameters whose gradients are stored. `write.py` turns every entry into two folders,
`<name>-init` (transformers' own initialisation) and `<name>-reinit` (weights of order one, which
show errors that small weights hide).
"""

from typing import Any, NamedTuple


class Case(NamedTuple):
    """One tiny model.

    Attributes:
        config: name of the configuration class in `transformers`.
        kwargs: its keyword arguments.
        grads: keys of model.safetensors whose gradients the "reinit" variant stores.
        notes: what this case tests that the others do not.
        long: length of a second input, stored as `tokens_long` and `logits_long`; 0 for none.
    """

    config: str
    kwargs: dict[str, Any]
    grads: tuple[str, ...]
    notes: str
    long: int = 0


VARIANTS = ("init", "reinit")
BATCH, LENGTH, LEFT_PADS, NEW_TOKENS = 2, 24, 5, 8

# Token 0 pads and occurs in no unpadded input: torch gives its embedding no gradient.
_TOKENS = dict(vocab_size=47, pad_token_id=0, bos_token_id=None, eos_token_id=None)
_BASE = dict(_TOKENS, hidden_size=32, num_hidden_layers=2)
_ATTN = dict(
    _BASE,
    intermediate_size=28,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
_MOE = dict(_ATTN, intermediate_size=8)
_WIDE = dict(_ATTN, num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # 8 frequencies

_LAYER = "model.layers.0."
_DENSE = (
    "model.embed_tokens.weight",
    _LAYER + "self_attn.q_proj.weight",
    _LAYER + "post_attention_layernorm.weight",
    _LAYER + "mlp.gate_proj.weight",
)
_QK_NORM = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_QK_NORM = tuple(_LAYER + name for name in _QK_NORM)
_GEMMA2 = tuple(
    _LAYER + name + "_layernorm.weight"
    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
)
_PHI3 = (
    "model.embed_tokens.weight",
    _LAYER + "self_attn.qkv_proj.weight",
    _LAYER + "input_layernorm.weight",
    _LAYER + "mlp.gate_up_proj.weight",
)
_MIXTRAL = (
    _LAYER + "self_attn.k_proj.weight",
    _LAYER + "block_sparse_moe.gate.weight",
    _LAYER + "block_sparse_moe.experts.1.w1.weight",
    _LAYER + "block_sparse_moe.experts.2.w2.weight",
)
_PHIMOE = (*_MIXTRAL, _LAYER + "input_layernorm.bias", "lm_head.bias")
_OLMOE = (*_QK_NORM, _LAYER + "mlp.gate.weight", _LAYER + "mlp.experts.1.up_proj.weight")
_SSM = ("A_log", "D", "conv1d.weight", "dt_proj.bias", "x_proj.weight")
_MAMBA = ("backbone.embeddings.weight", *("backbone.layers.0.mixer." + name for name in _SSM))
_JAMBA = (
    *(_LAYER + "mamba." + name for name in ("A_log", "dt_proj.bias", "dt_layernorm.weight")),
    "model.layers.1.feed_forward.router.weight",
    "model.layers.1.feed_forward.experts.1.down_proj.weight",
    "model.layers.2.self_attn.k_proj.weight",
)


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10_000.0, **settings}


CASES: dict[str, Case] = {
    "llama": Case("LlamaConfig", _ATTN, _DENSE, "GQA, half-rotation RoPE, untied head"),
    "llama-llama3": Case(
        "LlamaConfig",
        dict(
            _WIDE,
            max_position_embeddings=1280,
            tie_word_embeddings=True,
            rope_parameters=_rope(
                "llama3",
                rope_theta=500.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=160,
            ),
        ),
        _DENSE,
        "3 frequencies kept, 2 blended, 3 divided; tied head",
    ),
    "llama-yarn": Case(
        "LlamaConfig",
        dict(
            _WIDE,
            max_position_embeddings=8192,
            rope_parameters=_rope(
                "yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=2048
            ),
        ),
        _DENSE,
        "YaRN ramp over frequencies 2 to 7, attention factor 1.139",
    ),
    "llama-linear": Case(
        "LlamaConfig",
        dict(_WIDE, rope_parameters=_rope("linear", factor=4.0)),
        _DENSE,
        "position interpolation",
    ),
    "llama-dynamic": Case(
        "LlamaConfig",
        dict(_WIDE, max_position_embeddings=16, rope_parameters=_rope("dynamic", factor=2.0)),
        _DENSE,
        "dynamic NTK, the inputs are longer than max_position_embeddings",
    ),
    "mistral": Case(
        "MistralConfig",
        dict(_ATTN, sliding_window=8, num_key_value_heads=1),
        _DENSE,
        "sliding window of 8 keys, the query's own included; MQA",
    ),
    "qwen2": Case(
        "Qwen2Config",
        dict(_ATTN, tie_word_embeddings=True),
        (*_DENSE, _LAYER + "self_attn.k_proj.bias"),
        "bias on q, k, v and not on o; tied head",
    ),
    "qwen3": Case(
        "Qwen3Config",
        dict(_ATTN, head_dim=12),
        (*_DENSE, *_QK_NORM),
        "QK-norm per head, head_dim is not width / heads",
    ),
    "gemma": Case(
        "GemmaConfig",
        dict(_ATTN, num_key_value_heads=1, head_dim=12),
        _DENSE,
        "(1 + w) norms, embeddings x sqrt(width), tanh GeGLU, tied head",
    ),
    "gemma2": Case(
        "Gemma2Config",
        dict(
            _ATTN,
            head_dim=12,
            query_pre_attn_scalar=20,
            sliding_window=8,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=8.0,
        ),
        (*_DENSE[:2], *_GEMMA2),
        "soft-caps, four norms a layer, window in even layers, query_pre_attn_scalar, tied head",
    ),
    "phi3": Case("Phi3Config", _ATTN, _PHI3, "fused q,k,v and gate,up"),
    "phi3-longrope": Case(
        "Phi3Config",
        dict(
            _ATTN,
            num_attention_heads=2,
            num_key_value_heads=1,
            original_max_position_embeddings=32,
            rope_parameters=_rope(
                "longrope",
                partial_rotary_factor=0.75,
                short_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
                long_factor=[1.0, 1.5, 3.0, 6.0, 12.0, 20.0],
            ),
        ),
        _PHI3,
        "12 of 16 head dimensions rotate; short and long factors",
        long=40,
    ),
    "mixtral": Case(
        "MixtralConfig",
        dict(_MOE, num_local_experts=4, num_experts_per_tok=2),
        _MIXTRAL,
        "top-2 of 4, weights sum to 1",
    ),
    "phimoe": Case(
        "PhimoeConfig",
        dict(
            _MOE,
            num_local_experts=6,
            router_jitter_noise=0.1,
            attention_bias=True,
            lm_head_bias=True,
        ),
        _PHIMOE,
        "sparsemixer, LayerNorm with bias, bias on q, k, v, o and head",
    ),
    "olmoe": Case(
        "OlmoeConfig",
        dict(_MOE, num_experts=6, num_experts_per_tok=3),
        _OLMOE,
        "top-3 of 6, weights not renormalised, QK-norm over the full width",
    ),
    "olmo2": Case(
        "Olmo2Config",
        _ATTN,
        (*_DENSE, *_QK_NORM),
        "norms after the mixers only, QK-norm over the full width",
    ),
    "smollm3": Case(
        "SmolLM3Config",
        dict(_ATTN, num_hidden_layers=4, intermediate_size=16, num_key_value_heads=1),
        (*_DENSE, "model.layers.3.self_attn.q_proj.weight"),
        "every 4th layer without RoPE, tied head",
    ),
    "mamba": Case("MambaConfig", dict(_BASE, state_size=8), _MAMBA, "Mamba-1, tied head"),
    "jamba": Case(
        "JambaConfig",
        dict(
            _MOE,
            hidden_size=24,
            num_hidden_layers=4,
            attn_layer_period=4,
            attn_layer_offset=2,
            num_experts=4,
            mamba_d_state=6,
            use_mamba_kernels=False,
        ),
        _JAMBA,
        "mamba+dense, mamba+MoE, attention+dense, mamba+MoE; no RoPE; norms on dt, B, C",
    ),
}
