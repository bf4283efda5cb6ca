"""What does a mixer cost when text is generated: MHA, GQA, MQA, a sliding window or a scan?

    python experiments/attention_efficiency.py                       # an hour on 2 CPU cores
    python experiments/attention_efficiency.py --longest-prompt 4096 # behind more, decode alone
    python experiments/attention_efficiency.py --on                  # nothing for other devices
    python experiments/attention_efficiency.py --contexts 1024 4096 --rounds 1 --on tpu-v5e-4

One model, five mixers. Width, layers and query heads are the same; the MLP takes up the difference,
so that parameters are equal (as in Llama 2, arXiv 2307.09288, appendix A.2.1). A small model is
timed here: prefill of a prompt of each length, in chunks, and decode behind as many tokens (caches
are filled, not read, for that), the mixers in turn, several rounds, medians. The same at 7B is not
run but compiled for slices of accelerators that are not there: the bytes that a token reads, the
least time by bytes and by operations, and on TPUs XLA's own estimate. GPUs are simulated by
nothing.

Expected: a decode step reads weights and cache, so it is bound by memory and the mixers part where
the cache is no longer small beside the weights; GQA, MQA, the window and the scan are ahead of MHA
in the order of their bytes (arXiv 1911.02150, 2305.13245, 2312.00752). Prefill is bound by
operations: the heads of keys and values do not change it, the window and the scan do.

A cell that is done is not done again; another setting needs another --out. Another mixer is one
line in `ARMS`.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from attention_efficiency_cells import (
    CacheDtype,
    Cells,
    Phase,
    Timing,
    compiled,
    median_of,
    timed,
    warm_up,
)
from attention_efficiency_report import CompiledCell, MeasuredCell, Sizes, write_report
from rich.console import Console
from slm_kernels.aot import find_libtpu
from slm_kernels.aot.gpu_targets import find_cuda

from slm_jax import cli
from slm_jax.cli.show import console as report_console
from slm_jax.errors import UserError, named
from slm_jax.infer.step import CHUNK
from slm_jax.models.lm import LM, LMConfig
from slm_jax.models.presets import state_bytes, summary
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.ssm import MambaConfig
from slm_jax.parallel import distributed
from slm_jax.slices import Slice, find_slice
from slm_jax.train.serialize import to_json


@dataclass(frozen=True)
class Shape:
    """What the models of a comparison share."""

    d_model: int
    """Width."""
    n_layers: int
    """Layers, each a mixer and an MLP."""
    n_heads: int
    """Query heads of width d_model / n_heads."""
    n_kv_heads: int
    """Key/value heads of the arm gqa."""
    window: int
    """Keys that a query of the arm window sees."""
    d_ff: int
    """MLP width of the arm mha, which sets the parameters of all."""
    vocab_size: int
    """Tokens; the head is the embedding, so that a step reads every weight."""
    dtype: Literal["float32", "bfloat16"]
    """Of computing, of the cache and of the weights at 7B."""
    d_ff_multiple: int
    """MLP widths are multiples of this."""

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.d_model % self.n_heads:
            raise UserError(
                f"n_heads={self.n_heads} does not divide d_model={self.d_model}: choose a divisor"
            )

    def attention(self, n_kv_heads: int, window: int | None = None) -> AttentionConfig:
        """The mixer with so many heads of keys and values."""
        return AttentionConfig(
            self.n_heads, n_kv_heads, self.d_model // self.n_heads, window=window
        )


ARMS: dict[str, Callable[[Shape], AttentionConfig | MambaConfig]] = {
    "mha": lambda s: s.attention(s.n_heads),
    "gqa": lambda s: s.attention(s.n_kv_heads),
    "mqa": lambda s: s.attention(1),
    "window": lambda s: s.attention(s.n_heads, s.window),
    "mamba": lambda s: MambaConfig(2 * s.d_model),
}


@dataclass(frozen=True)
class Efficiency:
    """Times generation with five mixers here and compiles it at 7B for accelerators."""

    arms: tuple[str, ...] = tuple(ARMS)
    """Which to compare."""
    small: Shape = Shape(
        128, 4, 8, 2, window=1024, d_ff=352, vocab_size=257, dtype="float32", d_ff_multiple=8
    )
    """The model that is timed here."""
    large: Shape = Shape(
        4096, 32, 32, 8, window=4096, d_ff=11008, vocab_size=32000, dtype="bfloat16",
        d_ff_multiple=128,
    )  # fmt: skip
    """The model that is compiled: Llama 7B's sizes (arXiv 2302.13971, table 2)."""
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    """Tokens of a prompt, and before a decode step, that are timed."""
    compiled_contexts: tuple[int, ...] = (1024, 8192, 32768)
    """Likewise those that are compiled."""
    longest_prompt: int = 32768
    """No prompt is read that is longer, here or compiled: decoding behind it is all."""
    on: tuple[str, ...] = ("tpu-v5e-4", "h100-1")
    """Slices to compile for; none for none."""
    rounds: int = 3
    """Times that every arm is timed, in turn."""
    batch: int = 1
    """Rows."""
    chunk: int = CHUNK
    """Tokens of a row that prefill reads at a time here; compiled it reads all in one go."""
    new_tokens: int = 32
    """Decode steps of a round."""
    cache_dtype: CacheDtype = None
    """Of keys and values; by default the compute dtype."""
    out: Path = Path("runs/attention_efficiency")
    """Folder of the cells and the report."""

    def __post_init__(self) -> None:
        for name in self.arms:
            named("arms", name, ARMS)
        if "mha" not in self.arms:
            raise UserError(f"arms={self.arms} lacks mha, which the others are compared with")
        for name in ("rounds", "batch", "chunk", "new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("contexts", "compiled_contexts"):
            given = getattr(self, name)
            if not given or list(given) != sorted(set(given)) or given[0] < 1:
                raise UserError(f"{name}={given} must rise, from 1 token on")
        for context in self.contexts:
            if context % min(self.chunk, context):
                raise UserError(
                    f"contexts={context} is not a multiple of chunk={self.chunk}: choose one that "
                    "is, so that no step is padding"
                )
        check_compilers(self.slices)

    @property
    def slices(self) -> list[Slice]:
        """What `on` names."""
        return [find_slice(name) for name in self.on]

    def programs(self, contexts: tuple[int, ...]) -> list[tuple[Phase, int]]:
        """What is done at each of these contexts."""
        prompts = [n for n in contexts if n <= self.longest_prompt]
        return [*(("decode", n) for n in contexts), *(("prefill", n) for n in prompts)]

    @property
    def timing(self) -> Timing:
        """How models are timed."""
        return Timing(self.batch, self.chunk, self.new_tokens, self.cache_dtype)


def check_compilers(slices: list[Slice]) -> None:
    """Looks for the compilers that the slices need.

    Raises:
        UserError: if one is not installed, or a slice is a CPU, which is measured and not compiled.
    """
    for where in slices:
        if where.platform == "cpu":
            raise UserError(f"on={where.name!r} is no accelerator: CPUs are timed, not compiled")
        try:
            find_libtpu() if where.platform == "tpu" else find_cuda()
        except FileNotFoundError as error:
            raise UserError(f"on={where.name!r}: {error}") from None


def model(shape: Shape, arm: str, max_seq_len: int) -> LMConfig:
    """The model with this mixer and the parameters of the arm mha.

    Raises:
        UserError: if the mixer alone has more.
    """

    def at(arm: str, d_ff: int) -> LMConfig:
        layer = LayerConfig(ARMS[arm](shape), MLPConfig(d_ff))
        return LMConfig(
            shape.vocab_size,
            shape.d_model,
            shape.n_layers,
            (layer,),
            max_seq_len=max_seq_len,
            dtype=shape.dtype,
        )

    def size(config: LMConfig) -> int:
        return summary(config).total

    m = shape.d_ff_multiple
    per_multiple = size(at(arm, 2 * m)) - size(at(arm, m))  # parameters are linear in the width
    missing = size(at("mha", shape.d_ff)) - size(at(arm, m))
    d_ff = m * (1 + round(missing / per_multiple))
    if d_ff < m:
        raise UserError(
            f"d_ff={shape.d_ff}: the mixer {arm} alone has more parameters than mha: choose more"
        )
    return at(arm, d_ff)


def measure(config: Efficiency, cells: Cells, console: Console) -> list[MeasuredCell]:
    """Times every arm at every context, those that are not timed yet."""
    configs = {arm: model(config.small, arm, config.contexts[-1]) for arm in config.arms}
    models: dict[str, LM] = {}
    found = []
    for phase, context in config.programs(config.contexts):
        turns: dict[str, list[dict[str, Any]]] = {arm: [] for arm in configs}
        for turn in range(config.rounds):
            for arm, of in configs.items():
                key: dict[str, Any] = dict(arm=arm, context=context, phase=phase, round=turn)
                cell = cells.get(**key)
                if cell is None:
                    if arm not in models:
                        models[arm] = jax.jit(LM, static_argnums=0)(of, jax.random.key(0))
                    warm_up(models[arm], phase, context, config.timing)
                    cell = key | timed(models[arm], phase, context, config.timing)
                    cells.put(cell)
                    tokens = config.batch * (context if phase == "prefill" else 1)
                    console.print(
                        f"{arm:>8} {context:>7,} tokens, round {turn + 1}: {phase} "
                        f"{tokens / cell['seconds']:,.1f} tokens/s",
                        highlight=False,
                    )
                turns[arm].append(cell)
        for arm, of in configs.items():
            cache = config.batch * state_bytes(of, context, config.cache_dtype)
            data = median_of(turns[arm])
            found.append(MeasuredCell(arm, phase, context, config.batch, cache, data))
    return found


def compile_all(config: Efficiency, cells: Cells, console: Console) -> list[CompiledCell]:
    """Compiles every arm at every context for every slice, what is not compiled yet."""
    found = []
    for phase, context in config.programs(config.compiled_contexts):
        for where in config.slices:
            for arm in config.arms:
                of = model(config.large, arm, config.compiled_contexts[-1])
                same = _same_program(config, of, phase, context)
                key: dict[str, Any] = dict(arm=arm, context=same, on=where.name, phase=phase)
                cell = cells.get(**key)
                if cell is None:
                    cell = key | compiled(of, phase, same, config.timing, where)
                    cells.put(cell)
                    console.print(
                        f"{arm:>8} {same:>7,} tokens, {phase} on {where.name}: "
                        + (cell["refusal"] or f"{cell['compile_seconds']:.0f} s compiled"),
                        highlight=False,
                    )
                cache = config.batch * state_bytes(of, context, config.cache_dtype)
                found.append(CompiledCell(arm, context, config.batch, cache, cell))
    return found


def _same_program(config: Efficiency, of: LMConfig, phase: Phase, context: int) -> int:
    """The least context with this decode step: a window that is full and a scan do not change."""
    if phase == "prefill":
        return context
    size = state_bytes(of, context)
    return min(n for n in config.compiled_contexts if state_bytes(of, n) == size)


def sizes(config: Efficiency, shape: Shape, longest: int) -> list[Sizes]:
    """What the models of a shape have."""
    found = []
    for arm in config.arms:
        of = model(shape, arm, longest)
        channel = of.layer(0).channel
        assert isinstance(channel, MLPConfig)
        constant = state_bytes(of, 0, config.cache_dtype)
        per_token = state_bytes(of, 1, config.cache_dtype) - constant
        found.append(Sizes(arm, summary(of).total, channel.d_ff, per_token, constant))
    return found


def main(config: Efficiency) -> None:
    """Measures and compiles what is not there yet and writes the report."""
    console = report_console()
    shared = ("small", "large", "batch", "chunk", "new_tokens", "cache_dtype")
    cores = len(os.sched_getaffinity(0))
    settings = {name: to_json(getattr(config, name)) for name in shared} | {"cores": cores}
    cells = Cells(config.out, settings)
    found = compile_all(config, cells, console)
    measured = measure(config, cells, console)
    if distributed.is_first():
        write_report(
            config.out,
            measured,
            found,
            small=sizes(config, config.small, config.contexts[-1]),
            large=sizes(config, config.large, config.compiled_contexts[-1]),
            cores=cores,
            console=console,
            command="python experiments/attention_efficiency.py",
        )


if __name__ == "__main__":
    sys.exit(cli.run(main, Efficiency, description=__doc__))
