"""Feed-forward channel mixer: SwiGLU, GeGLU, GELU, ReLU^2."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.nn.linear import Linear

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclass(frozen=True)
class MLPConfig:
    """down(act(gate x) * up x), or down(act(up x)) without a gate."""

    d_ff: int
    """Hidden width."""
    activation: Activation = "silu"
    """silu + gate is SwiGLU, gelu_tanh + gate is GeGLU (arXiv 2002.05202)."""
    gated: bool = True
    """Multiply by a linear branch."""
    bias: bool = False
    """Biases on all projections."""

    def flops(self, d_model: int) -> dict[str, float]:
        """Forward operations a token by part of `FlopBreakdown`."""
        return {"mlp": 2 * d_model * self.d_ff * (3 if self.gated else 2)}

    def idle_parameters(self, d_model: int) -> int:
        """Parameters a token does not meet: none."""
        return 0


class MLP(nnx.Module):
    """Dense feed-forward layer."""

    def __init__(
        self,
        config: MLPConfig,
        d_model: int,
        *,
        key: jax.Array,
        out_std: float,
        axis: str = "embed",
    ) -> None:
        """Initialises the matrices.

        Args:
            config: hidden width and activation.
            d_model: width of the input.
            key: PRNG key.
            out_std: standard deviation of the output matrix.
            axis: logical name of the axis that is mixed.
        """
        sizes = {axis: d_model, "mlp": config.d_ff}
        kg, ku, kd = jax.random.split(key, 3)
        self.config = config
        self.up = Linear(f"{axis} -> mlp", sizes, key=ku, bias=config.bias)
        self.gate = (
            Linear(f"{axis} -> mlp", sizes, key=kg, bias=config.bias) if config.gated else None
        )
        self.down = Linear(f"mlp -> {axis}", sizes, key=kd, bias=config.bias, std=out_std)

    def __call__(
        self, x: jax.Array, *, segments: jax.Array | None, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps `[B, S, embed]` to the same shape, token by token; the aux dict is empty."""
        gate = None if self.gate is None else self.gate(x)
        return self.down(activate(self.up(x), gate, self.config.activation)), {}


@partial(jax.checkpoint, static_argnums=2)
def activate(up: jax.Array, gate: jax.Array | None, activation: Activation) -> jax.Array:
    """`act(gate) * up`, or `act(up)`: elementwise, and recomputed in the backward pass.

    Otherwise the activation and its factors are kept in memory for every layer.
    """
    act = ACTIVATIONS[activation]
    return act(up) if gate is None else act(gate) * up
