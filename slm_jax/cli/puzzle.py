"""The puzzle of a command line, for the model and for people."""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm_jax.data.puzzles import (
    ArcTasks,
    Mazes,
    maze_broken,
    maze_solved,
    parse_maze,
    parse_sudoku,
    solve_maze,
    solve_sudoku,
    sudoku_broken,
    sudoku_grids,
    sudoku_tokens,
)
from slm_jax.data.puzzles.maze import CHARACTERS, OPEN
from slm_jax.data.puzzles.sudoku_solver import BOXES
from slm_jax.errors import UserError
from slm_jax.train.trm_experiment import TRMExperiment


class Puzzle(NamedTuple):
    """A puzzle as a model reads it and as people do.

    Attributes:
        tokens: `[height, width]`, what is given.
        solution: the same, solved; for people only.
        given: `[height, width]` bool: the clues.
        box: rows and columns of a box, or `None`.
        characters: of the tokens.
        broken: tokens of an answer to the cells that break a rule.
        fault: tokens of an answer to why it does not solve the puzzle, or `None` if it does.
    """

    tokens: np.ndarray
    solution: np.ndarray
    given: np.ndarray
    box: tuple[int, int] | None
    characters: str
    broken: Callable[[np.ndarray], np.ndarray]
    fault: Callable[[np.ndarray], str | None]


def read_puzzle(given: str, trained: TRMExperiment, run: Path) -> Puzzle:
    """The puzzle that the command line gives.

    Args:
        given: the puzzle, the name of its file, or `-`.
        trained: the run that is to solve it.
        run: its folder, for messages.

    Raises:
        UserError: on a puzzle that is malformed, of another size than the run's, that has no or (a
            Sudoku) several solutions; on a run of another kind.
    """
    if isinstance(trained.data, ArcTasks):
        raise UserError(
            f"run={run} answers ARC tasks, and each task has an embedding that was learned with "
            "it: give a run on Sudokus or mazes (a run's ARC score is in its result.json)"
        )
    text, where = _read(given)
    if isinstance(trained.data, Mazes):
        return _maze(text, where, (trained.data.maze.height, trained.data.maze.width), run)
    return _sudoku(text, where, math.isqrt(trained.model.seq_len), run)


def _read(given: str) -> tuple[str, str]:
    """The text of a puzzle, and what to call it in messages."""
    if given == "-":
        return sys.stdin.read(), "puzzle from stdin"
    if not os.path.isfile(given):
        # One word with letters may be the name of a file, misspelt.
        word = len(given.split()) == 1 and any(c.isalpha() for c in given)
        return given, f"puzzle={given!r} is no file and" if word else "puzzle"
    try:
        return Path(given).read_text(encoding="utf-8"), f"puzzle={given}"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"puzzle={given} cannot be read: {error}") from error


def _sudoku(text: str, where: str, size: int, run: Path) -> Puzzle:
    clues = parse_sudoku(text, where=where)
    if len(clues) != size:
        raise UserError(
            f"{where} is {len(clues)}x{len(clues)}: the model in {run} solves {size}x{size}, "
            f"so give {size * size} cells"
        )
    solution = solve_sudoku(clues, where=where)

    def broken(tokens: np.ndarray) -> np.ndarray:
        return sudoku_broken(clues, sudoku_grids(tokens.ravel()))

    return Puzzle(
        tokens=sudoku_tokens(clues).reshape(clues.shape),
        solution=sudoku_tokens(solution).reshape(clues.shape),
        given=clues > 0,
        box=BOXES[size],
        characters="?." + "".join(str(digit + 1) for digit in range(size)),
        broken=broken,
        fault=lambda tokens: _break(broken(tokens)),
    )


def _maze(text: str, where: str, shape: tuple[int, int], run: Path) -> Puzzle:
    maze = parse_maze(text, where=where)
    if maze.shape != shape:
        raise UserError(
            f"{where} is a maze of {maze.shape[0]} x {maze.shape[1]}: the model in {run} solves "
            f"{shape[0]} x {shape[1]}"
        )

    def fault(tokens: np.ndarray) -> str | None:
        if maze_solved(maze.reshape(1, -1), tokens.reshape(1, -1), shape[1])[0]:
            return None
        return _break(maze_broken(maze, tokens)) or "what is marked is no shortest path from S to G"

    return Puzzle(
        tokens=maze,
        solution=solve_maze(maze, where=where),
        given=maze != OPEN,
        box=None,
        characters="?" + CHARACTERS,
        broken=lambda tokens: maze_broken(maze, tokens),
        fault=fault,
    )


def _break(broken: np.ndarray) -> str | None:
    n = int(broken.sum())
    return f"{n} cell{'s' * (n > 1)} break{'s' * (n == 1)} a rule" if n else None
