"""A process of another environment, which answers a line of JSON with a line of JSON."""

import contextlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))  # all sides get as many threads


class Peer:
    """A running process of a script beside this file.

    Attributes:
        facts: what it said of itself at the start.
    """

    def __init__(
        self, name: str, python: Path, script: str, setup: dict[str, Any], folder: Path
    ) -> None:
        """Starts it and waits until it is ready.

        Args:
            name: of the side, for messages and the log.
            python: of its environment.
            script: file name.
            setup: its only argument, as JSON.
            folder: where its stderr goes.

        Raises:
            RuntimeError: if it ends instead, with the end of its log.
        """
        self._name, self._log = name, folder / f"{name}.log"
        words = [str(python.absolute()), str(Path(__file__).with_name(script)), json.dumps(setup)]
        pipe = subprocess.PIPE
        with self._log.open("w") as log:
            self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=log, text=True)
        self.facts = self._answer()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer; RuntimeError if there is none."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "".join(self._log.read_text().splitlines(keepends=True)[-20:])
            raise RuntimeError(f"the {self._name} peer died:\n{tail}")
        return json.loads(line)


def machine() -> dict[str, Any]:
    """Processor, cores and system."""
    return {"cpu": _cpu_name(), "cores": CORES, "platform": platform.platform()}


def _cpu_name() -> str:
    """The processor's name, as Linux tells it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
