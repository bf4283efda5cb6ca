"""SIGTERM and Ctrl-C while training: finish the step, save, and end with a code that says so."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from jax.experimental import multihost_utils

from slm_jax.exit_codes import PREEMPTED
from slm_jax.parallel import distributed


class PreemptedError(SystemExit):
    """A run was told to stop and has saved. Ends the program unless it is caught."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class StoppedError(Exception):
    """A signal came inside `StopSignals.interrupts`."""


class StopSignals:
    """Notices SIGTERM and SIGINT; a context manager. A second signal ends the process at once.

    One of several processes stops with the others, at a step that jax chooses for all of them when
    any has got SIGTERM. In a thread that is not the main one, nothing is noticed.
    """

    def __init__(self) -> None:
        self._came: int | None = None
        self._interrupts = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if not distributed.joined() and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._came = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        print(f"{name}: saving after this step; once more ends at once", file=sys.stderr)
        if self._interrupts:
            raise StoppedError

    def requested(self, done: int) -> bool:
        """Whether to save and stop after `done` steps; every process asks after every step."""
        if distributed.joined():
            return bool(multihost_utils.reached_preemption_sync_point(done))
        return self._came is not None

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Where a signal raises `StoppedError` at once: around what is long and may be redone."""
        if self._came is not None:
            raise StoppedError
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False
