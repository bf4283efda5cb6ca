"""Tiny models of every architecture, with all weights random: zeros and ones hide mistakes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.models.lm import LM, LMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.module import is_variable
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.ssm import MambaConfig

VOCAB, D_MODEL = 48, 16
GQA = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8)
WINDOW = AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8, window=5, softcap=3.0)
MAMBA = MambaConfig(d_inner=24, d_state=4)
SWIGLU = MLPConfig(24)
DROPLESS = MoEConfig(n_experts=4, d_ff=8)

PATTERNS: dict[str, tuple[LayerConfig, ...]] = {
    "dense": (LayerConfig(GQA, SWIGLU),),
    "window": (LayerConfig(WINDOW, SWIGLU),),
    "moe": (LayerConfig(GQA, DROPLESS),),
    "moe_capacity": (LayerConfig(GQA, MoEConfig(4, 8, dispatch="capacity")),),
    "mamba": (LayerConfig(MAMBA, None),),
    "hybrid": (LayerConfig(MAMBA, SWIGLU), LayerConfig(WINDOW, DROPLESS)),
}


def tiny_config(name: str, **changes: Any) -> LMConfig:
    """Three layers of an architecture of `PATTERNS`: the hybrid one has a tail."""
    return LMConfig(
        **dict(vocab_size=VOCAB, d_model=D_MODEL, n_layers=3, pattern=PATTERNS[name]) | changes
    )


def random_leaf(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A value for the leaf whose path ends with `name`, near what training might give."""
    noise = rng.normal(size=shape).astype(np.float32)
    match name:
        case "a_log":
            return np.log(np.arange(1, shape[-1] + 1, dtype=np.float32)) + 0.1 * noise
        case "dt_bias":
            return -1 + noise
        case "scale" | "d":
            return 1 + 0.2 * noise
        case _:
            return 0.3 * noise


def randomised(module: Any, seed: int = 0) -> Any:
    """A module, real or abstract, with every leaf replaced; drawing by jax compiles for long."""
    rng = np.random.default_rng(seed)

    def one(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.replace(jnp.asarray(random_leaf(name, leaf.get_value().shape, rng)))

    return jax.tree_util.tree_map_with_path(one, module, is_leaf=is_variable)


def tiny_lm(name: str, **changes: Any) -> LM:
    """The model of `tiny_config` with random weights."""
    config = tiny_config(name, **changes)
    return randomised(jax.eval_shape(lambda key: LM(config, key), jax.random.key(0)))


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random token ids `[batch, length]` int32."""
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length)).astype(np.int32)
