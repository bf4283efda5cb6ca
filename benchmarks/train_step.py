"""Tokens per second of a training step, against PyTorch, in turn on one machine.

A Llama with equal weights, batch, AdamW and clipping is trained by this project's compiled step and
by `transformers` (eager, and under torch.compile), each in its own process. They take turns,
`steps` steps at a time, so that whatever else the machine does hits all of them; only one works at
any time. The aim on CPU in float32: faster than both.

The numbers count only if the losses agree: the first within 1e-3, and falling on the fixed batch.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from peer import CORES, Peer, machine
from rich.table import Table

from slm_jax import cli
from slm_jax.cli.show import console, count
from slm_jax.errors import UserError
from slm_jax.models.hf import save_hf
from slm_jax.models.presets import dense, summary
from slm_jax.parallel import make_mesh, shard_batch
from slm_jax.train.experiment import Experiment, compile_program
from slm_jax.train.tasks.lm import LMLossConfig

LEARNING_RATE = 3e-4
WARM_UP = 3
"""Steps before the first round: compilation, allocator, and losses to compare."""


@dataclass(frozen=True)
class Benchmark:
    """Tokens per second of training the same Llama here and in PyTorch."""

    vocab: tuple[int, ...] = (256, 50_304)
    """Vocabulary sizes, one table row each."""
    d_model: int = 384
    """Width."""
    n_layers: int = 6
    """Layers."""
    n_heads: int = 6
    """Query heads."""
    n_kv_heads: int = 6
    """Key/value heads."""
    d_ff: int = 1024
    """Hidden width of the SwiGLU."""
    tie_embeddings: bool = True
    """The head is the embedding, on both sides."""
    seq_len: int = 256
    """Tokens a row."""
    batch_size: int = 16
    """Rows a step."""
    rounds: int = 7
    """Turns each side takes."""
    steps: int = 4
    """Steps a turn."""
    scan_unroll: int | None = None
    """Layers unrolled on our side; default all of them."""
    loss_chunk: int | None = None
    """Tokens of a row whose logits exist at one time on our side; default all."""
    peers: tuple[Literal["eager", "compile"], ...] = ("eager", "compile")
    """What to compare with."""
    peer_python: Path = Path(".golden-env/bin/python")
    """Python that has torch and transformers."""
    quick: bool = False
    """Two layers and two short rounds of the first vocabulary: checks, no measurement."""
    out: Path = Path("runs/benchmarks/train_step.json")
    """Where the numbers go."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.steps) < 1:
            raise UserError(f"rounds={self.rounds} and steps={self.steps} must be at least 1")


class Ours:
    """The compiled step of `slm_jax.train` on a mesh of one device, called as the loop calls it."""

    def __init__(self, config: Benchmark, vocab: int, batch: dict[str, np.ndarray]) -> None:
        model = dense(
            config.d_model, config.n_layers, config.n_heads, config.n_kv_heads, config.d_ff,
            vocab_size=vocab, tie_embeddings=config.tie_embeddings, max_seq_len=config.seq_len,
            scan_unroll=config.scan_unroll or config.n_layers,
        )  # fmt: skip
        experiment = Experiment(
            model,
            objective=LMLossConfig(chunk=config.loss_chunk),
            batch_size=config.batch_size,
            seq_len=config.seq_len,
        )
        self.parameters = summary(model).total
        self._mesh = make_mesh(devices=jax.devices()[:1])
        self._program = compile_program(experiment, self._mesh)
        self.facts = {
            "compile_seconds": self._program.compile_seconds,
            "memory_bytes": self._program.memory_bytes,
            "jax": jax.__version__,
        }
        self._batch = batch
        seed: Any = np.uint32(0)
        with jax.set_mesh(self._mesh):
            self.state = self._program.init(seed)

    def steps(self, n: int) -> tuple[float, list[float]]:
        """Seconds and losses of the next `n` steps."""
        losses = []
        rate: Any = np.float32(LEARNING_RATE)
        start = time.perf_counter()
        with jax.set_mesh(self._mesh):
            for _ in range(n):
                batch = shard_batch(self._batch, self._mesh)
                self.state, metrics = self._program.step(self.state, batch, rate)
                losses.append(metrics["loss"])
        jax.block_until_ready(self.state)
        return time.perf_counter() - start, [float(loss) for loss in losses]


class Torch(Peer):
    """A process of torch_peer.py."""

    def __init__(self, config: Benchmark, mode: str, folder: Path) -> None:
        files = {"model": str(folder / "model"), "batch": str(folder / "batch.npz")}
        setup = files | {"compile": mode == "compile", "threads": CORES, "lr": LEARNING_RATE}
        super().__init__(mode, config.peer_python, "torch_peer.py", setup, folder)
        self.parameters = self.facts.pop("parameters")

    def steps(self, n: int) -> tuple[float, list[float]]:
        """Seconds and losses of the next `n` steps."""
        answer = self.ask({"steps": n})
        return answer["seconds"], answer["losses"]


def main(config: Benchmark) -> None:
    """Measures every vocabulary, prints the table and writes the file."""
    if config.quick:
        config = replace(config, n_layers=2, rounds=2, steps=1, vocab=config.vocab[:1])
    if config.peers and not config.peer_python.exists():
        raise UserError(
            f"peer_python={config.peer_python} does not exist: `make golden-env` makes it, or give "
            "a Python that has torch and transformers"
        )
    here = machine()
    print(
        f"training in float32: {config.n_layers} layers of {config.d_model}, {config.n_heads} "
        f"heads ({config.n_kv_heads} of keys), {config.batch_size} x {config.seq_len} tokens; "
        f"{here['cores']} cores, {here['cpu']}\n"
        f"tokens/s over {config.rounds} turns of {config.steps} steps; ours / it: median of turns"
    )
    table = Table()
    for heading in ("vocabulary", "parameters", "side", "median", "best", "ours / it"):
        table.add_column(heading, justify="left" if heading == "side" else "right")
    cases = [measure(config, vocab) for vocab in config.vocab]
    for case in cases:
        head = (f"{case['vocab']:,}", count(case["parameters"]))
        for name, side in case["sides"].items():
            speeds = (f"{side[key]:,.0f}" for key in ("median", "best"))
            table.add_row(*head, name, *speeds, f"{side['ratio']:.2f}")
            head = ("", "")
        table.add_section()
    console().print(table)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": here, "config": asdict(config), "cases": cases}
    config.out.write_text(json.dumps(record, indent=1, default=str) + "\n")  # str: of paths
    console().print(f"written to {config.out}", highlight=False)


def measure(config: Benchmark, vocab: int) -> dict[str, Any]:
    """All sides on one model.

    Returns:
        Parameters, and of each side its tokens/s by turn, our speed over its (median over the
        turns), losses and versions.

    Raises:
        RuntimeError: if the sides do not train the same model alike.
    """
    rng = np.random.default_rng(0)
    rows = rng.integers(0, vocab, (config.batch_size, config.seq_len + 1), dtype=np.int32)
    batch = {
        "tokens": rows[:, :-1],
        "targets": rows[:, 1:],
        "segments": np.ones_like(rows[:, 1:]),
        "positions": np.broadcast_to(np.arange(config.seq_len, dtype=np.int32), rows[:, 1:].shape),
        "weights": np.ones(rows[:, 1:].shape, np.float32),
    }
    with sides_of(config, vocab, batch) as sides:
        # One side after another: no one compiles while another is measured.
        losses = {name: side.steps(WARM_UP)[1] for name, side in sides.items()}
        names = list(sides)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(config.rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                time.sleep(0.2)  # threads of the side before stop spinning
                took, more = sides[name].steps(config.steps)
                seconds[name].append(took)
                losses[name] += more
        check_equal(sides, losses)
    tokens = config.steps * config.batch_size * config.seq_len
    report = {}
    for name in names:
        speeds = [tokens / s for s in seconds[name]]
        ratios = [p / o for o, p in zip(seconds["slm_jax"], seconds[name], strict=True)]
        report[name] = {
            "median": statistics.median(speeds),
            "best": max(speeds),
            "ratio": statistics.median(ratios),
            "tokens_per_second": speeds,
            "losses": losses[name],
            **sides[name].facts,
        }
    return {"vocab": vocab, "parameters": sides["slm_jax"].parameters, "sides": report}


@contextlib.contextmanager
def sides_of(
    config: Benchmark, vocab: int, batch: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """Starts all sides from the same weights; ends their processes on leaving."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        ours = Ours(config, vocab, batch)
        save_hf(ours.state.model, folder / "model", model_type="llama")
        np.savez(folder / "batch.npz", tokens=batch["tokens"], targets=batch["targets"])
        sides: dict[str, Any] = {"slm_jax": ours}
        for mode in config.peers:
            peer = Torch(config, mode, folder)
            stack.callback(peer.close)
            sides[f"torch {mode}"] = peer
        yield sides


def check_equal(sides: dict[str, Any], losses: dict[str, list[float]]) -> None:
    """Holds parameters and losses of all sides against ours.

    Raises:
        RuntimeError: if they differ, or a loss does not fall on the fixed batch.
    """
    ours = losses["slm_jax"]
    for name, side in sides.items():
        if side.parameters != sides["slm_jax"].parameters:
            raise RuntimeError(f"{name} has {side.parameters} parameters: another model")
        got = losses[name]
        if not got[-1] < got[0]:
            raise RuntimeError(f"{name}: the loss went from {got[0]} to {got[-1]}")
        # Later steps see the optimiser too; rounding grows with every one of them.
        for step, tolerance in ((0, 1e-3), (WARM_UP - 1, 1e-2)):
            if abs(got[step] - ours[step]) > tolerance:
                raise RuntimeError(
                    f"{name}: loss {got[step]} at step {step}, ours {ours[step]}: not the same step"
                )


if __name__ == "__main__":
    sys.exit(cli.run(main, Benchmark, description=__doc__))
