"""The block grammar: norm, sequence mixer, residual, norm, channel mixer, residual.

An architecture is a pattern of `LayerConfig`s. A new mixer is one file and one line in `MIXERS`:
its configuration says what it costs (`flops`, `state_bytes`), its module what it computes.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.nn.attention import Attention, AttentionConfig
from slm_jax.nn.kv_cache import KVCache
from slm_jax.nn.mlp import MLP, MLPConfig
from slm_jax.nn.moe import MoE, MoEConfig
from slm_jax.nn.norm import Norm, NormConfig
from slm_jax.nn.ssm import Mamba, MambaConfig, MambaState

MixerConfig = AttentionConfig | MambaConfig
ChannelConfig = MLPConfig | MoEConfig
MixerState = KVCache | MambaState

MIXERS: dict[type, Any] = {AttentionConfig: Attention, MambaConfig: Mamba}
CHANNELS: dict[type, Any] = {MLPConfig: MLP, MoEConfig: MoE}


@dataclass(frozen=True)
class LayerConfig:
    """One layer of the pattern."""

    mixer: MixerConfig
    """Mixes along the sequence."""
    channel: ChannelConfig | None
    """Mixes along the width; `None` leaves it out (Mamba)."""
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    """Normalise each branch's input (Llama), its output (OLMo-2), or both (Gemma 2)."""
    parallel: bool = False
    """Both branches read the same input, through one norm (GPT-J, Phi-2)."""


class Block(nnx.Module):
    """One layer."""

    def __init__(
        self,
        config: LayerConfig,
        d_model: int,
        norm: NormConfig,
        *,
        key: jax.Array,
        residual_scale: float,
        branch_multiplier: float = 1.0,
    ) -> None:
        """Initialises the layer.

        Args:
            config: what the layer is made of.
            d_model: width of the residual stream.
            norm: normalisation of both branches.
            key: PRNG key.
            residual_scale: multiplies the standard deviation of the two output projections.
            branch_multiplier: multiplies what both branches add to the stream.
        """
        k_mixer, k_channel = jax.random.split(key)
        pre, post = config.norm_position != "post", config.norm_position != "pre"
        has_channel = config.channel is not None
        self.config = config
        self.branch_multiplier = branch_multiplier
        self.mixer_norm = Norm(norm, d_model) if pre else None
        self.mixer = MIXERS[type(config.mixer)](
            config.mixer,
            d_model,
            norm,
            key=k_mixer,
            out_std=residual_scale * config.mixer.out_fan_in**-0.5,
        )
        self.mixer_post_norm = Norm(norm, d_model) if post else None
        own_norm = has_channel and not config.parallel
        self.channel_norm = Norm(norm, d_model) if pre and own_norm else None
        self.channel = (
            CHANNELS[type(config.channel)](
                config.channel,
                d_model,
                key=k_channel,
                out_std=residual_scale * config.channel.d_ff**-0.5,
            )
            if config.channel is not None
            else None
        )
        self.channel_post_norm = Norm(norm, d_model) if post and has_channel else None

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array,
        segments: jax.Array | None,
        state: MixerState | None = None,
        dtype: jnp.dtype,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array], MixerState | None]:
        """Applies the layer.

        Args:
            x: `[B, S, embed]`, the residual stream.
            positions: `[B or 1, S]` int32.
            segments: `[B, S]` int32 or `None`.
            state: the mixer's state, or `None` in training.
            dtype: compute dtype of the branches; the stream keeps its own.
            key: PRNG key for noise in training, or `None`.

        Returns:
            The residual stream, the channel mixer's aux terms, and the mixer's new state.
        """
        h = x.astype(dtype) if self.mixer_norm is None else self.mixer_norm(x, dtype)
        y, state = self.mixer(h, positions=positions, segments=segments, state=state)
        if self.mixer_post_norm is not None:
            y = self.mixer_post_norm(y)
        if self.branch_multiplier != 1.0:
            y = y * self.branch_multiplier
        if self.channel is None:
            return x + y, {}, state
        if not self.config.parallel:
            x = x + y
            h = x.astype(dtype) if self.channel_norm is None else self.channel_norm(x, dtype)
        z, aux = self.channel(h, segments=segments, key=key)
        if self.channel_post_norm is not None:
            z = self.channel_post_norm(z)
        if self.branch_multiplier != 1.0:
            z = z * self.branch_multiplier
        return x + z if not self.config.parallel else x + y + z, aux, state
