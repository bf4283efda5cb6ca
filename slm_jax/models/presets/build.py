"""Constructors of the usual shapes of language model, for presets and experiments.

Each takes what one varies and fills in the rest; `**model` are further fields of `LMConfig`
(`max_seq_len`, `dtype`, `tie_embeddings`, `norm`, ...). What they do not reach is written with
`LMConfig` itself.
"""

import math
from typing import Any, Literal

from slm_jax.errors import UserError
from slm_jax.models.lm import LMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.rope import RopeConfig
from slm_jax.nn.ssm import MambaConfig

BYTE_VOCABULARY = 257
"""The byte tokenizer's: 256 bytes and the end of the text."""

_ROPE = RopeConfig()


def dense(
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    d_ff: int | None = None,
    *,
    vocab_size: int = BYTE_VOCABULARY,
    head_dim: int | None = None,
    rope: RopeConfig | None = _ROPE,
    window: int | None = None,
    qk_norm: Literal["head", "full"] | None = None,
    qkv_bias: bool = False,
    **model: Any,
) -> LMConfig:
    """A Llama-like transformer: pre-RMSNorm, rotary attention, SwiGLU (arXiv 2302.13971).

    Args:
        d_model: width of the residual stream.
        n_layers: layers.
        n_heads: query heads.
        n_kv_heads: key/value heads; default `n_heads`.
        d_ff: hidden width of the MLP; default 8/3 of `d_model`, rounded up to a multiple of 64.
        vocab_size: default that of the byte tokenizer.
        head_dim: default d_model / n_heads.
        rope: rotary positions, or `None`.
        window: sliding window, or `None`.
        qk_norm: see `AttentionConfig`.
        qkv_bias: biases on the query, key and value projections.
        **model: further fields of `LMConfig`.

    Raises:
        UserError: if the heads do not divide the width or each other.
    """
    attention = _attention(
        d_model,
        n_heads,
        n_kv_heads,
        head_dim,
        rope=rope,
        window=window,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
    )
    layer = LayerConfig(attention, MLPConfig(_d_ff(d_model, d_ff)))
    return LMConfig(vocab_size, d_model, n_layers, (layer,), **model)


def moe(
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    d_ff: int | None = None,
    *,
    n_experts: int = 8,
    top_k: int = 2,
    dispatch: Literal["dropless", "capacity"] = "dropless",
    vocab_size: int = BYTE_VOCABULARY,
    head_dim: int | None = None,
    rope: RopeConfig | None = _ROPE,
    **model: Any,
) -> LMConfig:
    """`dense` with every MLP a mixture of experts, routed as in Mixtral (arXiv 2401.04088).

    Args:
        d_model: width of the residual stream.
        n_layers: layers.
        n_heads: query heads.
        n_kv_heads: key/value heads; default `n_heads`.
        d_ff: hidden width of one expert; default as in `dense`.
        n_experts: experts a layer.
        top_k: experts a token.
        dispatch: see `MoEConfig`.
        vocab_size: default that of the byte tokenizer.
        head_dim: default d_model / n_heads.
        rope: rotary positions, or `None`.
        **model: further fields of `LMConfig`.

    Raises:
        UserError: if the heads do not divide the width or each other, or top_k > n_experts.
    """
    attention = _attention(d_model, n_heads, n_kv_heads, head_dim, rope=rope)
    experts = MoEConfig(n_experts, _d_ff(d_model, d_ff), top_k, dispatch=dispatch)
    return LMConfig(vocab_size, d_model, n_layers, (LayerConfig(attention, experts),), **model)


def mamba(
    d_model: int,
    n_layers: int,
    *,
    d_state: int = 16,
    expand: float = 2,
    vocab_size: int = BYTE_VOCABULARY,
    **model: Any,
) -> LMConfig:
    """Mamba-1: a stack of selective scans without MLPs (arXiv 2312.00752).

    Args:
        d_model: width of the residual stream.
        n_layers: layers.
        d_state: state values a channel.
        expand: channels of the scan over `d_model`.
        vocab_size: default that of the byte tokenizer.
        **model: further fields of `LMConfig`.
    """
    layer = LayerConfig(MambaConfig(round(expand * d_model), d_state), None)
    return LMConfig(vocab_size, d_model, n_layers, (layer,), **model)


def hybrid(
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    d_ff: int | None = None,
    *,
    attention_period: int = 8,
    attention_offset: int = 4,
    n_experts: int = 0,
    top_k: int = 2,
    expert_period: int = 2,
    expert_offset: int = 1,
    vocab_size: int = BYTE_VOCABULARY,
    **model: Any,
) -> LMConfig:
    """Mamba with some attention layers and, if wanted, some MoE layers: Jamba (arXiv 2403.19887).

    Layer i has attention (without positions) if i % attention_period == attention_offset, else a
    selective scan of width 2 d_model with inner norms; it has experts if i % expert_period ==
    expert_offset, else an MLP of the same width.

    Args:
        d_model: width of the residual stream.
        n_layers: layers.
        n_heads: query heads of the attention layers.
        n_kv_heads: key/value heads; default `n_heads`.
        d_ff: hidden width of the MLPs and of one expert; default as in `dense`.
        attention_period: one attention layer in so many.
        attention_offset: the first of them.
        n_experts: experts of an MoE layer; 0 for none.
        top_k: experts a token.
        expert_period: one MoE layer in so many.
        expert_offset: the first of them.
        vocab_size: default that of the byte tokenizer.
        **model: further fields of `LMConfig`.

    Raises:
        UserError: if an offset lies outside its period, or as in `dense`.
    """
    for name, offset, period in (
        ("attention_offset", attention_offset, attention_period),
        ("expert_offset", expert_offset, expert_period),
    ):
        if not 0 <= offset < period:
            raise UserError(f"{name}={offset} must be between 0 and its period {period} - 1")
    attention = _attention(d_model, n_heads, n_kv_heads, None, rope=None)
    scan = MambaConfig(2 * d_model, inner_norms=True)
    width = _d_ff(d_model, d_ff)
    mlp = MLPConfig(width)
    # Jamba does not make the top-k weights sum to one.
    experts = MoEConfig(n_experts, width, top_k, routing="softmax") if n_experts else mlp
    pattern = tuple(
        LayerConfig(
            attention if i % attention_period == attention_offset else scan,
            experts if i % expert_period == expert_offset else mlp,
        )
        for i in range(math.lcm(attention_period, expert_period if n_experts else 1))
    )
    return LMConfig(vocab_size, d_model, n_layers, pattern, **model)


def _attention(
    d_model: int, n_heads: int, n_kv_heads: int | None, head_dim: int | None, **rest: Any
) -> AttentionConfig:
    if head_dim is None:
        if n_heads < 1 or d_model % n_heads:
            raise UserError(
                f"n_heads={n_heads} does not divide d_model={d_model}: choose a divisor or head_dim"
            )
        head_dim = d_model // n_heads
    return AttentionConfig(n_heads, n_heads if n_kv_heads is None else n_kv_heads, head_dim, **rest)


def _d_ff(d_model: int, d_ff: int | None) -> int:
    """8/3 d_model gives a gated MLP the parameters of a plain one with 4 d_model."""
    return 64 * math.ceil(8 * d_model / 3 / 64) if d_ff is None else d_ff
