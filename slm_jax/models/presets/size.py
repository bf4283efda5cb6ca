"""How large a model is and what its decode state holds, from the configuration alone."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.models.flops import forward_flops, training_flops
from slm_jax.models.lm import LMConfig
from slm_jax.nn.block import Block, LayerConfig
from slm_jax.nn.module import count_parameters
from slm_jax.nn.norm import NormConfig


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
    """Operations of a training step per token, causal, without recomputation: 3 x forward, but for
    layers that repeat."""
    kv_bytes_per_token: int
    """Keys and values one more token adds in the compute dtype, while no window is full."""
    ssm_state_bytes: int
    """Convolution inputs and SSM states of one row, whatever its length."""


def summary(config: LMConfig, seq_len: int | None = None) -> ModelSummary:
    """Sizes of a model, nothing allocated.

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
    body = sum(_block_parameters(layer, config.d_model, config.norm) for layer in layers)
    norm = config.d_model * ((config.norm.scale != "none") + config.norm.bias)
    body += norm
    if config.recursion is not None:
        body += {"none": 0, "add": norm, "concat": norm + 2 * config.d_model**2}[
            config.recursion.injection
        ]
    idle = sum(layer.channel.idle_parameters(config.d_model) for layer in layers if layer.channel)
    total = embedding + body + head
    return ModelSummary(
        total=total,
        active=total - idle,
        non_embedding=body,
        seq_len=seq_len,
        forward_flops=forward_flops(config, seq_len).total,
        training_flops=training_flops(config, seq_len, remat="none"),
        kv_bytes_per_token=state_bytes(config, 1) - state_bytes(config, 0),
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
    itemsize = jnp.dtype(dtype or config.dtype).itemsize
    return sum(
        config.runs(i) * config.layer(i).mixer.state_bytes(length, itemsize)
        for i in range(config.n_layers)
    )


@functools.cache
def _block_parameters(layer: LayerConfig, d_model: int, norm: NormConfig) -> int:
    """Trained parameters of one layer, by building it without allocating it."""
    block = jax.eval_shape(
        lambda key: Block(layer, d_model, norm, key=key, residual_scale=1.0), jax.random.key(0)
    )
    return count_parameters(block)
