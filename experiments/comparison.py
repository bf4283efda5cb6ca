"""What experiments that compare several arms share: the grid of rates, the interval, the tables."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from slm_jax.scaling.report import table as markdown_table
from slm_jax.train.loop import DivergedError


def best_of_grid[R](
    name: str,
    learning_rates: Sequence[float],
    seeds: int,
    one: Callable[[float, int], R | None],
    score: Callable[[R], Any],
) -> tuple[float, dict[float, R | None], list[R]]:
    """Tries every learning rate on seed 0 and repeats the best one on the other seeds.

    Args:
        name: of the arm, for the message.
        learning_rates: the grid.
        seeds: runs at the best rate, the one of the grid among them.
        one: runs a rate and a seed; `None` if it diverged.
        score: of a run; the lowest is the best.

    Returns:
        The best rate; the runs of the grid by rate; the runs at the best rate that did not diverge.

    Raises:
        DivergedError: if every rate diverged.
    """
    grid = {rate: one(rate, 0) for rate in learning_rates}
    finished = {rate: result for rate, result in grid.items() if result is not None}
    if not finished:
        raise DivergedError(
            f"{name}: every learning rate of {tuple(learning_rates)} diverged: lower them"
        )
    best = min(finished, key=lambda rate: score(finished[rate]))
    repeats = [finished[best], *(one(best, seed) for seed in range(1, seeds))]
    return best, grid, [result for result in repeats if result is not None]


def interval(values: np.ndarray) -> float:
    """Half-width of the 95 % Student-t interval of the mean; NaN for a single value."""
    n = len(values)
    if n < 2:
        return math.nan
    return float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def show_tables(
    console: Console, tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]]
) -> str:
    """Prints tables, each a title, headings and rows; returns them as sections of Markdown."""
    text = ""
    for title, headings, rows in tables:
        shown = Table(title=title)
        for i, heading in enumerate(headings):
            shown.add_column(heading, justify="left" if i == 0 else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        text += f"\n## {title}\n\n{markdown_table(headings, rows)}"
    return text
