"""`slm train`: one run, from a preset and overrides."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slm_jax.cli.experiment import PRESET_NAMES, Run, default_run, read_run, take_option
from slm_jax.cli.host import keep_freed_memory
from slm_jax.cli.model import DEFAULT_PRESET, split_preset
from slm_jax.cli.script import together
from slm_jax.cli.show import console, count, facts, nbytes
from slm_jax.models.presets import summary
from slm_jax.models.trm import n_parameters
from slm_jax.slices import Slice, check_hardware, find_slice, prepare_process
from slm_jax.train import experiment, trm_experiment
from slm_jax.train.experiment import Experiment
from slm_jax.train.goodput import describe
from slm_jax.train.trm_experiment import TRMExperiment

DESCRIPTION = f"""Trains a model: slm train [PRESET] [--on SLICE] [OPTIONS].

The preset comes first, {DEFAULT_PRESET} by default. One of a language model sets the model, one of
puzzles the whole run; every option below overrides one field. The same command resumes a run that
was stopped, and shows the result of one that is done. SIGTERM or Ctrl-C saves and exits with 42.

--on names the devices this runs on (tpu-v5e-256, h100-8, cpu-8): mesh, recomputation, microbatches
and the compiler's flags are then those of tpu_configs/, and it ends if jax sees something else.

{PRESET_NAMES}"""


def command(args: Sequence[str]) -> None:
    """Trains what `args` describe and prints the result."""
    keep_freed_memory()
    slice_name, words = take_option(args, "--on")
    where = None if slice_name is None else find_slice(slice_name)
    name, words = split_preset(words)
    start = replace(default_run(name, where), out=Path("runs") / name)
    prog = f"slm train {name}"
    config = read_run(start, name, where, words, description=DESCRIPTION, prog=prog)
    if where is not None:
        prepare_process(where)
    together(lambda: _train(name, config, where))


def _train(name: str, config: Run, where: Slice | None) -> None:
    if where is not None:
        check_hardware(where)
    if isinstance(config, Experiment):
        _train_lm(name, config)
    else:
        _train_trm(name, config)


def _train_lm(name: str, config: Experiment) -> None:
    size = summary(config.model, config.seq_len)
    tokens = config.steps * config.batch_size * config.seq_len
    if not config.loop.quiet:
        console().print(
            f"{name}: {count(size.total)} parameters, {count(tokens)} tokens in {config.steps} "
            f"steps, {config.out}",
            highlight=False,
        )
    result = experiment.run(config)
    rows = {
        "held-out loss": f"{result.valid_loss:.4f} nats a token",
        "": f"{result.valid_bits_per_byte:.4f} bits a byte",
    }
    if result.valid_loss_ema is not None:
        rows["averaged weights"] = f"{result.valid_loss_ema:.4f} nats a token"
    rows["speed"] = f"{result.tokens_per_second:,.0f} tokens/s, median"
    rows |= _costs(result)
    rows["continue a text"] = f"slm generate {result.out} --prompt ..."
    console().print(facts(rows))


def _train_trm(name: str, config: TRMExperiment) -> None:
    if not config.loop.quiet:
        flops = config.steps * trm_experiment.step_flops(config)
        console().print(
            f"{name}: {count(n_parameters(config.model))} parameters, {config.steps:,} steps of "
            f"{config.batch_size} puzzles, {count(flops)}FLOP, {config.out}",
            highlight=False,
        )
    result = trm_experiment.run(config)
    rows = {"supervision steps": f"1 to {len(result.exact)}"}
    for label, exact, cell in (
        ("raw weights", result.exact, result.cell),
        ("averaged weights", result.exact_ema, result.cell_ema),
    ):
        if exact is not None and cell is not None:
            rows[label] = (
                f"{exact[0]:.1%} to {exact[-1]:.1%} of puzzles solved, {cell[0]:.1%} to "
                f"{cell[-1]:.1%} of cells right"
            )
    if result.arc_pass_2 is not None:
        rows["ARC score"] = f"{result.arc_pass_2:.1%}, two attempts"
    rows["speed"] = f"{result.puzzles_per_second:,.0f} puzzles/s, median"
    rows |= _costs(result)
    rows["solve a puzzle"] = f"slm solve {result.out} --puzzle ..."
    console().print(facts(rows))


def _costs(result: experiment.Result | trm_experiment.TRMResult) -> dict[str, str]:
    return {
        "compilation": f"{result.compile_seconds:.1f} s",
        "memory of a step": f"{nbytes(result.memory_bytes)} a device",
        "host": f"{result.host_share:.1%} of a step is spent outside the compiled program",
        "wall time": f"{sum(result.goodput.values()):,.0f} s: {describe(result.goodput)}",
    }
