"""`slm prune`: a trained model with weights or whole units left out, and what that costs."""

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
    held_out,
    load_source,
    loss_rows,
    worst_layers,
)
from slm_jax.compress import (
    layer_errors,
    parse_sparsity,
    prune,
    prune_units,
    size,
)
from slm_jax.compress.calibrate import block_errors
from slm_jax.compress.io import PRUNED, WEIGHTS, as_stored, check_out, save_pruned
from slm_jax.compress.sparse import zero_share
from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.train.serialize import to_json


@dataclass(frozen=True)
class Prune(Shrink):
    """Sets weights of a trained model to zero, or takes out whole units, and measures the cost.

    Embedding, head and routers stay. `slm quantize` takes the folder and keeps the zeros.
    """

    method: Literal["magnitude", "wanda", "sparsegpt", "structured"] = "wanda"
    """Which go: the smallest weights; those of the smallest weight times activation in each row;
    those whose loss the others can make up for best, which then do; whole hidden units, groups of
    heads and channels of scans, which leaves a smaller dense model."""
    sparsity: str = "0.5"
    """Share of the weights of each matrix (of the units with structured), or n:m as in 2:4."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the matrices in the file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "structured" and parse_sparsity(self.sparsity).pattern is not None:
            raise UserError(
                f"sparsity={self.sparsity} with method=structured: units have no pattern: give a "
                "share as in 0.5"
            )


def command(args: Sequence[str]) -> None:
    """Prunes, measures, writes and reports."""
    config = parse(Prune, args=args, prog="slm prune")
    sparsity = parse_sparsity(config.sparsity)
    check_out(config.out, overwrite=config.overwrite, manifest=PRUNED)
    source = load_source(config)
    model = source.model
    before = held_out(source, model, config)
    start = time.perf_counter()
    if config.method == "structured":
        pruned, _ = prune_units(model, source.calibration, sparsity.share)
    else:
        pruned = prune(model, source.calibration, sparsity, method=config.method)
    pruned = jax.block_until_ready(as_stored(pruned, config.dtype))
    seconds = time.perf_counter() - start
    after = held_out(source, pruned, config)
    compare = block_errors if config.method == "structured" else layer_errors
    repeats = model.config.recursion is not None  # neither follows them
    errors = {} if repeats else compare(model, pruned, source.calibration[:1])
    save_pruned(
        pruned,
        config.out,
        config=to_json(pruned.config),
        dtype=config.dtype,
        tokenizer=source.tokenizer.to_json(),
        facts={
            "method": config.method,
            "sparsity": sparsity.name,
            "zeros": zero_share(pruned),
            "parameters": size(pruned).parameters,
            "float32_bytes": size(model).nbytes,
            "loss_before": asdict(before),
            "loss_after": asdict(after),
            "layer_errors": errors,
            "seconds": seconds,
            "prefix": source.prefix.tolist(),
            "eos_ids": end_ids(config.model, source.tokenizer),
        },
        overwrite=config.overwrite,
    )
    _report(config, model, pruned, before, after, errors, seconds)


def _report(
    config: Prune,
    model: LM,
    pruned: LM,
    before: Loss,
    after: Loss,
    errors: dict[str, float],
    seconds: float,
) -> None:
    full, small = size(model), size(pruned)
    on_disk = (config.out / WEIGHTS).stat().st_size
    bfloat16 = full.nbytes / 2
    zeros = f"{100 * zero_share(pruned):.1f} % of the layers' matrices are zero"
    form = f"a bit for every weight of a matrix with zeros, and {config.dtype} for the others"
    if config.method == "structured":
        zeros = f"{small.parameters:,} of {full.parameters:,} parameters remain, dense"
        form = f"matrices in {config.dtype}"
    rows = {
        "model": str(config.model),
        "sparsity": f"{zeros}; {config.sparsity} by {config.method}",
        "on disk": f"{nbytes(on_disk)}: {on_disk / full.nbytes:.3f} x its float32 weights "
        f"({nbytes(full.nbytes)}), {on_disk / bfloat16:.3f} x bfloat16 ({nbytes(bfloat16)}); "
        + form,
        "in memory": f"{nbytes(small.nbytes)}"
        + ("" if config.method == "structured" else ": zeros take as much as other weights"),
        **loss_rows(before, after),
        "layers": worst_layers(errors),
        "time": f"{seconds:.1f} s to prune",
        "out": str(config.out),
    }
    console().print(facts(rows))
