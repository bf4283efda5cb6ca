"""Mazes from text, and what an answer breaks."""

import numpy as np
import pytest

from slm_jax.data.puzzles import (
    MazeConfig,
    generate_mazes,
    generate_sudoku,
    maze_broken,
    maze_solved,
    parse_maze,
    parse_sudoku,
    solve_maze,
    sudoku_broken,
    sudoku_grids,
)
from slm_jax.data.puzzles.maze import CHARACTERS, PATH
from slm_jax.errors import UserError

MAZE = "S #  \n# # #\n     \n ### \n    G"


def answer(text: str) -> np.ndarray:
    rows = [[CHARACTERS.index(c) + 1 for c in line] for line in text.split("\n")]
    return np.array(rows, np.uint8)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_a_grid_without_broken_cells_is_the_solution(size: int) -> None:
    puzzles = generate_sudoku(size, 5, seed=1)
    rng = np.random.default_rng(0)
    for clues, solution in zip(
        sudoku_grids(puzzles.inputs), sudoku_grids(puzzles.labels), strict=True
    ):
        assert not sudoku_broken(clues, solution).any()
        np.testing.assert_array_equal(sudoku_broken(clues, clues), clues == 0)
        for _ in range(10):
            wrong = solution.copy()
            cell = tuple(rng.integers(0, size, 2))
            wrong[cell] = wrong[cell] % size + 1
            broken = sudoku_broken(clues, wrong)
            assert broken[cell]
            # Beside it, one equal digit a row, column and box at most.
            assert 2 <= broken.sum() <= 4
            assert (wrong[broken] == wrong[cell]).all()


def test_a_digit_twice_breaks_both_cells_and_a_changed_clue_itself() -> None:
    clues = parse_sudoku("1...............")
    grid = parse_sudoku("1234341221434321")
    assert not sudoku_broken(clues, grid).any()
    swapped = grid[:, ::-1]  # a valid grid, of another puzzle
    assert np.argwhere(sudoku_broken(clues, swapped)).tolist() == [[0, 0]]
    grid = grid.copy()
    grid[3, 3] = 2  # beside 2 in the row, and below 2 in the column
    assert np.argwhere(sudoku_broken(clues, grid)).tolist() == [[1, 3], [3, 2], [3, 3]]


def test_no_shortest_path_breaks_a_rule() -> None:
    for config in (MazeConfig(12, 9, min_path=5, loops=0.4, unique=False), MazeConfig(5, 5)):
        mazes = generate_mazes(config, 20, seed=0)
        for maze, label in zip(mazes.inputs, mazes.labels, strict=True):
            shape = (config.height, config.width)
            assert not maze_broken(maze.reshape(shape), label.reshape(shape)).any()
            path = np.flatnonzero(label == PATH)
            if len(path):  # without one of its cells it is no path
                cut = label.copy()
                cut[path[len(path) // 2]] = 2
                assert maze_broken(maze.reshape(shape), cut.reshape(shape)).any()


@pytest.mark.parametrize(
    ("path", "cells"),
    [
        ("So#  \n#o# #\n oooo\n ###o\n    G", []),
        ("So#  \n#o# #\n ooo \n ###o\n    G", [[2, 3], [3, 4]]),  # a gap: both ends
        ("So#o \n#o# #\n oooo\n ###o\n    G", [[0, 3]]),  # a cell apart
        ("So#  \n#o# #\noooo \n ### \n    G", [[2, 0], [2, 1], [2, 3], [4, 4]]),
        ("So#  \n#oo #\n oooo\n ###o\n    G", [[1, 2]]),  # a wall that became path
        ("So   \n#o# #\n oooo\n ###o\n    G", [[0, 2]]),  # a wall that became open
        ("oo#  \n#o# #\n oooo\n ###o\n    G", [[0, 0]]),  # S that became path
    ],
)
def test_cells_where_a_path_is_broken(path: str, cells: list[list[int]]) -> None:
    found = np.argwhere(maze_broken(parse_maze(MAZE), answer(path))).tolist()
    if path.startswith("So#  \n#oo"):  # its neighbours have a third neighbour only if it counted
        assert cells[0] in found
    else:
        assert found == cells


def test_a_parsed_maze_is_solved() -> None:
    maze = parse_maze(f"\n{MAZE}\n")
    assert maze.shape == (5, 5)
    assert maze.dtype == np.uint8
    np.testing.assert_array_equal(maze, answer(MAZE))
    np.testing.assert_array_equal(parse_maze(MAZE.replace("\n", "\r\n")), maze)
    path = solve_maze(maze)
    assert (path == PATH).sum() == 7
    assert maze_solved(maze.reshape(1, -1), path.reshape(1, -1), 5).all()
    for config in (MazeConfig(7, 10, loops=0.3, unique=False), MazeConfig(30, 30, min_path=111)):
        mazes = generate_mazes(config, 5, seed=1)
        shape = (config.height, config.width)
        solved = [solve_maze(tokens.reshape(shape)).ravel() for tokens in mazes.inputs]
        assert maze_solved(mazes.inputs, np.array(solved), config.width).all()
        text = "\n".join(
            "".join(CHARACTERS[t - 1] for t in r) for r in mazes.inputs[0].reshape(shape)
        )
        np.testing.assert_array_equal(parse_maze(text), mazes.inputs[0].reshape(shape))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "m is a maze of 1 x 0: give 3 to 30"),
        ("SG", "m is a maze of 1 x 2: give 3 to 30"),
        ("\n".join([" " * 31] * 3), "m is a maze of 3 x 31"),
        (MAZE.replace("# # #", "# # "), "m has 4 cells in row 2 and 5 in row 1: give rows of one"),
        (MAZE.replace("S", "s"), "m has 's' in row 1, column 1: use # for a wall"),
        (MAZE.replace("    G", "   oG"), "m has 'o' in row 5, column 4"),
        (MAZE.replace("S", " "), "m has 0 cells S: give one start"),
        (MAZE.replace("    G", "G   G"), "m has 2 cells G: give one goal"),
    ],
)
def test_bad_mazes_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_maze(text, where="m")


def test_a_maze_without_a_way_is_refused() -> None:
    with pytest.raises(UserError, match="m has no way from S to G"):
        solve_maze(parse_maze(MAZE.replace("     ", "#####")), where="m")
