"""A frozen dataclass as a command line, with one way of reporting mistakes."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro

from slm_jax.cli.host import keep_freed_memory
from slm_jax.errors import UserError

DIVERGED = 44
"""Exit code of a run whose loss is no longer finite, for a launcher that must not repeat it."""


def run[T](
    main: Callable[[T], object],
    cls: type[T],
    default: T | None = None,
    *,
    description: str | None = None,
    args: Sequence[str] | None = None,
) -> int:
    """Calls `main` with the configuration that the command line gives.

        if __name__ == "__main__":
            sys.exit(cli.run(main, Config, description=__doc__))

    Args:
        main: the program.
        cls: a dataclass.
        default: what holds where the command line says nothing; by default the fields' own.
        description: shown by `--help`; default the docstring of the dataclass.
        args: words after the program's name; default those of the process.

    Returns:
        The exit code: 0, 2 on a `UserError` (printed as one line), 44 on a `DivergedError`.
    """
    keep_freed_memory()
    return guarded(lambda: main(parse(cls, default, description=description, args=args)))


def parse[T](
    cls: type[T],
    default: T | None = None,
    *,
    description: str | None = None,
    args: Sequence[str] | None = None,
    prog: str | None = None,
) -> T:
    """Reads a configuration from the command line: `--schedule.learning-rate 3e-3`.

    Where a field may hold one of several dataclasses, its default's class stays and has options.

    Args:
        cls: a dataclass.
        default: what holds where the command line says nothing; by default the fields' own.
        description: shown by `--help`; default the docstring of the dataclass.
        args: words after the program's name; default those of the process.
        prog: name of the program; default the file that runs.

    Raises:
        UserError: if a dataclass refuses its values.
        SystemExit: with 2 on an unknown option or a value of the wrong type, after saying so on
            stderr; with 0 after `--help`.
    """
    start: Any = tyro.MISSING_NONPROP if default is None else default
    with _refusals_as_raised():
        return tyro.cli(
            cls,
            default=start,
            description=description,
            args=args,
            prog=prog,
            config=(tyro.conf.AvoidSubcommands,),
        )


def guarded(program: Callable[[], object]) -> int:
    """Runs `program` and turns what ends it into an exit code, and mistakes into one line."""
    try:
        program()
        sys.stdout.flush()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has left (`slm presets | head`). Python flushes stdout again on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        if os.environ.get("SLM_TRACEBACK") == "1":
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        # Late: who gets here may not have needed the trainer, and it is slow to import.
        from slm_jax.train.loop import DivergedError

        return DIVERGED if isinstance(error, DivergedError) else 2
    return 0


@contextlib.contextmanager
def _refusals_as_raised() -> Iterator[None]:
    """Raises the `UserError` behind an exit of tyro, which shows a dataclass's refusal as a box."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            yield
    except SystemExit as end:
        cause: BaseException | None = end
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        sys.stderr.write(shown.getvalue())
        raise
    sys.stderr.write(shown.getvalue())
