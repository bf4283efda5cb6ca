"""Next-token prediction, with the balance terms of MoE layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.models.lm import LM, LMConfig
from slm_jax.models.loss import next_token_loss
from slm_jax.nn.module import changed
from slm_jax.nn.moe import MoE, balanced_bias
from slm_jax.train.task import Loss


@dataclass(frozen=True)
class LMLossConfig:
    """Mean next-token cross-entropy plus weighted balance terms."""

    chunk: int | None = None
    """Tokens of a row whose logits exist at one time; `None` is all."""
    load_balance: float = 0.01
    """Weight of the mean load-balance term over the MoE layers (its minimum is 1)."""
    router_z: float = 0.001
    """Weight of the mean squared logsumexp of the router logits."""
    bias_rate: float = 0.001
    """Step of the selection bias, where an MoE layer has one."""


@dataclass(frozen=True)
class LMTask:
    """Trains a language model to predict the next token."""

    model: LMConfig
    objective: LMLossConfig = LMLossConfig()

    def init(self, key: jax.Array) -> tuple[LM, tuple[()]]:
        """A new model; nothing is carried from step to step."""
        return LM(self.model, key), ()

    def loss(
        self, model: LM, batch: Mapping[str, jax.Array], carry: Any, key: jax.Array
    ) -> tuple[Loss, dict[str, jax.Array], Any]:
        """Loss over the tokens that count; logs the bare cross-entropy and the model's terms."""
        total, weight, aux = next_token_loss(model, batch, chunk=self.objective.chunk, key=key)
        logged = {"nll": total / jnp.maximum(weight, 1.0)}
        if "moe_load_balance" in aux:
            balance = self.objective.load_balance * aux["moe_load_balance"].mean()
            total = total + weight * (balance + self.objective.router_z * aux["moe_z"].mean())
        return Loss(total, weight), logged | aux, carry

    def after_update(self, model: LM, aux: dict[str, jax.Array]) -> LM:
        """Moves the selection biases of MoE layers towards even loads."""
        if "moe_load" not in aux:
            return model
        period = len(self.model.pattern)
        sparse = [i for i in range(self.model.n_layers) if _is_moe(self.model, i)]
        load_of = {layer: aux["moe_load"][n] for n, layer in enumerate(sparse)}
        repeats = self.model.n_layers // period

        def moved(moe: MoE, load: jax.Array) -> MoE:
            if moe.bias is None:
                return moe
            bias = balanced_bias(moe.bias[...], load, self.objective.bias_rate)
            return changed(moe, bias=moe.bias.replace(bias))

        def block(old: Any, layers: list[int], stacked: bool) -> Any:
            if not isinstance(old.channel, MoE):
                return old
            loads = [load_of[i] for i in layers]
            load = jnp.stack(loads) if stacked else loads[0]
            return changed(old, channel=moved(old.channel, load))

        blocks = [
            block(b, [r * period + p for r in range(repeats)], True)
            for p, b in enumerate(model.blocks)
        ]
        tail = [block(b, [repeats * period + i], False) for i, b in enumerate(model.tail)]
        return changed(model, blocks=nnx.List(blocks), tail=nnx.List(tail))


def _is_moe(config: LMConfig, layer: int) -> bool:
    channel = config.layer(layer).channel
    return channel is not None and hasattr(channel, "n_experts")
