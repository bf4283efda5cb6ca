"""Which cells of an answer break a rule of its puzzle, told without knowing the solution."""

import numpy as np

from slm_jax.data.puzzles.maze import GOAL, OPEN, PATH, START
from slm_jax.data.puzzles.sudoku_solver import units


def sudoku_broken(clues: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Cells that are empty, differ from their clue, or have a digit twice in a row, column or box.

    A full grid without any is a solution of the puzzle.

    Args:
        clues: integer [size, size] digits, 0 = empty.
        grid: integer [size, size] digits, 0 = empty.

    Returns:
        bool [size, size].
    """
    members = units(len(grid))
    values = grid.ravel()[members]
    twice = (values[..., :, None] == values[..., None, :]).sum(-1) > 1
    broken = np.zeros(grid.size, bool)
    broken[members[twice]] = True
    return broken.reshape(grid.shape) | (grid == 0) | ((clues > 0) & (clues != grid))


def maze_broken(maze: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Cells that are not as in the maze, or where the path ends or forks.

    A shortest path has exactly two neighbours beside each of its cells and one beside S and G, for
    any other would be a short cut. Not every answer without such a cell is a shortest path
    (`maze_solved`): a longer path and a ring apart from it have none either.

    Args:
        maze: tokens integer [height, width].
        answer: tokens integer [height, width]: as the maze, path cells marked.

    Returns:
        bool [height, width].
    """
    marked = answer == PATH
    other = np.where(marked, maze != OPEN, answer != maze)
    on_path = np.pad((marked & ~other) | (maze == START) | (maze == GOAL), 1)
    beside = (
        on_path[:-2, 1:-1].astype(int) + on_path[2:, 1:-1] + on_path[1:-1, :-2] + on_path[1:-1, 2:]
    )
    wanted = np.where(maze == OPEN, 2, 1)
    return other | (on_path[1:-1, 1:-1] & (beside != wanted))
