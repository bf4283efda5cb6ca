"""What `slm quantize` and `slm prune` share: the model, its text, and what the loss is on it."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from slm_jax.cli.load import load
from slm_jax.compress.io import TOKENIZER, is_pruned_folder
from slm_jax.compress.qat import QATConfig
from slm_jax.data import Corpus, DataConfig, Tokenizer, open_data, train_batches, valid_batches
from slm_jax.errors import UserError
from slm_jax.models.hf import is_hf
from slm_jax.models.lm import LM
from slm_jax.models.loss import next_token_loss
from slm_jax.train.experiment import load_experiment
from slm_jax.train.metrics import bits_per_byte


@dataclass(frozen=True)
class Shrink:
    """Options of both commands."""

    model: tyro.conf.Positional[Path]
    """Folder of a training run, of a Hugging Face model with its tokenizer.json, or of
    `slm prune`."""
    out: Path
    """Folder to write; `slm generate` continues texts with it."""
    text: str | None = None
    """Text for loss and calibration, as in `slm train --data.source`; default the run's own."""
    calibration_tokens: int = 16384
    """Training tokens that methods with calibration and the report of the layers look at."""
    eval_tokens: int | None = 65536
    """Held-out tokens to measure the loss on."""
    seq_len: int | None = None
    """Tokens of a row; default that of the run, or at most 512."""
    batch_size: int = 8
    """Rows at a time."""
    ema: bool = False
    """Take the average of the weights that the run kept."""
    overwrite: bool = False
    """Replace what this command wrote to `out` before."""

    def __post_init__(self) -> None:
        for name in ("eval_tokens", "seq_len", "batch_size", "calibration_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")


@dataclass(frozen=True)
class Loss:
    """Held-out loss: nats a token and bits a byte."""

    nats: float
    bits_per_byte: float


@dataclass(frozen=True)
class Source:
    """What is to be made smaller, what its run trained it for, and the text to measure it on."""

    model: LM
    tokenizer: Tokenizer
    prefix: np.ndarray
    corpus: Corpus
    calibration: list[Any]
    seq_len: int
    pruned: bool
    qat: QATConfig


def load_source(config: Shrink) -> Source:
    """Reads the model and opens its text.

    Raises:
        UserError: if the model is quantised or has weights that are not finite; if there is no
            text.
    """
    model, tokenizer, prefix = load(config.model, ema=config.ema)
    if any(v.dtype != np.float32 for v in jax.tree.leaves(model)):
        raise UserError(f"model={config.model} is quantised already: give one of float weights")
    if not all(bool(np.isfinite(v).all()) for v in jax.tree.leaves(model)):
        raise UserError(f"model={config.model} has weights that are not finite: train it again")
    pruned, qat = is_pruned_folder(config.model), QATConfig()
    if pruned or is_hf(config.model):
        if config.text is None:
            kind = "pruned" if pruned else "Hugging Face"
            raise UserError(f"text=None: a {kind} model has no text to measure on: --text X")
        data = DataConfig(config.text, tokenizer=str(config.model / TOKENIZER))
        length = min(model.config.max_seq_len, 512)
    else:
        run = load_experiment(config.model)
        length, data, qat = run.seq_len, run.data, run.qat
        if config.text is not None:
            data = replace(data, source=config.text, mixture=())
    corpus, length = open_data(data), config.seq_len or length
    calibration = calibration_batches(
        corpus, config.calibration_tokens, batch_size=config.batch_size, seq_len=length
    )
    return Source(model, tokenizer, prefix, corpus, calibration, length, pruned, qat)


def calibration_batches(
    corpus: Corpus, tokens: int, *, batch_size: int, seq_len: int
) -> list[dict[str, np.ndarray]]:
    """The first training batches that hold so many tokens."""
    batches = train_batches(corpus, batch_size=batch_size, seq_len=seq_len, seed=0)
    return [next(batches) for _ in range(math.ceil(tokens / (batch_size * seq_len)))]


def held_out(source: Source, model: LM, config: Shrink) -> Loss:
    """Mean loss of a model on the held-out text."""
    batches = valid_batches(
        source.corpus,
        batch_size=config.batch_size,
        seq_len=source.seq_len,
        max_tokens=config.eval_tokens,
    )
    sums = np.sum([jax.device_get(_score(model, batch)) for batch in batches], axis=0, dtype=float)
    nats = float(sums[0] / sums[1])
    return Loss(nats, bits_per_byte(nats, source.corpus.bytes_per_token))


@jax.jit
def _score(model: LM, batch: Any) -> tuple[jax.Array, jax.Array]:
    total, weight, _ = next_token_loss(model, batch)
    return total, weight


def loss_rows(before: Loss, after: Loss) -> dict[str, str]:
    """Rows of a report: what it has cost."""
    return {
        "loss": f"{before.nats:.4f} -> {after.nats:.4f} nats a token "
        f"({after.nats - before.nats:+.4f}, {100 * (after.nats / before.nats - 1):+.2f} %)",
        "bits a byte": f"{before.bits_per_byte:.4f} -> {after.bits_per_byte:.4f}",
    }


def worst_layers(errors: dict[str, float]) -> str:
    """The mean of the errors and the three largest."""
    if not errors:
        return "not compared: layers of this model repeat"
    ranked = sorted(errors.items(), key=lambda item: -item[1])
    worst = ", ".join(f"{name} {100 * error:.2f} %" for name, error in ranked[:3])
    mean = sum(errors.values()) / len(errors)
    return f"outputs {100 * mean:.2f} % off on average; most: {worst}"
