"""What a person sees while a run goes on: step, loss, speed, time left."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Without a terminal (a log file, CI) a plain line this often, in seconds.
_LINE_EVERY = 15.0


class TrainProgress:
    """A live bar on a terminal, a line now and then elsewhere; a context manager."""

    def __init__(
        self,
        name: str,
        *,
        first_step: int,
        steps: int,
        quiet: bool = False,
        unit: str = "tokens",
    ) -> None:
        self._name, self._steps, self._unit = name, steps, unit
        self._console = Console()
        self._quiet = quiet
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(name, total=steps, completed=first_step, facts="compiling")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, done: int, loss: float, per_second: float) -> None:
        """Shows that `done` steps are behind us."""
        facts = f"loss {loss:.4f}  {per_second:,.0f} {self._unit}/s"
        self._bar.update(self._task, completed=done, facts=facts)
        now = time.monotonic()
        plain = not self._quiet and not self._console.is_terminal
        if plain and now - self._last_line > _LINE_EVERY:
            self._last_line = now
            self._console.print(
                f"{self._name}  step {done}/{self._steps}  {facts}", highlight=False
            )
