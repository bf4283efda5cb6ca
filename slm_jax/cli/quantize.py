"""`slm quantize`: a trained model in a few bits, with what it saves and what it costs."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from slm_jax.cli.load import end_ids, is_hf, load
from slm_jax.cli.script import parse
from slm_jax.cli.show import console, facts, nbytes
from slm_jax.compress import (
    QuantSpec,
    activation_aware,
    layer_errors,
    parse_spec,
    quantise,
    quantise_gptq,
    size,
    smoothed,
)
from slm_jax.compress.io import TOKENIZER, check_out, save_quantised
from slm_jax.compress.quantise import KEEP, Size, vocab_spec
from slm_jax.data import Corpus, DataConfig, Tokenizer, open_data, train_batches, valid_batches
from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.models.loss import next_token_loss
from slm_jax.train.experiment import load_experiment
from slm_jax.train.metrics import bits_per_byte
from slm_jax.train.serialize import to_json


@dataclass(frozen=True)
class Quantize:
    """Stores a trained model in a few bits a weight and measures what that costs."""

    model: tyro.conf.Positional[Path]
    """Folder of a training run, or of a Hugging Face model with its tokenizer.json."""
    out: Path
    """Folder to write; `slm generate` continues texts with it."""
    spec: str = "w8"
    """w8, w4 or nf4; a8 after it multiplies integers (w8a8), gN gives every N inputs a scale of
    their own (w4g32, nf4g64)."""
    vocab: str | None = None
    """Format of embedding and head; default that of `spec`, and w8 where that has 4 bits."""
    method: Literal["rtn", "smoothquant", "gptq", "awq"] = "rtn"
    """How codes are chosen: the nearest ones; those after moving outliers of the activations into
    the weights; those that keep the outputs; those after scaling up the channels that matter."""
    strength: float = 0.5
    """How much of the activations' outliers smoothquant moves, from 0 to 1 (the paper's alpha)."""
    text: str | None = None
    """Text for loss and calibration, as in `slm train --data.source`; default the run's own."""
    calibration_tokens: int = 16384
    """Training tokens that smoothquant, gptq, awq and the report of the layers look at."""
    eval_tokens: int | None = 65536
    """Held-out tokens to measure the loss on."""
    seq_len: int | None = None
    """Tokens of a row; default that of the run, or at most 512."""
    batch_size: int = 8
    """Rows at a time."""
    ema: bool = False
    """Take the average of the weights that the run kept."""
    overwrite: bool = False
    """Replace a quantised model in `out`."""

    def __post_init__(self) -> None:
        if self.strength != 0.5 and self.method != "smoothquant":
            raise UserError(
                f"strength={self.strength} with method={self.method}: it is smoothquant's: leave "
                "it out"
            )
        for name in ("eval_tokens", "seq_len", "batch_size", "calibration_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")


@dataclass(frozen=True)
class Loss:
    """Held-out loss: nats a token and bits a byte."""

    nats: float
    bits_per_byte: float


def command(args: Sequence[str]) -> None:
    """Quantises, measures, writes and reports."""
    config = parse(Quantize, args=args, prog="slm quantize")
    spec = parse_spec(config.spec)
    vocab = vocab_spec(spec) if config.vocab is None else parse_spec(config.vocab)
    check_out(config.out, overwrite=config.overwrite)
    source = _load(config)
    model = source.model
    before = held_out(model, source.corpus, config, source.seq_len)
    start = time.perf_counter()
    plain, quantised = jax.block_until_ready(_quantised(config, source, spec, vocab))
    seconds = time.perf_counter() - start
    after = held_out(quantised, source.corpus, config, source.seq_len)
    repeats = model.config.recursion is not None  # `layer_errors` does not follow them
    errors = {} if repeats else layer_errors(plain, quantised, source.calibration[:1])
    result = {
        "method": config.method,
        "float32_bytes": size(model).nbytes,
        "size": asdict(size(quantised)),
        "loss_before": asdict(before),
        "loss_after": asdict(after),
        "layer_errors": errors,
        "seconds": seconds,
        "prefix": source.prefix.tolist(),
        "eos_ids": end_ids(config.model, source.tokenizer),
    }
    save_quantised(
        quantised,
        config.out,
        config=to_json(model.config),
        spec=spec,
        vocab=vocab,
        keep=KEEP,
        tokenizer=source.tokenizer.to_json(),
        facts=result,
        overwrite=config.overwrite,
    )
    _report(config, vocab, size(model), size(quantised), before, after, errors, seconds)


def _quantised(
    config: Quantize, source: "Source", spec: QuantSpec, vocab: QuantSpec
) -> tuple[LM, LM]:
    """The float model that was rounded, and the rounded one."""
    model, method = source.model, config.method
    if method == "gptq":
        return model, quantise_gptq(model, source.calibration, spec, vocab=vocab)
    if method == "smoothquant":
        model = smoothed(model, source.calibration, strength=config.strength)
    elif method == "awq":
        model = activation_aware(model, source.calibration, spec)
    return model, quantise(model, spec, vocab=vocab)


@dataclass(frozen=True)
class Source:
    """What is to be quantised, and the text to measure it on."""

    model: LM
    tokenizer: Tokenizer
    prefix: np.ndarray
    corpus: Corpus
    calibration: list[Any]
    seq_len: int


def _load(config: Quantize) -> Source:
    model, tokenizer, prefix = load(config.model, ema=config.ema)
    if any(v.dtype != np.float32 for v in jax.tree.leaves(model)):
        raise UserError(f"model={config.model} is quantised already: give one of float weights")
    if not all(bool(np.isfinite(v).all()) for v in jax.tree.leaves(model)):
        raise UserError(f"model={config.model} has weights that are not finite: train it again")
    if is_hf(config.model):
        if config.text is None:
            raise UserError("text=None: a Hugging Face model has no text to measure on: --text X")
        data = DataConfig(config.text, tokenizer=str(config.model / TOKENIZER))
        length = min(model.config.max_seq_len, 512)
    else:
        run = load_experiment(config.model)
        length = run.seq_len
        data = run.data
        if config.text is not None:
            data = replace(data, source=config.text, mixture=())
    corpus, length = open_data(data), config.seq_len or length
    batches = train_batches(corpus, batch_size=config.batch_size, seq_len=length, seed=0)
    n_batches = math.ceil(config.calibration_tokens / (config.batch_size * length))
    calibration = [next(batches) for _ in range(n_batches)]
    return Source(model, tokenizer, prefix, corpus, calibration, length)


def held_out(model: LM, corpus: Corpus, config: Quantize, seq_len: int) -> Loss:
    """Mean loss on the held-out text."""
    batches = valid_batches(
        corpus, batch_size=config.batch_size, seq_len=seq_len, max_tokens=config.eval_tokens
    )
    sums = np.sum([jax.device_get(_score(model, batch)) for batch in batches], axis=0, dtype=float)
    nats = float(sums[0] / sums[1])
    return Loss(nats, bits_per_byte(nats, corpus.bytes_per_token))


@jax.jit
def _score(model: LM, batch: Any) -> tuple[jax.Array, jax.Array]:
    total, weight, _ = next_token_loss(model, batch)
    return total, weight


def _report(
    config: Quantize,
    vocab: QuantSpec,
    full: Size,
    small: Size,
    before: Loss,
    after: Loss,
    errors: dict[str, float],
    seconds: float,
) -> None:
    bfloat16 = full.nbytes / 2
    rows = {
        "model": str(config.model),
        "format": f"{config.spec}, embedding and head {vocab.name}, by {config.method}",
        "size": f"{nbytes(small.nbytes)}: {small.nbytes / full.nbytes:.3f} x its float32 weights "
        f"({nbytes(full.nbytes)}), {small.nbytes / bfloat16:.3f} x bfloat16 ({nbytes(bfloat16)})",
        "bits per weight": f"{small.bits_per_weight:.2f} of {small.parameters:,} parameters; "
        f"{small.bits_per_coded:.2f} of the {small.coded:,} in codes, scales included",
        "loss": f"{before.nats:.4f} -> {after.nats:.4f} nats a token "
        f"({after.nats - before.nats:+.4f}, {100 * (after.nats / before.nats - 1):+.2f} %)",
        "bits a byte": f"{before.bits_per_byte:.4f} -> {after.bits_per_byte:.4f}",
        "layers": _worst(errors),
        "time": f"{seconds:.1f} s to quantise",
        "out": str(config.out),
    }
    console().print(facts(rows))


def _worst(errors: dict[str, float]) -> str:
    if not errors:
        return "not compared: layers of this model repeat"
    ranked = sorted(errors.items(), key=lambda item: -item[1])
    worst = ", ".join(f"{name} {100 * error:.2f} %" for name, error in ranked[:3])
    mean = sum(errors.values()) / len(errors)
    return f"outputs {100 * mean:.2f} % off on average; most: {worst}"
