"""Ends a process whose step never ends: stuck collectives and inputs are silent by themselves."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from slm_jax.exit_codes import HANGING
from slm_jax.parallel import distributed


class Watchdog:
    """A thread that ends the process if `beat` is not called in time; a context manager."""

    def __init__(self, limit: float) -> None:
        """Watches from `__enter__` on.

        Args:
            limit: seconds from one beat to the next; 0 is no limit.
        """
        self._limit = limit
        self._step = 0
        self._beat = time.monotonic()
        self._paused = False
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self._beat = time.monotonic()
        if self._limit:
            threading.Thread(target=self._watch, name="slm watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()

    def beat(self, step: int) -> None:
        """Says that `step` begins now."""
        self._step, self._beat = step, time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what may take any time: an evaluation."""
        self._paused = True
        try:
            yield
        finally:
            self._beat, self._paused = time.monotonic(), False

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._limit / 10)):
            if not self._paused and time.monotonic() - self._beat > self._limit:
                self._end()

    def _end(self) -> None:
        message = (
            f"step {self._step} is not done after {self._limit:g} s (loop.hang_limit); the stacks "
            "of all threads are in the log of this process; run the same command to go on from "
            "the newest checkpoint"
        )
        # The process's own stderr, whatever has been put in the place of `sys.stderr`.
        print(f"error: {message}", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if distributed.joined():
            distributed.fail(message, HANGING)
        os._exit(HANGING)
