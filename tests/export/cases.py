"""Tiny models of every architecture that is exported, their weights from a frozen generator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.models.lm import LM, LMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import ChannelConfig, LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.module import is_variable
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.rope import LinearScaling, Llama3Scaling, RopeConfig
from slm_jax.nn.ssm import MambaConfig

VOCAB, WIDTH, LAYERS = 257, 64, 2  # the vocabulary of bytes
PROMPT = "def add(a, b):\n    return a + b"


def _attention(**changes) -> AttentionConfig:
    return AttentionConfig(4, 2, 16, **changes)


def _model(
    mixer: AttentionConfig | MambaConfig, channel: ChannelConfig | None, *, tied: bool = True
) -> LMConfig:
    layer = LayerConfig(mixer, channel)
    return LMConfig(VOCAB, WIDTH, LAYERS, (layer,), tie_embeddings=tied, max_seq_len=256)


_MLP = MLPConfig(96)
CASES: dict[str, LMConfig] = {
    "dense": _model(_attention(), _MLP),
    "adjacent": _model(_attention(rope=RopeConfig(layout="adjacent")), _MLP),
    "biases": _model(
        _attention(
            rope=RopeConfig(50_000.0, scaling=Llama3Scaling(8.0, 64)),
            qkv_bias=True,
            out_bias=True,
        ),
        MLPConfig(96, bias=True),
        tied=False,
    ),
    "linear": _model(_attention(rope=RopeConfig(scaling=LinearScaling(4.0))), _MLP),
    "moe": _model(_attention(rope=RopeConfig(1e6)), MoEConfig(4, 96), tied=False),
    "qwen2": _model(_attention(qkv_bias=True), _MLP),
    # Heads of 128: transformers takes no other width from a file.
    "qwen3": _model(AttentionConfig(2, 1, 128, qk_norm="head"), _MLP, tied=False),
    "mamba": _model(MambaConfig(2 * WIDTH, d_state=8), None),
    # Unlike a random model with a tied head, this one does not repeat its last token.
    "mamba-head": _model(MambaConfig(2 * WIDTH, d_state=8), None, tied=False),
}


@functools.cache
def make(name: str) -> LM:
    """The model of a case."""
    return filled(CASES[name], seed=len(name))


def filled(config: LMConfig, seed: int = 0) -> LM:
    """A model with so large weights that every part of it moves the logits."""
    draw = np.random.RandomState(seed).standard_normal  # its stream never changes

    def fill(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shape = leaf.get_value().shape
        value = draw(shape)
        if name.endswith("a_log"):
            value = np.log(np.arange(1, shape[-1] + 1)) + 0.1 * value
        elif name.endswith("dt_bias"):
            value = value / 2 - 3
        elif name.endswith(("scale", ".d")):
            value = 1 + 0.2 * value
        elif name.endswith((".b", "conv_b", "conv_w", "embed.w")):
            value = 0.3 * value
        else:
            matrix = leaf.get_metadata()["matrix"]
            ins = shape[len(shape) - sum(matrix) : len(shape) - matrix[1]]
            value = value * np.prod(ins) ** -0.5
        return leaf.replace(jnp.asarray(value, jnp.float32))

    model = jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, model, is_leaf=is_variable)


def logits(model: LM, tokens: np.ndarray) -> np.ndarray:
    """`[n]` ids to `[n, vocab]`, whatever the product's precision by default is."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda m, t: m(t)[0])(model, tokens[None])[0])
