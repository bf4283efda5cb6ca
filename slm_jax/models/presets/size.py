"""How large a model is and what its decode state holds, from the configuration alone."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from slm_jax.models.flops import forward_flops, training_flops
from slm_jax.models.lm import LMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig, MixerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.norm import NormConfig
from slm_jax.nn.ssm import MambaConfig


@dataclass(frozen=True)
class ModelSummary:
    """Sizes of a model; FLOPs are per token of a row of `seq_len`."""

    total: int
    """Trained parameters, a tied embedding once; router biases (buffers) are not trained."""
    active: int
    """Parameters a token meets: `total` without the experts beyond top_k, embedding included."""
    non_embedding: int
    """`total` without the embedding and, where untied, the head (arXiv 2001.08361, section 2.1)."""
    seq_len: int
    """Row length of the FLOPs below."""
    forward_flops: float
    """Operations of a forward pass per token, causal."""
    training_flops: float
    """Operations of a training step per token, causal, without recomputation: 3 x forward."""
    kv_bytes_per_token: int
    """Keys and values one more token adds in the compute dtype, while no window is full."""
    ssm_state_bytes: int
    """Convolution inputs and SSM states of one row, whatever its length."""


def summary(config: LMConfig, seq_len: int | None = None) -> ModelSummary:
    """Sizes of a model, nothing allocated or traced.

    Args:
        config: the model.
        seq_len: row length for the FLOPs; default `config.max_seq_len`.

    Raises:
        UserError: if `seq_len` is not positive.
    """
    seq_len = config.max_seq_len if seq_len is None else seq_len
    layers = [config.layer(i) for i in range(config.n_layers)]
    embedding = config.vocab_size * config.d_model
    head = 0 if config.tie_embeddings else embedding + config.vocab_size * config.head_bias
    body = sum(_layer_parameters(layer, config) for layer in layers)
    body += _norm_parameters(config.norm, config.d_model)
    idle = sum(_idle_parameters(layer, config.d_model) for layer in layers)
    total = embedding + body + head
    return ModelSummary(
        total=total,
        active=total - idle,
        non_embedding=body,
        seq_len=seq_len,
        forward_flops=forward_flops(config, seq_len).total,
        training_flops=training_flops(config, seq_len, remat="none"),
        kv_bytes_per_token=_kv_bytes(config, 1, config.dtype),
        ssm_state_bytes=state_bytes(config, 0),
    )


def state_bytes(config: LMConfig, length: int, dtype: Any = None) -> int:
    """Bytes of one row's decode state after `length` tokens.

    Keys and values (a window holds at most its width), convolution inputs, and SSM states, which
    are float32 in any case. The position of each cache slot (4 bytes a slot and layer) is
    bookkeeping and not counted.

    Args:
        config: the model.
        length: tokens seen.
        dtype: of keys, values and convolution inputs; default the compute dtype.
    """
    dtype = config.dtype if dtype is None else dtype
    fixed = 0
    for i in range(config.n_layers):
        mixer = config.layer(i).mixer
        if isinstance(mixer, MambaConfig):
            inputs = (mixer.d_conv - 1) * jnp.dtype(dtype).itemsize
            fixed += mixer.d_inner * (inputs + 4 * mixer.d_state)
    return fixed + _kv_bytes(config, length, dtype)


def _kv_bytes(config: LMConfig, length: int, dtype: Any) -> int:
    values = 0
    for i in range(config.n_layers):
        mixer = config.layer(i).mixer
        if isinstance(mixer, AttentionConfig):
            slots = length if mixer.window is None else min(length, mixer.window)
            values += 2 * slots * mixer.n_kv_heads * mixer.head_dim
    return values * jnp.dtype(dtype).itemsize


def _norm_parameters(norm: NormConfig, width: int) -> int:
    return width * ((norm.scale != "none") + norm.bias)


def _layer_parameters(layer: LayerConfig, config: LMConfig) -> int:
    branches = 1 + (layer.channel is not None)
    norms = 0
    if layer.norm_position != "post":
        norms += 1 if layer.parallel else branches
    if layer.norm_position != "pre":
        norms += branches
    total = norms * _norm_parameters(config.norm, config.d_model)
    total += _mixer_parameters(layer.mixer, config.d_model, config.norm)
    match layer.channel:
        case MLPConfig() as f:
            inner = 2 if f.gated else 1
            total += (inner + 1) * config.d_model * f.d_ff
            total += f.bias * (inner * f.d_ff + config.d_model)
        case MoEConfig() as e:
            total += e.n_experts * (config.d_model + 3 * config.d_model * e.d_ff)
    return total


def _mixer_parameters(mixer: MixerConfig, d_model: int, norm: NormConfig) -> int:
    match mixer:
        case AttentionConfig() as a:
            q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
            total = 2 * d_model * (q + kv)
            total += a.qkv_bias * (q + 2 * kv) + a.out_bias * d_model
            if a.qk_norm is not None and norm.scale != "none":
                total += q + kv if a.qk_norm == "full" else 2 * a.head_dim
            return total
        case MambaConfig() as m:
            rank = m.resolved_dt_rank(d_model)
            total = 3 * d_model * m.d_inner + m.proj_bias * (2 * m.d_inner + d_model)
            total += m.d_inner * (m.d_conv + m.conv_bias)
            total += m.d_inner * (rank + 2 * m.d_state)  # selection
            total += m.d_inner * (rank + 1)  # step size
            total += m.d_inner * (m.d_state + 1)  # A and D
            return total + m.inner_norms * (rank + 2 * m.d_state)


def _idle_parameters(layer: LayerConfig, d_model: int) -> int:
    """Experts a token does not meet."""
    channel = layer.channel
    if not isinstance(channel, MoEConfig):
        return 0
    return (channel.n_experts - channel.top_k) * 3 * d_model * channel.d_ff
