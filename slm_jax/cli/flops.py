"""`slm flops`: where the operations of a model go, and how fast a chip could do them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from slm_jax.cli.model import DEFAULT_PRESET, preset_list, split_preset
from slm_jax.cli.script import parse
from slm_jax.cli.show import console, count, facts
from slm_jax.models.flops import PEAK_FLOPS, Accelerator, forward_flops, training_flops
from slm_jax.models.lm import LMConfig
from slm_jax.models.presets import preset, summary
from slm_jax.models.recursion import expected_runs

DESCRIPTION = f"""Operations of a model per token: slm flops [PRESET] [OPTIONS].

The preset comes first, {DEFAULT_PRESET} by default; every option overrides one field.

Presets: {preset_list()}"""


@dataclass(frozen=True)
class Flops:
    """Operations of a model per token."""

    model: LMConfig
    """The language model."""
    seq_len: int | None = None
    """Tokens of a row; default the model's context."""


def command(args: Sequence[str]) -> None:
    """Prints the parts of the forward pass, the training totals and ideal speeds."""
    name, rest = split_preset(args)
    config = parse(
        Flops, Flops(preset(name)), description=DESCRIPTION, args=rest, prog=f"slm flops {name}"
    )
    length = config.model.max_seq_len if config.seq_len is None else config.seq_len
    out = console()
    out.print(_forward(config.model, length, f"{name}: forward pass per token, rows of {length:,}"))
    out.print(_training(config.model, length))
    out.print(_speeds(training_flops(config.model, length, remat="none")))


def _forward(model: LMConfig, length: int, title: str) -> Table:
    causal, full = (forward_flops(model, length, causal=c) for c in (True, False))
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("part", "total")
    for heading, breakdown in (("causal", causal), ("full attention", full)):
        table.add_column(heading, count(breakdown.total), justify="right")
        table.add_column("share", "100.0 %", justify="right")
    for part, flops in asdict(causal).items():
        other = asdict(full)[part]
        if other:
            shares = (f"{100 * f / b.total:.1f} %" for f, b in ((flops, causal), (other, full)))
            table.add_row(
                part.replace("_", " "), count(flops), next(shares), count(other), next(shares)
            )
    return table


def _training(model: LMConfig, length: int) -> Table:
    """Totals of a training step per token, and what the rule of thumb 6 N makes of them."""
    cost = "3 x forward"
    if model.recursion is not None:
        runs = expected_runs(model.recursion)
        cost = (
            f"{runs.forward:.2f} runs of layers {model.recursion.first} to {model.recursion.last} "
            f"on average, {runs.backward:.2f} with gradient"
        )
    sizes = summary(model, length)
    flops = training_flops(model, length, remat="none")
    inactive = sizes.total - sizes.active
    rows = {
        "training": f"{count(flops)} FLOPs per token: {cost}, causal (for MFU)",
        f"with remat={model.remat}": f"{count(training_flops(model, length))} FLOPs per token",
        "full attention": f"{count(training_flops(model, length, 'none', causal=False))} "
        "FLOPs per token",
    }
    for label, n in (
        ("all active parameters", sizes.active),
        ("active, without embedding and head", sizes.non_embedding - inactive),
    ):
        ratio = f"{flops / (6 * n):.3f} x 6 N" if n else "-"
        rows[f"training / 6 N, N = {count(n)}"] = f"{ratio}  ({label})"
    return facts(rows)


def _speeds(flops: float) -> Table:
    """Tokens/s of one chip at its peak and at 40 % of it."""
    names: dict[Accelerator, list[str]] = {}
    for name, chip in PEAK_FLOPS.items():
        names.setdefault(chip, []).append(name)
    table = Table(title="training tokens/s of one chip in bfloat16, causal", title_justify="left")
    table.add_column("chip")
    for heading in ("peak FLOP/s", "100 % MFU", "40 % MFU"):
        table.add_column(heading, justify="right")
    for chip, called in names.items():
        speeds = (f"{share * chip.bf16 / flops:,.0f}" for share in (1.0, 0.4))
        table.add_row(" = ".join(called), count(chip.bf16), *speeds)
    return table
