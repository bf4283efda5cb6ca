"""Causal language model from a repeating pattern of layers."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from slm_jax.errors import UserError
from slm_jax.models.recursion import Injection, RecursionConfig
from slm_jax.models.recursion_run import run_recursive
from slm_jax.nn.block import Block, LayerConfig
from slm_jax.nn.linear import Embedding, Linear
from slm_jax.nn.norm import Norm, NormConfig
from slm_jax.nn.parametrization import MuPConfig, parametrise
from slm_jax.parallel.rules import split_rows

State = dict[str, tuple[Any, ...]]

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class LMConfig:
    """A causal language model. Layer i is `pattern[i % len(pattern)]`."""

    vocab_size: int
    """Rows of the embedding."""
    d_model: int
    """Width of the residual stream."""
    n_layers: int
    """Layers in all; need not be a multiple of the pattern's length."""
    pattern: tuple[LayerConfig, ...]
    """The repeating period of layers."""
    norm: NormConfig = NormConfig()
    """Normalisation of the blocks and before the head."""
    tie_embeddings: bool = True
    """The head is the embedding, transposed."""
    head_bias: bool = False
    """Bias of an untied head (Phi-3.5-MoE)."""
    embedding_scale: float | None = None
    """Multiplies the embeddings (Gemma: sqrt(d_model))."""
    final_softcap: float | None = None
    """Logits are squashed to +-softcap (Gemma 2)."""
    max_seq_len: int = 2048
    """Context the model is meant for; sizes caches and default batches."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; weights are float32 masters."""
    residual_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the residual stream; `None` is the compute dtype (Mamba keeps float32)."""
    init_std: float = 0.02
    """Standard deviation of embedding and head; hidden matrices use 1/sqrt(fan-in)."""
    mup: MuPConfig = MuPConfig()
    """Width and depth that the learning rate was tuned at; by default it is tuned for this one."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes: nothing, every layer, or all but matrix products."""
    scan_unroll: int = 1
    """Periods unrolled in the layer loop: more is faster on CPU and slower to compile."""
    recursion: RecursionConfig | None = None
    """Layers that run repeatedly, with shared weights; `None`: every layer runs once."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "max_seq_len", "scan_unroll"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.pattern:
            raise UserError("pattern=() is empty: give at least one LayerConfig")
        if self.head_bias and self.tie_embeddings:
            raise UserError("head_bias=True needs tie_embeddings=False: a tied head has no bias")
        for layer in self.pattern:
            self.mup.mixer(layer.mixer)
        if self.recursion is not None:
            self.recursion.check(self.n_layers, self.pattern)
            if self.mup.base_depth is not None:
                raise UserError(
                    f"mup.base_depth={self.mup.base_depth} with recursion: no rule is known for "
                    "layers that repeat: leave it at None"
                )

    def layer(self, i: int) -> LayerConfig:
        """The configuration of layer `i`."""
        return self.pattern[i % len(self.pattern)]

    def runs(self, i: int) -> int:
        """How often layer `i` runs in a pass without a key; so many decode states it has."""
        r = self.recursion
        return r.repeats if r is not None and r.shares(i) else 1


class LM(nnx.Module):
    """Causal language model: a pytree of weights and pure functions of it.

    Layers are stacked by position in the pattern and run by `lax.scan`; what a last incomplete
    period holds is run after it.

    Attributes:
        config: the configuration.
        embed: token embedding.
        blocks: one stacked `Block` a position of the pattern, leading axis = periods.
        tail: layers of the last incomplete period, unstacked.
        inject: what a run of repeated layers begins and ends with, or `None`.
        final_norm: before the head.
        head: `Linear`, or `None` when tied.
    """

    def __init__(self, config: LMConfig, key: jax.Array) -> None:
        """Initialises all weights from `key`, a typed PRNG key; can be traced and `eval_shape`d."""
        k_embed, k_blocks, k_tail, k_head = jax.random.split(key, 4)
        period = len(config.pattern)
        repeats, rest = divmod(config.n_layers, period)

        mup = config.mup
        width_ratio, depth_ratio = mup.width_ratio(config.d_model), mup.depth_ratio(config.n_layers)

        def block(layer: LayerConfig, key: jax.Array) -> Block:
            return Block(
                replace(layer, mixer=mup.mixer(layer.mixer)),
                config.d_model,
                config.norm,
                key=key,
                residual_scale=(2 * (mup.base_depth or config.n_layers)) ** -0.5,
                branch_multiplier=1 / depth_ratio,
            )

        self.config = config
        self.embed = Embedding(config.vocab_size, config.d_model, key=k_embed, std=config.init_std)
        keys = jax.random.split(k_blocks, (period, max(repeats, 1)))
        self.blocks = nnx.List(
            [
                jax.vmap(lambda k, layer=layer: block(layer, k))(keys[i])
                for i, layer in enumerate(config.pattern)
                if repeats
            ]
        )
        tail_keys = jax.random.split(k_tail, max(rest, 1))
        self.tail = nnx.List([block(config.layer(i), tail_keys[i]) for i in range(rest)])
        self.inject = (
            None
            if config.recursion is None
            else Injection(
                config.recursion.injection,
                config.d_model,
                config.norm,
                key=jax.random.fold_in(key, 4),
            )
        )
        self.final_norm = Norm(config.norm, config.d_model)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(
                "embed -> vocab",
                {"embed": config.d_model, "vocab": config.vocab_size},
                key=k_head,
                bias=config.head_bias,
                std=config.init_std,
            )
        )
        parametrise(self, width_ratio, depth_ratio)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        state: State | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array], State | None]:
        """Logits of the next token: `[B, S, vocab]` float32, aux terms, and the new state.

        Arguments as in `hidden`.
        """
        x, aux, state = self.hidden(
            tokens, positions=positions, segments=segments, state=state, key=key
        )
        return self.logits(x), aux, state

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        state: State | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array], State | None]:
        """Runs the layers.

        Args:
            tokens: `[B, S]` int32.
            positions: `[B, S]` int32, restarting at 0 in every document. By default counted from
                `segments`, or 0..S-1; must be given together with `state`.
            segments: `[B, S]` int32, 0 = padding, >= 1 = document; `None` = one document a row.
            state: from `init_state` or an earlier call: prefill or step from there.
            key: PRNG key for training: noise (sparsemixer) and how often layers repeat; or `None`.

        Returns:
            `[B, S, d_model]` after the final norm; aux terms stacked over the MoE layers
            (`moe_*` of `slm_jax.nn.moe.MoE`, empty for a dense model) and, with recursion, the
            mean runs a token (`recursion_runs`, `[]`); the new state.

        Raises:
            UserError: if `state` comes without `positions`, or, without one, S is not a multiple
                of the mesh axis that tokens are split over.
        """
        config = self.config
        if positions is None:
            if state is not None:
                raise UserError("positions=None with a state: say where these tokens stand")
            positions = default_positions(tokens.shape[1], segments)
        if state is None:  # with one, rows stay whole: a cache is not split along its tokens
            tokens, positions, segments = split_rows((tokens, positions, segments))
        dtype = jnp.dtype(config.dtype)
        x = self.embedded(tokens)

        def run(
            x: jax.Array, blocks: Any, states: tuple[Any, ...], keys: jax.Array | None
        ) -> tuple[jax.Array, tuple[dict[str, jax.Array], ...], tuple[Any, ...]]:
            auxes, news = [], []
            for i, (block, old) in enumerate(zip(blocks, states, strict=True)):
                x, aux, new = block(
                    x,
                    positions=positions,
                    segments=segments,
                    state=old,
                    dtype=dtype,
                    key=None if keys is None else keys[i],
                )
                auxes.append(aux)
                news.append(new)
            return x, tuple(auxes), tuple(news)

        if config.remat != "none":
            run = jax.checkpoint(run, policy=REMAT_POLICIES[config.remat])

        period = len(config.pattern)
        repeats = config.n_layers // period
        keys = None if key is None else jax.random.split(key, (repeats + 1, period))
        stacked: tuple[dict[str, jax.Array], ...] = ()
        new: dict[str, tuple[Any, ...]] = {"blocks": (), "tail": ()}
        more: dict[str, jax.Array] = {}

        def layers(x: jax.Array, blocks: Any, states: Any, keys: Any) -> tuple[jax.Array, Any, Any]:
            def body(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
                x, aux, states = run(x, *xs)
                return x, (aux, states)

            unroll = min(config.scan_unroll, len(jax.tree.leaves(blocks)[0]))
            x, (aux, states) = jax.lax.scan(body, x, (blocks, states, keys), unroll=unroll)
            return x, aux, states

        if repeats:
            blocks, block_keys = list(self.blocks), None if keys is None else keys[:-1]
            old = (None,) * period if state is None else state["blocks"]
            if config.recursion is None or self.inject is None:
                x, stacked, new["blocks"] = layers(x, blocks, old, block_keys)
            else:
                x, stacked, new["blocks"], more["recursion_runs"] = run_recursive(
                    config.recursion, self.inject, layers, x, blocks, old, block_keys,
                    positions=positions, segments=segments, key=key, dtype=dtype,
                )  # fmt: skip
        old = (None,) * len(self.tail) if state is None else state["tail"]
        x, tail_aux, new["tail"] = run(x, list(self.tail), old, None if keys is None else keys[-1])
        aux = _by_layer(stacked, tail_aux) | more
        return self.final_norm(x, dtype), aux, None if state is None else new

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """The residual stream before the first layer: `[B, S]` int32 to `[B, S, d_model]`."""
        config = self.config
        x = self.embed(tokens, jnp.dtype(config.residual_dtype or config.dtype))
        if config.embedding_scale is None:
            return x
        return x * jnp.asarray(config.embedding_scale, x.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps `[B, S, d_model]` to logits `[B, S, vocab]`, float32."""
        width_ratio = self.config.mup.width_ratio(self.config.d_model)
        if width_ratio != 1.0:
            x = x / width_ratio  # not the logits: the head's bias is not divided
        if self.head is None:
            y = self.embed.attend(x)
        else:
            y = self.head(x, out_dtype=jnp.float32)
        cap = self.config.final_softcap
        return y if cap is None else cap * jnp.tanh(y / cap)

    def at_depth(self, repeats: int | None = None, tolerance: float | None = None) -> "LM":
        """The same weights with another depth at inference; for a model with recursion.

        Args:
            repeats: runs of the shared layers, whatever their number in training; default the
                model's own.
            tolerance: a token stops earlier, when a run changes its state by less than this share.

        Raises:
            UserError: if the model has no recursion, or on values that `RecursionConfig` refuses.
        """
        old = self.config.recursion
        if old is None:
            raise UserError(
                f"repeats={repeats}, tolerance={tolerance}: no layers of this model repeat "
                "(recursion=None): leave both out"
            )
        repeats = old.repeats if repeats is None else repeats
        recursion = replace(old, repeats=repeats, tolerance=tolerance, sampling="fixed")
        copy = jax.tree.unflatten(jax.tree.structure(self), jax.tree.leaves(self))
        copy.config = replace(self.config, recursion=recursion)
        return copy

    def init_state(self, batch: int, max_len: int, dtype: Any = None, *, spare: int = 0) -> State:
        """The state before the first token.

        Args:
            batch: rows.
            max_len: most tokens a row will have: the capacity of a full cache.
            dtype: of keys, values and convolution inputs; default the compute dtype. "int8" is for
                keys and values alone, with a scale a token and head.
            spare: the last tokens of a row that may be taken back, which a window has room for.
        """
        config, dtype = self.config, jnp.dtype(dtype or self.config.dtype)
        period = len(config.pattern)
        stacked = config.n_layers // period * period
        periods = sum(config.runs(i) for i in range(0, stacked, period))

        def one(block: Block) -> Any:
            kept = {"spare": spare} if spare else {}  # not every mixer can take tokens back
            return block.mixer.init_state(batch, max_len, dtype, **kept)

        def stack(leaf: jax.Array) -> jax.Array:
            return jnp.broadcast_to(leaf, (periods, *leaf.shape))

        return {
            "blocks": tuple(jax.tree.map(stack, one(b)) for b in self.blocks),
            "tail": tuple(one(b) for b in self.tail),
        }


def _by_layer(
    stacked: tuple[dict[str, jax.Array], ...], tail: tuple[dict[str, jax.Array], ...]
) -> dict[str, jax.Array]:
    """Aux terms of all layers that have any, in their order, along a new first axis.

    `stacked` has one entry a position of the pattern, `[periods, ...]`; `tail` one a layer.
    """

    def interleave(*positions: jax.Array) -> jax.Array:
        return jnp.stack(positions, axis=1).reshape(-1, *positions[0].shape[1:])

    full, rest = [aux for aux in stacked if aux], [aux for aux in tail if aux]
    parts = [jax.tree.map(interleave, *full)] if full else []
    parts += [jax.tree.map(lambda a: a[None], aux) for aux in rest]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if parts else {}


def default_positions(length: int, segments: jax.Array | None) -> jax.Array:
    """Positions that restart where the segment id changes: `[B or 1, S]` int32."""
    index = jnp.arange(length, dtype=jnp.int32)[None]
    if segments is None:
        return index
    begins = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
