"""Tokens per second of the input pipeline, against what accelerators can consume.

Three questions, on a file of random tokens cut into documents:

1. How many tokens a second does one core of a host make into batches (segments and positions
   included)? The bar is 20 M tokens per CPU-second.
2. How many cores does a process of each configured slice need, were the chips never to wait and to
   reach their peak? That is more than they will consume.
3. Which share of a run's wall time is spent waiting for batches? The bar is 1 %.
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from slm_jax import cli
from slm_jax.cli.show import console, count
from slm_jax.data import Corpus, DataConfig, Stream, train_batches
from slm_jax.data.tokenizer import ByteTokenizer
from slm_jax.errors import UserError
from slm_jax.models.flops import training_flops
from slm_jax.models.presets import PRESETS
from slm_jax.slices import find_slice, slice_names
from slm_jax.train import experiment
from slm_jax.train.experiment import Experiment
from slm_jax.train.goodput import GOODPUT_FILE
from slm_jax.train.loop import LoopConfig

LEAST = 20e6
"""Tokens per CPU-second that the pipeline must reach."""
MOST_WAIT = 0.01
"""Share of a run that may be spent waiting for batches."""


@dataclass(frozen=True)
class Benchmark:
    """Speed of the input pipeline."""

    seq_len: tuple[int, ...] = (256, 1024, 4096)
    """Tokens a row, one table row each."""
    batch_tokens: int = 65536
    """Tokens a batch of this process."""
    sources: tuple[int, ...] = (1, 3)
    """How many sources are mixed, one table row each."""
    document_tokens: int = 400
    """Mean length of a document."""
    file_tokens: int = 200_000_000
    """Tokens of a source: more than the processor's caches hold."""
    threads: int = 1
    """Threads that read ahead; 1 is what a run has."""
    seconds: float = 3.0
    """Time of each measurement, after a warm-up."""
    preset: str = "smollm2-135m"
    """Model whose tokens accelerators consume: the smaller, the more."""
    steps: int = 30
    """Steps of the run whose waiting is measured."""
    out: Path = Path("runs/benchmarks/input_pipeline.json")
    """Where the numbers go."""

    def __post_init__(self) -> None:
        if min(self.batch_tokens, self.document_tokens, self.steps, self.threads) < 1:
            raise UserError("batch_tokens, document_tokens, steps and threads must be at least 1")
        if max(self.seq_len) > self.batch_tokens:
            raise UserError(
                f"seq_len={max(self.seq_len)} is more than batch_tokens={self.batch_tokens}: "
                "raise batch_tokens"
            )


def main(config: Benchmark) -> None:
    """Measures, prints, writes; fails if a bar is missed."""
    out = console()
    with tempfile.TemporaryDirectory() as name:
        corpora = {n: make_corpus(config, Path(name), n) for n in config.sources}
        speeds = [
            {"seq_len": seq_len, "sources": n, **speed(config, corpora[n], seq_len)}
            for seq_len in config.seq_len
            for n in config.sources
        ]
        table = Table("tokens a row", "sources", "tokens/s", "tokens per CPU-second")
        for row in speeds:
            rates = (count(row[name]) for name in ("per_second", "per_cpu_second"))
            table.add_row(f"{row['seq_len']:,}", f"{row['sources']:.0f}", *rates)
        out.print(table)

        slowest = min(row["per_cpu_second"] for row in speeds)
        needs = consumption(config.preset, slowest)
        table = Table("slice", "processes", "tokens/s at peak", "of a process", "cores of it")
        for need in needs:
            rates = (count(need[name]) for name in ("per_second", "per_process"))
            table.add_row(need["slice"], str(need["processes"]), *rates, f"{need['cores']:.3f}")
        out.print(f"{config.preset} on the largest slices:")
        out.print(table)

        wait = wait_share(config, Path(name))
        out.print(f"waiting for batches: {wait:.3%} of the steps of a run on this machine")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    numbers = {"config": {**asdict(config), "out": str(config.out)}, "speed": speeds}
    config.out.write_text(json.dumps({**numbers, "slices": needs, "wait": wait}, indent=1) + "\n")
    out.print(f"numbers in {config.out}")
    if slowest < LEAST:
        raise UserError(f"per_cpu_second={slowest:,.0f} is below {LEAST:,.0f}")
    if wait > MOST_WAIT:
        raise UserError(f"wait={wait:.2%} of a run is above {MOST_WAIT:.0%}")


def make_corpus(config: Benchmark, folder: Path, n_sources: int) -> Corpus:
    """Sources that share a memory-mapped file of random tokens and documents."""
    file, n = folder / "tokens", config.file_tokens
    rng = np.random.default_rng(0)
    if not file.exists():
        rng.integers(0, 256, n, dtype=np.uint16).tofile(file)
    tokens = np.memmap(file, np.uint16, "r").view(np.ndarray)
    inner = rng.integers(1, n, n // config.document_tokens)
    starts = np.unique(np.append(inner, 0)).astype(np.int64)
    streams = tuple(Stream(f"source {i}", tokens, starts, n, str(i)) for i in range(n_sources))
    return Corpus("random", ByteTokenizer(), streams, streams, (1 / n_sources,) * n_sources)


def speed(config: Benchmark, corpus: Corpus, seq_len: int) -> dict[str, float]:
    """Tokens a second, by the clock and by the CPU time of all threads."""
    rows = config.batch_tokens // seq_len
    batches = train_batches(
        corpus, batch_size=rows, seq_len=seq_len, seed=0, read_threads=config.threads
    )
    for _ in range(20):  # more than are read ahead
        next(batches)
    wall, cpu, n = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < wall + config.seconds:
        n += next(batches)["tokens"].size
    return {
        "per_second": n / (time.perf_counter() - wall),
        "per_cpu_second": n / (time.process_time() - cpu),
    }


def consumption(preset: str, per_cpu_second: float) -> list[dict[str, Any]]:
    """What the largest slice of every kind of chip consumes at its peak, and cores to feed it."""
    model = PRESETS[preset]
    flops = training_flops(model, min(model.max_seq_len, 2048), remat="none")
    largest = {find_slice(name).chip: find_slice(name) for name in slice_names("tpu", "gpu")}
    rows = []
    for place in largest.values():
        per_second = place.devices * place.device.flops / flops
        processes = place.hosts * place.processes_per_host
        rows.append(
            {
                "slice": place.name,
                "processes": processes,
                "per_second": per_second,
                "per_process": per_second / processes,
                "cores": per_second / processes / per_cpu_second,
            }
        )
    return rows


def wait_share(config: Benchmark, folder: Path) -> float:
    """Share of a run's steps that is spent waiting for batches, from its own account."""
    run = Experiment(
        PRESETS["tiny-dense"],
        DataConfig(cache_dir=str(folder / "cache")),
        steps=config.steps,
        eval_tokens=1000,
        loop=LoopConfig(quiet=True),
        out=folder / "run",
    )
    experiment.run(run)
    seconds = json.loads((run.out / GOODPUT_FILE).read_text())["seconds"]
    waited: float = seconds.get("data", 0.0)
    return waited / (waited + seconds["step"])


if __name__ == "__main__":
    sys.exit(cli.run(main, Benchmark, description=__doc__))
