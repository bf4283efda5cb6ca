"""Scaling a channel between a module and its readers: another model, the same function.

Where the outputs of a norm or a `Linear` go, channel by channel, into other `Linear`s, dividing a
channel of the source by s and multiplying that input of all readers by s changes nothing. Rounding
afterwards does: it moves precision to where it is needed. The table of such places is `links`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.compress.quantise import path_name
from slm_jax.nn.attention import Attention
from slm_jax.nn.block import Block
from slm_jax.nn.linear import Linear
from slm_jax.nn.mlp import MLP
from slm_jax.nn.module import changed
from slm_jax.nn.moe import MoE
from slm_jax.nn.norm import Norm


@dataclass(frozen=True)
class Link:
    """A source, and all that reads it.

    Attributes:
        source: path in the `Block` of a `Norm` or a `Linear`.
        readers: paths of all `Linear`s whose inputs are linear in the source's outputs.
        shared: inputs of a reader that are one channel of the source, as `(channels, copies,
            width)` of the readers' inputs: heads that share a value head. `None`: each its own.
    """

    source: str
    readers: tuple[str, ...]
    shared: tuple[int, int, int] | None = None


def links(block: Block) -> list[Link]:
    """The places of a layer where channels can be scaled."""
    out = []
    mixer, channel = block.mixer, block.channel
    first = ("q", "k", "v") if isinstance(mixer, Attention) else ("in_x", "in_z")
    of_mixer = tuple(f"mixer.{name}" for name in first)
    of_channel: tuple[str, ...] = ()
    if isinstance(channel, MLP | MoE):
        names = [n for n in ("gate", "up", "router") if getattr(channel, n, None) is not None]
        of_channel = tuple(f"channel.{name}" for name in names)
    if _scales(block.mixer_norm):
        out.append(Link("mixer_norm", of_mixer + (of_channel if block.config.parallel else ())))
    if _scales(block.channel_norm):
        out.append(Link("channel_norm", of_channel))
    if isinstance(mixer, Attention):
        c = mixer.config
        heads = (c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim)
        out.append(Link("mixer.v", ("mixer.out",), heads))
    if getattr(channel, "gate", None) is not None:  # down reads act(gate) * up, linear in up
        out.append(Link("channel.up", ("channel.down",)))
    return out


def _scales(norm: Norm | None) -> bool:
    return norm is not None and norm.scale is not None


def fold(block: Block, link: Link, s: jax.Array) -> Block:
    """The layer with the channels of a link scaled.

    Args:
        block: the layer.
        link: one of `links(block)`.
        s: `[*batch, K]` float32, positive: what each input of the readers is multiplied by; equal
            for inputs that share a channel (`shared_scale`). Powers of two change no result bit.
    """
    of_source = s
    if link.shared is not None:
        channels, copies, width = link.shared
        of_source = s.reshape(channels, copies, width)[:, 0]

    def scaled(variable: Any, factor: jax.Array, offset: float = 0.0) -> Any:
        return variable.replace((variable[...] + offset) * factor - offset)

    def one(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        if name == link.source and isinstance(leaf, Norm):
            offset = 1.0 if leaf.config.scale == "unit_offset" else 0.0
            changes = {"scale": scaled(leaf.scale, 1 / s, offset)}
            if leaf.bias is not None:
                changes["bias"] = scaled(leaf.bias, 1 / s)
            return changed(leaf, **changes)
        if name == link.source:
            n_batch, n_in = len(leaf.batch_axes), len(leaf.in_axes)
            rows = of_source.reshape(leaf.w.shape[:n_batch] + leaf.w.shape[n_batch + n_in :])
            ones = (1,) * n_in
            inner = rows.reshape(*rows.shape[:n_batch], *ones, *rows.shape[n_batch:])
            changes = {"w": scaled(leaf.w, 1 / inner)}
            if leaf.b is not None:
                changes["b"] = scaled(leaf.b, 1 / rows)
            return changed(leaf, **changes)
        if name in link.readers:
            return changed(leaf, w=scaled(leaf.w, _along_inputs(leaf, s)))
        return leaf

    out: Block = jax.tree_util.tree_map_with_path(
        one, block, is_leaf=lambda node: isinstance(node, Norm | Linear)
    )
    return out


def shared_scale(link: Link, s: jax.Array) -> jax.Array:
    """Makes `s` `[*batch, K]` equal, by the largest, for inputs that share a channel."""
    if link.shared is None:
        return s
    by_head = s.reshape(link.shared)
    return jnp.broadcast_to(jnp.max(by_head, axis=1, keepdims=True), by_head.shape).reshape(s.shape)


def _along_inputs(linear: Linear, s: jax.Array) -> jax.Array:
    """`[*batch, K]` or `[K]` as a factor of `linear.w`."""
    n_batch, n_in = len(linear.batch_axes), len(linear.in_axes)
    s = jnp.broadcast_to(s, (*linear.w.shape[:n_batch], s.shape[-1]))
    inputs = linear.w.shape[n_batch : n_batch + n_in]
    return s.reshape(*s.shape[:-1], *inputs, *(1,) * len(linear.out_axes))
