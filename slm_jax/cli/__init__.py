"""The `slm` command, and `run`, by which experiments get the same command line.

    slm train [PRESET] [options]      train a language model, or a reasoner on puzzles
    slm generate FOLDER [options]     continue prompts with a trained model
    slm solve FOLDER --puzzle TEXT    solve a puzzle with a trained reasoner, step by step
    slm evaluate FOLDER [options]     perplexity on texts, score on questions
    slm quantize FOLDER --out FOLDER  store a trained model in a few bits a weight
    slm prune FOLDER --out FOLDER     leave out weights or whole units of a trained model
    slm export FOLDER OUT [options]   write a trained model for llama.cpp, transformers or jax
    slm import FILE OUT [options]     read a .gguf file or a Hugging Face folder
    slm presets [--json]              sizes and costs of the named models
    slm flops [PRESET] [options]      where the operations of a model go
    slm plan [PRESET] --on SLICE      memory and time on TPUs that are not there
    slm launch [PRESET] --on SLICE    start a run on every host of a slice
    slm scaling COMMAND [options]     plan, train and fit scaling laws

Exit codes: 0 done, 2 a mistake in what was asked for (one line on stderr), 42 told to stop and
saved, 43 a step hung (--loop.hang-limit): the same command goes on, 44 training diverged, 130
interrupted. `SLM_TRACEBACK=1` shows where a mistake was found.
"""

import keyword
import sys
from collections.abc import Sequence
from importlib import import_module

from slm_jax import __version__
from slm_jax.cli.script import guarded, parse, run
from slm_jax.errors import UserError

# A command's module defines `command(args)`; imported when it is called, for a quick `--help`.
COMMANDS = (
    "train",
    "generate",
    "solve",
    "evaluate",
    "quantize",
    "prune",
    "export",
    "import",
    "presets",
    "flops",
    "plan",
    "launch",
    "scaling",
)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the `slm` command.

    Args:
        args: words after `slm`; default those of the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if args is None else args)
    return guarded(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> None:
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(__doc__ and __doc__.partition("\n\n")[2].strip("\n"))
        print("\n`slm COMMAND --help` lists the options of a command.")
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        module = f"{name}_" if keyword.iskeyword(name) else name
        import_module(f"slm_jax.cli.{module}").command(words[1:])
    else:
        raise UserError(f"command={name!r} does not exist: choose from {', '.join(COMMANDS)}")


__all__ = ["main", "parse", "run"]
