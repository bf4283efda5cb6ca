"""`slm train`: one run, from a preset and overrides."""

from collections.abc import Sequence
from pathlib import Path

from slm_jax.cli.host import keep_freed_memory
from slm_jax.cli.model import DEFAULT_PRESET, preset_list, split_preset
from slm_jax.cli.script import parse
from slm_jax.cli.show import console, count, facts, nbytes
from slm_jax.models.presets import preset, summary
from slm_jax.train.experiment import Experiment, Result, run

DESCRIPTION = f"""Trains a language model: slm train [PRESET] [OPTIONS].

The preset comes first and sets the model, {DEFAULT_PRESET} by default; every option below overrides
one field. The same command resumes a run that was stopped, and shows the result of one that is
done.

Presets: {preset_list()}"""


def command(args: Sequence[str]) -> None:
    """Trains what `args` describe and prints the result."""
    keep_freed_memory()
    name, rest = split_preset(args)
    default = Experiment(model=preset(name), out=Path("runs") / name)
    config = parse(
        Experiment, default, description=DESCRIPTION, args=rest, prog=f"slm train {name}"
    )
    size = summary(config.model, config.seq_len)
    tokens = config.steps * config.batch_size * config.seq_len
    if not config.loop.quiet:
        console().print(
            f"{name}: {count(size.total)} parameters, {count(tokens)} tokens in {config.steps} "
            f"steps, {config.out}",
            highlight=False,
        )
    _show(run(config))


def _show(result: Result) -> None:
    rows = {
        "held-out loss": f"{result.valid_loss:.4f} nats a token",
        "": f"{result.valid_bits_per_byte:.4f} bits a byte",
    }
    if result.valid_loss_ema is not None:
        rows["averaged weights"] = f"{result.valid_loss_ema:.4f} nats a token"
    rows["speed"] = f"{result.tokens_per_second:,.0f} tokens/s, median"
    rows["compilation"] = f"{result.compile_seconds:.1f} s"
    rows["memory of a step"] = f"{nbytes(result.memory_bytes)} a device"
    rows["continue a text"] = f"slm generate {result.out} --prompt ..."
    console().print(facts(rows))
