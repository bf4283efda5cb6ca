"""Mixture of experts: routers, dropless and fixed-capacity dispatch, balance terms as results."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from slm_kernels.dispatch import platform

from slm_jax.errors import UserError
from slm_jax.nn.linear import Linear
from slm_jax.nn.mlp import Activation, activate
from slm_jax.nn.module import Buffer
from slm_jax.nn.router import route
from slm_jax.parallel.experts import (
    Axes,
    expert_axes,
    from_buckets,
    to_buckets,
    to_experts,
)
from slm_jax.parallel.rules import has_mesh, lead_spec


@dataclass(frozen=True)
class MoEConfig:
    """Each token is sent to the `top_k` of `n_experts` feed-forward networks."""

    n_experts: int
    """Experts in the layer."""
    d_ff: int
    """Hidden width of one expert."""
    top_k: int = 2
    """Experts a token is sent to."""
    routing: Literal["renormalised", "softmax", "sparsemixer"] = "renormalised"
    """Weights: top-k of a softmax made to sum to 1 (Mixtral), left as they are (OLMoE, Jamba), or
    sparsemixer's two successive choices (Phi-3.5-MoE, arXiv 2409.12136)."""
    dispatch: Literal["dropless", "capacity"] = "dropless"
    """Every token is served, or an expert takes at most capacity_factor x its share of a row."""
    capacity_factor: float = 1.25
    """With dispatch="capacity": an expert's slots a row over seq_len x top_k / n_experts."""
    activation: Activation = "silu"
    """Of the gate branch."""
    selection_bias: bool = False
    """A bias on the choice of experts, moved by the trainer so that loads even out without a
    loss (arXiv 2408.15664)."""
    jitter_eps: float = 0.01
    """With routing="sparsemixer": experts whose logit is more than 2 x this below the best,
    relative to the larger of the two magnitudes, get no weight."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.n_experts:
            raise UserError(f"top_k={self.top_k} must be between 1 and n_experts={self.n_experts}")
        if self.routing == "sparsemixer" and self.top_k != 2:
            raise UserError(f"top_k={self.top_k}: routing='sparsemixer' is defined for top_k=2")
        if self.capacity_factor <= 0:
            raise UserError(f"capacity_factor={self.capacity_factor} must be positive")

    def flops(self, d_model: int) -> dict[str, float]:
        """Forward operations a token by part of `FlopBreakdown`, nothing dropped or padded."""
        return {
            "router": 2 * d_model * (self.n_experts + self.top_k),
            "experts": 2 * d_model * self.d_ff * 3 * self.top_k,
        }

    def idle_parameters(self, d_model: int) -> int:
        """Parameters of the experts a token is not sent to."""
        return (self.n_experts - self.top_k) * 3 * d_model * self.d_ff


class MoE(nnx.Module):
    """Sparse feed-forward layer with gated experts."""

    def __init__(self, config: MoEConfig, d_model: int, *, key: jax.Array, out_std: float) -> None:
        sizes = {"expert": config.n_experts, "embed": d_model, "mlp": config.d_ff}
        kr, kg, ku, kd = jax.random.split(key, 4)
        self.config = config
        self.router = Linear("embed -> experts", sizes | {"experts": config.n_experts}, key=kr)
        self.gate = Linear("expert: embed -> mlp", sizes, key=kg)
        self.up = Linear("expert: embed -> mlp", sizes, key=ku)
        self.down = Linear("expert: mlp -> embed", sizes, key=kd, std=out_std)
        self.bias = (
            Buffer(jnp.zeros(config.n_experts), axes=(None,)) if config.selection_bias else None
        )

    def __call__(
        self, x: jax.Array, *, segments: jax.Array | None, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Routes and transforms every token.

        Args:
            x: `[B, S, embed]`.
            segments: `[B, S]` int32, 0 = padding: sent to no expert, so the result there is zero,
                and not counted in the balance terms.
            key: PRNG key for sparsemixer's training noise; `None` is the deterministic form.

        Returns:
            `[B, S, embed]` and the terms of this layer, all float32: `moe_load_balance` `[]`
            (experts x sum of load x mean probability; 1.0 when even), `moe_z` `[]` (mean squared
            logsumexp of the router logits), `moe_load` `[experts]` (share of the assignments),
            `moe_dropped` `[]` (share of the assignments over capacity).
        """
        c = self.config
        logits = self.router(x, out_dtype=jnp.float32)
        bias = None if self.bias is None else self.bias[...]
        weights, experts, probs = route(
            logits, c.top_k, c.routing, bias=bias, key=key, jitter_eps=c.jitter_eps
        )
        if segments is not None:  # padding goes nowhere: it must not take an expert's slots
            experts = jnp.where((segments > 0)[..., None], experts, c.n_experts)
        y, kept = self._dispatch(x, weights.astype(x.dtype), experts)

        mask = jnp.ones(x.shape[:2]) if segments is None else (segments > 0).astype(jnp.float32)
        total = jnp.maximum(jnp.sum(mask), 1.0)
        chosen = jnp.sum(
            (experts[..., None] == jnp.arange(c.n_experts)).astype(jnp.float32), axis=2
        )
        load = jnp.sum(chosen * mask[..., None], axis=(0, 1)) / (total * c.top_k)
        importance = jnp.sum(probs * mask[..., None], axis=(0, 1)) / total
        z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        dropped = jnp.mean(1.0 - kept.astype(jnp.float32), axis=-1)
        return y, {
            "moe_load_balance": c.n_experts * jnp.sum(load * importance),
            "moe_z": jnp.sum(z * mask) / total,
            "moe_load": load,
            "moe_dropped": jnp.sum(dropped * mask) / total,
        }

    def _dispatch(
        self, x: jax.Array, weights: jax.Array, experts: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Sends tokens to experts and back: `[B, S, embed]` and which choices were served."""
        apply = _dropless if self.config.dispatch == "dropless" else _capacity
        networks = _Networks(self.gate, self.up, self.down)
        if not has_mesh():
            return apply(self.config, networks, Axes(), x, weights, experts)
        # Every device routes its own tokens, to experts that stand where the table says. The
        # balance terms above are means over the whole batch all the same.
        lead = lead_spec(x, 2)
        # A quantised matrix is scaled over all of its inputs: it cannot be split along them.
        plain = all(type(network) is Linear for network in networks)
        axes = expert_axes(lead, split_width=plain)
        if plain:  # the gather then moves what is multiplied
            networks = jax.tree.map(lambda w: w.astype(x.dtype), networks)
        specs, tokens = axes.specs(networks), P(*lead, None)

        def on_device(networks: _Networks, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
            return apply(self.config, axes.gather(networks, specs), axes, *args)

        return jax.shard_map(
            on_device,
            in_specs=(specs, tokens, tokens, tokens),
            out_specs=(tokens, tokens),
        )(jax.tree.map(jax.reshard, networks, specs), x, weights, experts)


class _Networks(NamedTuple):
    """The experts: one matrix of each kind an expert, or those of the experts of one device."""

    gate: Linear
    up: Linear
    down: Linear


def _expert_mlp(
    config: MoEConfig, networks: _Networks, x: jax.Array, group_sizes: jax.Array | None
) -> jax.Array:
    gate, up, down = networks
    if group_sizes is None:
        return down(activate(up(x), gate(x), config.activation))
    h = activate(up.grouped(x, group_sizes), gate.grouped(x, group_sizes), config.activation)
    return down.grouped(h, group_sizes)


def _dropless(
    config: MoEConfig,
    networks: _Networks,
    axes: Axes,
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sorts (token, choice) pairs by expert and multiplies each run by its own matrices."""
    c, k, d = config, experts.shape[-1], x.shape[-1]
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    group_sizes = jnp.sum(flat[:, None] == jnp.arange(c.n_experts), axis=0).astype(jnp.int32)
    rows = x.reshape(-1, d)[order // k]
    if not axes.experts:
        y = _expert_mlp(c, networks, rows, group_sizes)
    else:
        # A token chooses different experts: so many of its rows can go to one device.
        here = min(k, c.n_experts // jax.lax.axis_size(axes.experts))
        rows, group_sizes, back = to_experts(
            rows,
            group_sizes,
            axes.experts,
            most=len(order) // k * here,
            ragged=platform() != "cpu",
        )
        y = back(_expert_mlp(c, networks, rows, group_sizes))
    y = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
    y = jnp.einsum("tkd,tk->td", y.reshape(-1, k, d), weights.reshape(-1, k))
    return axes.sum_widths(y.reshape(x.shape)), jnp.ones(experts.shape, bool)


def _capacity(
    config: MoEConfig,
    networks: _Networks,
    axes: Axes,
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gives each expert a fixed number of slots a row, filled in token order; drops the rest.

    Counted a row (a GShard group), so that neither the batch nor its split changes what is dropped.
    """
    c = config
    rows, length, k = experts.shape
    d = x.shape[-1]
    flat = experts.reshape(rows, -1)
    parts = jax.lax.axis_size(axes.tokens) if axes.tokens else 1
    slots = max(1, math.ceil(length * parts * k / c.n_experts * c.capacity_factor))
    member = (flat[..., None] == jnp.arange(c.n_experts)).astype(jnp.int32)
    place = jnp.sum((jnp.cumsum(member, axis=1) - 1) * member, axis=-1)
    # Tokens of the row's earlier parts took their slots first.
    before = axes.sum_before(jnp.sum(member, axis=1))
    kept = place + jnp.sum(before[:, None] * member, axis=-1) < slots
    slots = min(slots, length)  # of this part: a token chooses an expert at most once
    row = jnp.arange(rows)[:, None] * slots
    slot = jnp.where(kept, flat * rows * slots + row + place, c.n_experts * rows * slots)
    source = jnp.repeat(x.reshape(-1, d), k, axis=0)
    buckets = jnp.zeros((c.n_experts * rows * slots, d), x.dtype)
    buckets = buckets.at[slot.reshape(-1)].set(source, mode="drop")
    buckets = buckets.reshape(c.n_experts, rows * slots, d)
    if not axes.experts:
        y = _expert_mlp(c, networks, buckets, None)
    else:
        y = _expert_mlp(c, networks, to_buckets(buckets, axes.experts), None)
        y = from_buckets(y, axes.experts)
    y = y.reshape(-1, d).at[slot].get(mode="fill", fill_value=0)
    y = jnp.einsum("bskd,bsk->bsd", y.reshape(rows, length, k, d), weights)
    return axes.sum_widths(y), kept.reshape(experts.shape)


def balanced_bias(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """Loss-free balancing: raises the bias of experts below the mean load (arXiv 2408.15664).

    Args:
        bias: `[..., experts]`.
        load: `[..., experts]`, the share of assignments each expert got in the last step.
        rate: step size, 1e-3 in the paper.

    Returns:
        bias + rate x sign(mean load - load).
    """
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
