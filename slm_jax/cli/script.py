"""A frozen dataclass as a command line, with one way of reporting mistakes."""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro

from slm_jax.cli.host import keep_freed_memory
from slm_jax.errors import UserError
from slm_jax.exit_codes import DIVERGED, MISTAKE, PREEMPTED

# Exit codes by which all processes of a job end at the same step, of themselves.
_ALL_AT_ONCE = (0, PREEMPTED, DIVERGED)


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
        The exit code: 0, or one of `exit_codes`; a `UserError` is printed as one line. With
        several processes an error ends this one here and now, and the others with it.
    """
    keep_freed_memory()

    def program() -> None:
        config = parse(cls, default, description=description, args=args)
        together(lambda: main(config))

    return guarded(program)


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
    except BaseException as error:
        code = _explain(error)
        if code is None:
            raise
        return code
    return 0


def together(program: Callable[[], object]) -> None:
    """Runs `program` in this process as one of those that a launcher started, if it did.

    They start together, before any device is used, and end together: with one error all of them
    end, with its exit code. A process alone just runs the program.

    Raises:
        UserError: if not all processes came.
    """
    # Late: not everything that reads a command line needs jax.
    from slm_jax.parallel import distributed

    distributed.join()
    if not distributed.joined():
        program()
        return
    try:
        program()
    except BaseException as error:
        code = _explain(error, f"process {distributed.index()}: ")
        if code in _ALL_AT_ONCE:  # a checkpoint may still be on its way to the disk
            distributed.leave()
            raise SystemExit(code) from error
        if code is None:
            traceback.print_exception(error)
        distributed.fail(str(error) or type(error).__name__, 1 if code is None else code)
    distributed.leave()


def _explain(error: BaseException, who: str = "") -> int | None:
    """The exit code of what ended a program, after one line on stderr; `None` for a bug."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        print(f"{who}interrupted", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):
        # The reader of a pipe has left (`slm presets | head`). Python flushes stdout again on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, UserError) and os.environ.get("SLM_TRACEBACK") != "1":
        print(f"error: {who}" + " ".join(str(error).split()), file=sys.stderr)
        # Late: who gets here may not have needed the trainer, and it is slow to import.
        from slm_jax.train.loop import DivergedError

        return DIVERGED if isinstance(error, DivergedError) else MISTAKE
    return None


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
