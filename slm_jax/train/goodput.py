"""Where the wall time of a run goes, over all its restarts, and a sign of life.

Every moment belongs to one part, so the parts add up to the wall time. `goodput.json` in the run
folder holds the sums of all processes that have worked on the run, one after the other; it and the
heartbeats are written about once a second, so a kill loses at most that.
"""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_jax.parallel import distributed
from slm_jax.train.folder import write_json

GOODPUT_FILE = "goodput.json"
PARTS = {
    "step": "training",
    "repeat": "steps done again after a crash",
    "data": "waiting for batches",
    "compile": "compilation",
    "restart": "initialising or restoring",
    "evaluate": "evaluation",
    "checkpoint": "waiting for checkpoints",
    "other": "opening data, the rest",
    "down": "between a stop and the next start",
}
"""The parts and what they are."""

_WRITE_EVERY = 1.0  # seconds

log = logging.getLogger(__name__)


class Goodput:
    """A clock with parts. It starts when it is made, in `other`."""

    def __init__(self) -> None:
        self._part = "other"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._began = self._first = time.time()
        self._since = time.monotonic()
        self._folder: Path | None = None
        self._written = float("-inf")
        self._step = self._begun_before = self._starts = 0

    def enter(self, part: str) -> None:
        """From now on time belongs to `part`."""
        now = time.monotonic()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time inside belongs to `name`."""
        outside = self._part
        self.enter(name)
        if name != "data":  # it may take long: the heartbeat says what is going on
            self.write()
        try:
            yield
        finally:
            self.enter(outside)

    @contextlib.contextmanager
    def account(self, folder: Path) -> Iterator[None]:
        """Adds what earlier processes have written in the run folder, and from now on writes it."""
        self._folder = folder
        earlier = _read(folder / GOODPUT_FILE)
        if earlier is not None:
            for name, seconds in earlier["seconds"].items():
                self._seconds[name] += seconds
            self._seconds["down"] += max(0.0, self._began - earlier["until"])
            self._first, self._starts = earlier["since"], earlier["starts"]
            self._begun_before = earlier["steps"]
        self._starts += 1
        try:
            yield
        finally:
            self.write()

    def begin_step(self, step: int) -> None:
        """Time is now that of a step: of a new one, or of one that an earlier process had done."""
        self._step = step
        self.enter("repeat" if step < self._begun_before else "step")
        if time.monotonic() > self._written + _WRITE_EVERY:
            self.write()

    def write(self) -> dict[str, float]:
        """Writes the sums so far and the heartbeat; returns seconds by part, those above 0."""
        self.enter(self._part)
        seconds = {name: s for name, s in self._seconds.items() if s}
        if self._folder is not None:
            self._written = time.monotonic()
            now = time.time()
            beat = {
                "step": self._step,
                "part": self._part,
                "time": now,
                "process": distributed.index(),
                "pid": os.getpid(),
                "host": socket.gethostname(),
            }
            write_json(self._folder / f"heartbeat-{distributed.index()}.json", beat)
            if distributed.is_first():
                sums = {
                    "since": self._first,
                    "until": now,
                    "starts": self._starts,
                    "steps": max(self._step + 1, self._begun_before),
                    "seconds": seconds,
                }
                write_json(self._folder / GOODPUT_FILE, sums)
        return seconds


def describe(seconds: dict[str, float]) -> str:
    """`93 % training, 4 % compilation, ...`, the largest first, those below 0.5 % left out."""
    total = sum(seconds.values()) or 1.0
    shares = sorted(((s / total, name) for name, s in seconds.items()), reverse=True)
    return ", ".join(
        f"{100 * share:.0f} % {PARTS[name]}" for share, name in shares if share >= 0.005
    )


def _read(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        data = json.loads(file.read_text())
        if not set(data["seconds"]) <= set(PARTS) or not {
            "since",
            "until",
            "steps",
            "starts",
        } <= set(data):
            raise ValueError("it holds something else")
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): times are counted from now on", file, error)
        return None
    return data
