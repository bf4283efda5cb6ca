"""The Tiny Recursive Model (arXiv 2510.04871): one small network applied to itself.

The model keeps an answer y and a latent z, one vector a cell of the puzzle each, and refines both
with the same network f. This is the architecture of the authors' code, where it and the paper
differ. Training it is `slm_jax.train.tasks.trm`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from slm_jax.errors import UserError
from slm_jax.nn.attention import Attention, AttentionConfig
from slm_jax.nn.linear import Embedding, Linear, truncated_normal
from slm_jax.nn.mlp import MLP, MLPConfig
from slm_jax.nn.module import Buffer, SparseTable, count_parameters, parameter
from slm_jax.nn.norm import Norm, NormConfig
from slm_jax.parallel.rules import has_mesh, lead_spec, refuse_split_rows, spec

_NORM = NormConfig(kind="rms", eps=1e-5, scale="none")


@dataclass(frozen=True)
class TRMConfig:
    """Sizes, depth of the recursion, and what the paper's ablations change."""

    vocab_size: int
    """Symbols of a cell, 0 (not scored) among them."""
    seq_len: int
    """Cells of a puzzle."""
    n_puzzle_ids: int = 0
    """Rows of the puzzle table (Sudoku-Extreme: 1, ARC: one an augmented task); 0: no table."""
    d_model: int = 512
    """Width."""
    n_heads: int = 8
    """Heads of the attention mixer."""
    n_layers: int = 2
    """Blocks of f."""
    mixer: Literal["mlp", "attention"] = "mlp"
    """Along the cells: SwiGLU over all of them at once (small grids), or attention with RoPE."""
    n_prefix: int = 16
    """Slots before the cells; the first holds the puzzle's vector and the halting decision."""
    n_cycles: int = 3
    """T: cycles a supervision step, of which only the last has a gradient."""
    n_latent_steps: int = 6
    """n: updates of z before the one of y in a cycle."""
    latents: Literal["two", "one"] = "two"
    """y and z, or z alone, updated n + 1 times a cycle from z + x."""
    gradient: Literal["cycle", "last"] = "cycle"
    """Through the whole last cycle, or its last updates of z and y alone (HRM's one-step)."""
    separate_networks: bool = False
    """One network for z and one for y, as in HRM, in place of a shared one."""
    expansion: float = 4.0
    """SwiGLU has 2/3 of this times its width, rounded up to a multiple of `ff_multiple`."""
    ff_multiple: int = 256
    """See `expansion`."""
    halt_bias: float = -5.0
    """Initial bias of the halting head."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; weights are float32 masters."""
    remat: Literal["none", "full"] = "none"
    """What the backward pass recomputes: nothing, or every application of f."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "d_model", "n_heads", "n_layers", "n_cycles"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        least = 1 if self.latents == "two" else 0
        if self.n_latent_steps < least:
            raise UserError(
                f"n_latent_steps={self.n_latent_steps} must be at least {least}: the input enters "
                "with the updates of z" + (' (or set latents="one")' if least else "")
            )
        if self.n_puzzle_ids < 0 or self.n_prefix < min(1, self.n_puzzle_ids):
            raise UserError(
                f"n_puzzle_ids={self.n_puzzle_ids} with n_prefix={self.n_prefix}: a puzzle's "
                "vector needs a slot before the cells, so n_prefix >= 1"
            )
        if self.mixer == "attention" and (
            self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2
        ):
            raise UserError(
                f"d_model={self.d_model} with n_heads={self.n_heads}: heads need an even width, so "
                f"choose d_model as a multiple of {2 * self.n_heads}"
            )

    @property
    def n_slots(self) -> int:
        """Positions that f works on: prefix and cells."""
        return self.n_prefix + self.seq_len

    def swiglu(self, width: int) -> MLPConfig:
        """The SwiGLU over an axis of this width."""
        hidden = round(self.expansion * width * 2 / 3)
        return MLPConfig(math.ceil(hidden / self.ff_multiple) * self.ff_multiple)

    def attention(self) -> AttentionConfig:
        """The attention mixer: full multi-head attention with rotary positions."""
        return AttentionConfig(self.n_heads, self.n_heads, self.d_model // self.n_heads)


class Latents(NamedTuple):
    """What a supervision step hands to the next.

    Attributes:
        y: answer, `[B, n_slots, d_model]`, or `None` with one latent.
        z: latent, the same.
    """

    y: jax.Array | None
    z: jax.Array


class TRMBlock(nnx.Module):
    """Post-norm block: norm(h + mixer(h)), then norm(h + SwiGLU(h)); the norms have no weight."""

    def __init__(self, config: TRMConfig, key: jax.Array) -> None:
        k_mixer, k_channel = jax.random.split(key)
        d, slots = config.d_model, config.n_slots
        self.mixer: Attention | MLP
        if config.mixer == "attention":
            self.mixer = Attention(config.attention(), d, _NORM, key=k_mixer, out_std=d**-0.5)
        else:
            across = config.swiglu(slots)
            std = across.d_ff**-0.5
            self.mixer = MLP(across, slots, key=k_mixer, out_std=std, axis="slots")
        along = config.swiglu(d)
        self.channel = MLP(along, d, key=k_channel, out_std=along.d_ff**-0.5)
        self.norm = Norm(_NORM, d)

    def __call__(self, h: jax.Array) -> jax.Array:
        """Maps `[B, n_slots, d_model]` to the same shape."""
        if isinstance(self.mixer, Attention):
            positions = jnp.arange(h.shape[1], dtype=jnp.int32)[None]
            mixed, _ = self.mixer(h, positions=positions, segments=None, causal=False)
            h = self.norm(h + mixed)
        else:
            # The norm goes over the slots too: it stands before the transposition back.
            t = jnp.swapaxes(h, 1, 2)
            h = jnp.swapaxes(self.norm(t + self.mixer(t, segments=None)[0]), 1, 2)
        return self.norm(h + self.channel(h, segments=None)[0])


class TRM(nnx.Module):
    """Weights of the model and pure functions of them.

    Attributes:
        config: the configuration.
        embed: symbols.
        puzzles: `[n_puzzle_ids, d_model]`, zero at first, or `None`.
        y_blocks: f, or with separate networks that of y.
        z_blocks: that of z with separate networks, else `None`.
        y_init: `[d_model]`, where every slot of y starts; fixed. `None` with one latent.
        z_init: the same for z.
        head: symbols from y (from z if there is one latent).
        halt: whether to halt and whether to go on, from the first slot.
    """

    def __init__(self, config: TRMConfig, key: jax.Array) -> None:
        """Initialises all weights from `key`, a typed PRNG key; can be traced and `eval_shape`d."""
        k_embed, k_y, k_z, k_y0, k_z0, k_head = jax.random.split(key, 6)
        d = config.d_model

        def network(key: jax.Array) -> nnx.List:
            return nnx.List([TRMBlock(config, k) for k in jax.random.split(key, config.n_layers)])

        def start(key: jax.Array) -> Buffer:
            return Buffer(truncated_normal(key, (d,), 1.0), axes=(None,))

        self.config = config
        self.embed = Embedding(config.vocab_size, d, key=k_embed, std=d**-0.5)
        rows = jnp.zeros((config.n_puzzle_ids, d))
        self.puzzles = SparseTable(rows, axes=(None, "embed")) if config.n_puzzle_ids else None
        self.y_blocks = network(k_y)
        self.z_blocks = network(k_z) if config.separate_networks else None
        self.y_init = start(k_y0) if config.latents == "two" else None
        self.z_init = start(k_z0)
        sizes = {"embed": d, "vocab": config.vocab_size, "halt": 2}
        self.head = Linear("embed -> vocab", sizes, key=k_head)
        self.halt = Linear("embed -> halt", sizes, key=k_head, bias=True, std=0.0)
        # Unlike other biases it decays: the reference decays every weight.
        self.halt.b = parameter(jnp.full(2, config.halt_bias), ("halt",))

    def __call__(
        self, inputs: jax.Array, puzzle_ids: jax.Array, latents: Latents
    ) -> tuple[Latents, jax.Array, jax.Array]:
        """One supervision step.

        No gradient flows into `latents`: it reaches back to the start of the last cycle only.

        Args:
            inputs: `[B, seq_len]` int32.
            puzzle_ids: `[B]` int32, rows of the puzzle table; not read without one.
            latents: from `start` or from the step before.

        Returns:
            New latents; logits `[B, seq_len, vocab_size]` float32; halting logits `[B, 2]`
            float32: halt, continue.

        Raises:
            UserError: on a mesh that splits rows.
        """
        c = self.config
        refuse_split_rows("a TRM")
        x = self._embed(inputs, puzzle_ids)
        # All that runs before the last cycle is made of these three, so it has no gradient, and the
        # backward pass keeps nothing of it.
        model, fixed, latents = jax.lax.stop_gradient((self, x, latents))

        def cycle(latents: Latents, _: None) -> tuple[Latents, None]:
            return model._cycle(fixed, latents, c.n_latent_steps), None

        latents, _ = jax.lax.scan(cycle, latents, None, length=c.n_cycles - 1)
        skipped = ungraded_steps(c)
        if skipped:
            latents = model._update_z(fixed, latents, skipped)
        latents = self._cycle(x, latents, c.n_latent_steps - skipped)
        answer = latents.z if latents.y is None else latents.y
        logits = self.head(answer[:, c.n_prefix :], out_dtype=jnp.float32)
        return latents, logits, self.halt(answer[:, 0], out_dtype=jnp.float32)

    def start(self, halted: jax.Array, latents: Latents) -> Latents:
        """`latents` with the rows that have `halted` (`[B]` bool) at the initial states."""

        def one(init: Buffer | None, old: jax.Array | None) -> jax.Array | None:
            if init is None or old is None:
                return None
            return jnp.where(halted[:, None, None], init[...].astype(old.dtype), old)

        y, z = one(self.y_init, latents.y), one(self.z_init, latents.z)
        assert z is not None
        return Latents(y, z)

    def _embed(self, inputs: jax.Array, puzzle_ids: jax.Array) -> jax.Array:
        """Prefix and symbols: `[B, n_slots, d_model]` in the compute dtype."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        x = self.embed(inputs, dtype)
        if self.puzzles is None:
            x = jnp.pad(x, ((0, 0), (c.n_prefix, 0), (0, 0)))
        else:
            puzzle = _read_rows(self.puzzles, puzzle_ids).astype(dtype)
            x = jnp.pad(x, ((0, 0), (c.n_prefix - 1, 0), (0, 0)))
            x = jnp.concatenate([puzzle[:, None], x], axis=1)
        return x * jnp.asarray(math.sqrt(c.d_model), dtype)

    def _update_z(self, x: jax.Array, latents: Latents, times: int) -> Latents:
        """Z = f(z + (y + x)), `times` over."""
        y, f = latents.y, self._network(self.y_blocks if self.z_blocks is None else self.z_blocks)
        given = x if y is None else y + x
        z, _ = jax.lax.scan(lambda z, _: (f(z + given), None), latents.z, None, length=times)
        return Latents(y, z)

    def _cycle(self, x: jax.Array, latents: Latents, times: int) -> Latents:
        """Z is updated `times` over and y = f(y + z) once; a single latent once more."""
        if latents.y is None:
            return self._update_z(x, latents, times + 1)
        z = self._update_z(x, latents, times).z
        return Latents(self._network(self.y_blocks)(latents.y + z), z)

    def _network(self, blocks: Any) -> Callable[[jax.Array], jax.Array]:
        def f(h: jax.Array) -> jax.Array:
            for block in blocks:
                h = block(h)
            return h

        return jax.checkpoint(f) if self.config.remat == "full" else f


def _read_rows(table: SparseTable, rows: jax.Array) -> jax.Array:
    """Rows `[B]` of a table: `[B, d_model]`, split as `rows` is.

    Every device reads all rows from its own columns. So the table, two gigabytes for ARC, is never
    gathered, and its gradient, as large, is added up where it is: only `[B, d_model]` is sent.
    """
    if not has_mesh():
        return table[...][rows]
    columns = spec((None, "embed"))
    found = table[...].at[jax.reshard(rows, P(None))].get(out_sharding=columns)
    # In two steps: XLA knows no way from columns over one axis to rows over two.
    return jax.reshard(jax.reshard(found, P(None, None)), P(*lead_spec(rows, 1), None))


def n_parameters(config: TRMConfig) -> int:
    """Trained weights; the puzzle table, which the paper does not count either, is left out."""
    return count_parameters(jax.eval_shape(lambda key: TRM(config, key), jax.random.key(0)))


def empty_latents(config: TRMConfig, rows: int) -> Latents:
    """Zeros of the shape and dtype of the latents of `rows` puzzles; `TRM.start` fills them."""
    zeros = jnp.zeros((rows, config.n_slots, config.d_model), config.dtype)
    return Latents(zeros if config.latents == "two" else None, zeros)


def ungraded_steps(config: TRMConfig) -> int:
    """Updates of z in the last cycle that have no gradient."""
    if config.gradient == "cycle":
        return 0
    return config.n_latent_steps - (1 if config.latents == "two" else 0)


class Refinement(NamedTuple):
    """What a model says after each of N supervision steps.

    Attributes:
        predictions: `[N, B, seq_len]` int32.
        halt: `[N, B]` float32, logits of the answer being right.
    """

    predictions: jax.Array
    halt: jax.Array


def refine(model: TRM, inputs: jax.Array, puzzle_ids: jax.Array, n_steps: int) -> Refinement:
    """Solves puzzles by exactly `n_steps` supervision steps from the initial states.

    Args:
        model: raw or averaged weights.
        inputs: `[B, seq_len]` int32.
        puzzle_ids: `[B]` int32.
        n_steps: N >= 1; may exceed the number trained with.
    """
    # From the symbols, so that the zeros are split over devices as the batch is.
    rows = inputs[:, :1, None] * 0
    latents = jax.tree.map(lambda a: a + rows.astype(a.dtype), empty_latents(model.config, 1))
    latents = model.start(inputs[:, 0] == inputs[:, 0], latents)

    def step(latents: Latents, _: None) -> tuple[Latents, Refinement]:
        latents, logits, halt = model(inputs, puzzle_ids, latents)
        symbols = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return latents, Refinement(symbols, halt[:, 0])

    return jax.lax.scan(step, latents, None, length=n_steps)[1]
