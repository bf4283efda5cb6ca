"""One cell of `compress_models`: a model quantised, pruned or both, weighed and measured."""

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.cli.shrink import calibration_batches
from slm_jax.compress import (
    activation_aware,
    parse_spec,
    prune,
    prune_units,
    quantise,
    quantise_gptq,
    size,
    smoothed,
)
from slm_jax.compress.io import as_stored, write_weights
from slm_jax.compress.prune import Sparsity
from slm_jax.compress.sparse import zero_share
from slm_jax.compress.spec import QuantSpec
from slm_jax.data import Corpus, valid_batches
from slm_jax.errors import UserError, named
from slm_jax.models.lm import LM
from slm_jax.models.loss import cross_entropy

FLOAT = "bfloat16"
"""What weights without a code are stored in."""


@dataclass(frozen=True)
class Cell:
    """How a model is made smaller; with neither it is the dense one in bfloat16.

    Attributes:
        quantiser: a name of `QUANTISERS`, or `None`.
        spec: the format, or `None`.
        pruner: a name of `PRUNERS`, or `None`.
        sparsity: the share that goes.
    """

    quantiser: str | None = None
    spec: str | None = None
    pruner: str | None = None
    sparsity: float = 0.0

    @property
    def name(self) -> str:
        """As in `wanda-0.5+gptq-w4g32`."""
        parts = []
        if self.pruner is not None:
            parts.append(f"{self.pruner}-{self.sparsity:g}")
        if self.quantiser is not None:
            parts.append(f"{self.quantiser}-{self.spec}")
        return "+".join(parts) or "dense"

    @property
    def family(self) -> str:
        """The methods without their levels: `wanda + gptq`."""
        return " + ".join(part for part in (self.pruner, self.quantiser) if part) or "dense"

    @property
    def alone(self) -> tuple["Cell", "Cell"]:
        """The corners of the factorial: quantised alone, pruned alone."""
        return Cell(self.quantiser, self.spec), Cell(pruner=self.pruner, sparsity=self.sparsity)

    @property
    def both(self) -> bool:
        """Whether it is quantised and pruned."""
        return self.quantiser is not None and self.pruner is not None


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained model, its text, and how much of it is read.

    Attributes:
        name: of the model.
        model: of float32 weights.
        corpus: its training part calibrates, its held-out part measures.
        eval_tokens: held-out tokens.
        calibration_tokens: training tokens.
        seq_len: tokens of a window.
        batch_size: windows at a time.
        pruned: the models that `measure` pruned last, by pruner and sparsity: cells of the same
            pruning follow each other.
    """

    name: str
    model: LM
    corpus: Corpus
    eval_tokens: int
    calibration_tokens: int
    seq_len: int
    batch_size: int
    pruned: dict[tuple[str, float], tuple[LM, float]] = field(default_factory=dict)

    @functools.cached_property
    def calibration(self) -> list[dict[str, np.ndarray]]:
        """Batches of training text."""
        return calibration_batches(
            self.corpus,
            self.calibration_tokens,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
        )


def _gptq(model: LM, of: Subject, spec: QuantSpec, pruned: bool) -> LM:
    return quantise_gptq(model, of.calibration, spec, vocab=VOCAB, keep_zeros=pruned)


def _awq(model: LM, of: Subject, spec: QuantSpec, pruned: bool) -> LM:
    return quantise(activation_aware(model, of.calibration, spec), spec, vocab=VOCAB)


def _smoothquant(model: LM, of: Subject, spec: QuantSpec, pruned: bool) -> LM:
    return quantise(smoothed(model, of.calibration), spec, vocab=VOCAB)


def _rtn(model: LM, of: Subject, spec: QuantSpec, pruned: bool) -> LM:
    return quantise(model, spec, vocab=VOCAB)


VOCAB = parse_spec("w8")
"""Of embedding and head of every quantised model."""

QUANTISERS: dict[str, Callable[[LM, Subject, QuantSpec, bool], LM]] = {
    "rtn": _rtn,
    "gptq": _gptq,
    "awq": _awq,
    "rtn-a8": _rtn,
    "smoothquant": _smoothquant,
}
ROUND_ACTIVATIONS = ("rtn-a8", "smoothquant")
PRUNERS = ("magnitude", "wanda", "sparsegpt", "structured")


def cells_of(
    *,
    quantisers: Sequence[str],
    pruners: Sequence[str],
    sparsities: Sequence[float],
    bits: Sequence[int],
    group: int,
    both: tuple[Sequence[str], Sequence[str], Sequence[float]],
) -> list[Cell]:
    """All cells, each once: those of one pruning follow each other, corners before combinations.

    Args:
        quantisers: names of `QUANTISERS`.
        pruners: names of `PRUNERS`.
        sparsities: of the pruners.
        bits: of the quantisers, here and in the factorial.
        group: see `Compression`.
        both: quantisers, pruners and sparsities of the factorial.

    Raises:
        UserError: for an unknown name or number of bits.
    """
    for name in (*quantisers, *both[0]):
        named("quantisers", name, QUANTISERS)
    for name in (*pruners, *both[1]):
        named("pruners", name, dict.fromkeys(PRUNERS))

    def spec(name: str, n: int) -> str:
        if n not in (8, 4, 3):
            raise UserError(f"bits={n} has no format: choose from 8, 4, 3")
        if name in ROUND_ACTIVATIONS:
            return f"w{n}a8"
        return f"w{n}" if n == 8 else f"w{n}g{group}"

    alone = [Cell(q, spec(q, n)) for q in dict.fromkeys((*quantisers, *both[0])) for n in bits]
    pruned = [Cell(pruner=p, sparsity=s) for p in pruners for s in sparsities]
    pruned += [Cell(pruner=p, sparsity=s) for p in both[1] for s in both[2]]
    out = [Cell(), *alone]
    for one in dict.fromkeys(pruned):
        out.append(one)
        if one.pruner in both[1] and one.sparsity in both[2]:
            out += [Cell(q, spec(q, n), one.pruner, one.sparsity) for q in both[0] for n in bits]
    return out


def measure(of: Subject, cell: Cell) -> dict[str, Any]:
    """Makes the model of a cell, writes it to a file, and measures it.

    Returns:
        JSON: `losses`, mean nats a token of every held-out window, and their `weights` in tokens;
        `bytes` of the file; `parameters`; `zeros`, their share in the layers' matrices after
        pruning; `seconds` of quantising and pruning.
    """
    model, seconds = of.model, 0.0
    if cell.pruner is not None:
        model, seconds = _pruned(of, cell.pruner, cell.sparsity)
    zeros = zero_share(model)
    if cell.quantiser is not None and cell.spec is not None:
        start = time.perf_counter()
        make = QUANTISERS[cell.quantiser]
        made = make(model, of, parse_spec(cell.spec), cell.pruner is not None)
        model = jax.block_until_ready(made)
        seconds += time.perf_counter() - start
    model = as_stored(model, FLOAT)
    losses, weights = window_losses(of, model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        write_weights(model, file, sparse=True, dtype=FLOAT)
        nbytes = file.stat().st_size
    return {
        "losses": losses.tolist(),
        "weights": weights.tolist(),
        "bytes": nbytes,
        "parameters": size(model).parameters,
        "zeros": zeros,
        "seconds": seconds,
    }


def _pruned(of: Subject, pruner: str, sparsity: float) -> tuple[LM, float]:
    """The pruned model, and the seconds it took."""
    if (pruner, sparsity) not in of.pruned:
        of.pruned.clear()
        start = time.perf_counter()
        if pruner == "structured":
            model, _ = prune_units(of.model, of.calibration, sparsity)
        else:
            model = prune(of.model, of.calibration, Sparsity(sparsity), method=pruner)  # type: ignore[arg-type]
        model = jax.block_until_ready(model)
        of.pruned[pruner, sparsity] = model, time.perf_counter() - start
    return of.pruned[pruner, sparsity]


def window_losses(of: Subject, model: LM) -> tuple[np.ndarray, np.ndarray]:
    """Mean nats a token of every held-out window that has tokens, and how many it has."""
    batches = valid_batches(
        of.corpus, batch_size=of.batch_size, seq_len=of.seq_len, max_tokens=of.eval_tokens
    )
    parts = [jax.device_get(_score(model, batch)) for batch in batches]
    sums, weights = (np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))
    there = weights > 0
    return sums[there] / weights[there], weights[there]


@jax.jit
def _score(model: LM, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses and of the weights of every row."""
    logits, _, _ = model(
        batch["tokens"], positions=batch.get("positions"), segments=batch.get("segments")
    )
    nats = cross_entropy(logits, batch["targets"]) * batch["weights"]
    return jnp.sum(nats, axis=1), jnp.sum(batch["weights"], axis=1)
