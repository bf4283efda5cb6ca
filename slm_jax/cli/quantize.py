"""`slm quantize`: a trained model in a few bits, with what it saves and what it costs."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import jax

from slm_jax.cli.load import end_ids
from slm_jax.cli.script import parse
from slm_jax.cli.show import console, facts, nbytes
from slm_jax.cli.shrink import (
    Loss,
    Shrink,
    Source,
    held_out,
    load_source,
    loss_rows,
    worst_layers,
)
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
from slm_jax.compress.io import WEIGHTS, check_out, save_quantised
from slm_jax.compress.qat import QATConfig
from slm_jax.compress.quantise import Size, vocab_spec
from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.train.experiment import load_learned
from slm_jax.train.serialize import to_json


@dataclass(frozen=True)
class Quantize(Shrink):
    """Stores a trained model in a few bits a weight and measures what that costs.

    What `slm prune` set to zero stays zero and takes a bit a weight in the file.
    """

    spec: str | None = None
    """w8, w4, w3 or nf4; a8 after it multiplies integers (w8a8), gN gives every N inputs a scale of
    their own (w4g32, w3g32, nf4g64). Default w8, or what the run was trained for (`--qat.spec`),
    with the codes that it has learned."""
    vocab: str | None = None
    """Format of embedding and head; default that of `spec`, and w8 where that has fewer bits."""
    method: Literal["rtn", "smoothquant", "gptq", "awq"] = "rtn"
    """How codes are chosen: the nearest ones; those after moving outliers of the activations into
    the weights; those that keep the outputs; those after scaling up the channels that matter."""
    strength: float = 0.5
    """How much of the activations' outliers smoothquant moves, from 0 to 1 (the paper's alpha)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength != 0.5 and self.method != "smoothquant":
            raise UserError(
                f"strength={self.strength} with method={self.method}: it is smoothquant's: leave "
                "it out"
            )


def command(args: Sequence[str]) -> None:
    """Quantises, measures, writes and reports."""
    config = parse(Quantize, args=args, prog="slm quantize")
    check_out(config.out, overwrite=config.overwrite)
    source = load_source(config)
    spec, vocab = _formats(config, source.qat)
    method = "qat" if source.qat.on else config.method
    model = source.model
    before = held_out(source, model, config)
    start = time.perf_counter()
    plain, quantised = jax.block_until_ready(_quantised(config, source, spec, vocab))
    seconds = time.perf_counter() - start
    after = held_out(source, quantised, config)
    repeats = model.config.recursion is not None  # `layer_errors` does not follow them
    errors = {} if repeats else layer_errors(plain, quantised, source.calibration[:1])
    result = {
        "method": method,
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
        keep=source.qat.keep,
        tokenizer=source.tokenizer.to_json(),
        facts=result,
        sparse=source.pruned,
        overwrite=config.overwrite,
    )
    full, small = size(model), size(quantised)
    how = f"{spec.name}, embedding and head {vocab.name}, by {method}"
    _report(config, how, full, small, source.pruned, before, after, errors, seconds)


def _formats(config: Quantize, qat: QATConfig) -> tuple[QuantSpec, QuantSpec]:
    """Of the layers, and of embedding and head."""
    if not qat.on:
        spec = parse_spec(config.spec or "w8")
        return spec, vocab_spec(spec) if config.vocab is None else parse_spec(config.vocab)
    for name in ("spec", "vocab", "method"):
        value = getattr(config, name)
        if value not in (None, "rtn"):
            raise UserError(
                f"{name}={value}: the run in {config.model} was trained for {qat.formats[0].name} "
                "and has learned its codes: leave it out"
            )
    return qat.formats


def _quantised(
    config: Quantize, source: Source, spec: QuantSpec, vocab: QuantSpec
) -> tuple[LM, LM]:
    """The float model that was rounded, and the rounded one."""
    model, method = source.model, config.method
    if source.qat.on:
        return model, load_learned(config.model, ema=config.ema)[0]
    if method == "gptq":
        small = quantise_gptq(
            model, source.calibration, spec, vocab=vocab, keep_zeros=source.pruned
        )
        return model, small
    if method == "smoothquant":
        model = smoothed(model, source.calibration, strength=config.strength)
    elif method == "awq":
        model = activation_aware(model, source.calibration, spec)
    return model, quantise(model, spec, vocab=vocab)


def _report(
    config: Quantize,
    how: str,
    full: Size,
    small: Size,
    pruned: bool,
    before: Loss,
    after: Loss,
    errors: dict[str, float],
    seconds: float,
) -> None:
    bfloat16 = full.nbytes / 2
    on_disk = (config.out / WEIGHTS).stat().st_size
    rows = {
        "model": str(config.model),
        "format": how,
        "size": f"{nbytes(small.nbytes)}: {small.nbytes / full.nbytes:.3f} x its float32 weights "
        f"({nbytes(full.nbytes)}), {small.nbytes / bfloat16:.3f} x bfloat16 ({nbytes(bfloat16)})",
        "bits per weight": f"{small.bits_per_weight:.2f} of {small.parameters:,} parameters; "
        f"{small.bits_per_coded:.2f} of the {small.coded:,} in codes, scales included",
        "on disk": f"{nbytes(on_disk)}, {8 * on_disk / small.parameters:.2f} bits a parameter"
        + (": pruned weights take a bit each" if pruned else ""),
        **loss_rows(before, after),
        "layers": worst_layers(errors),
        "time": f"{seconds:.1f} s to quantise",
        "out": str(config.out),
    }
    console().print(facts(rows))
