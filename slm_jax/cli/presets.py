"""`slm presets`: what the named models cost."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from slm_jax.cli.script import parse
from slm_jax.cli.show import console, count, nbytes
from slm_jax.models.lm import LMConfig
from slm_jax.models.presets import PRESETS, state_bytes, summary

LONGEST_ROW = 2048
"""FLOPs are given at the model's context or at this, whichever is less: presets stay comparable."""

STATE_LENGTHS = (1024, 32_768)


@dataclass(frozen=True)
class Presets:
    """Sizes and costs of the named models, from their configurations alone."""

    json: bool = False
    """Print JSON, one object a preset, numbers in full."""


def command(args: Sequence[str]) -> None:
    """Prints the table or the JSON."""
    config = parse(Presets, args=args, prog="slm presets")
    rows = {name: row(model) for name, model in PRESETS.items()}
    if config.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(
        caption=f"FLOPs: causal, without recomputation, at the context or {LONGEST_ROW} tokens if "
        "that is less. Bytes: of one row, in the model's compute dtype; the last at 32k with keys "
        "and values in int8; 1k is 1024 tokens.",
        caption_justify="left",
    )
    table.add_column("preset")
    for heading in (
        "parameters", "active", "non-\nembedding", "context", "training\nFLOPs/token",
        "KV/token", "state\nat 1k", "\nat 32k", "\nint8",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for name, values in rows.items():
        table.add_row(
            name,
            *(count(values[k]) for k in ("total", "active", "non_embedding")),
            f"{values['context']:,}",
            count(values["training_flops"]),
            nbytes(values["kv_bytes_per_token"]),
            *(nbytes(values[f"state_bytes_{n}"]) for n in STATE_LENGTHS),
            nbytes(values[f"state_bytes_int8_{STATE_LENGTHS[-1]}"]),
        )
    console().print(table)


def row(model: LMConfig) -> dict[str, Any]:
    """The numbers of one preset: `ModelSummary`, the context, and `state_bytes_<length>`.

    `state_bytes_int8_<length>` is the same with an int8 KV cache.
    """
    sizes = asdict(summary(model, min(model.max_seq_len, LONGEST_ROW)))
    states = {f"state_bytes_{n}": state_bytes(model, n) for n in STATE_LENGTHS}
    last = STATE_LENGTHS[-1]
    states[f"state_bytes_int8_{last}"] = state_bytes(model, last, "int8")
    return {"context": model.max_seq_len, "dtype": model.dtype, **sizes, **states}
