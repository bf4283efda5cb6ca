"""Sudoku puzzles 4x4 (boxes 2x2), 6x6 (2x3) and 9x9 (3x3): text, tokens, files, generator.

Tokens are 0 padding, 1 blank, 2.. digits (as in TinyRecursiveModels), so the vocabulary is size
+ 2. The loss covers every cell, the given ones included.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from slm_jax.data.puzzles.puzzle_set import PuzzleSet, split_by_class
from slm_jax.data.puzzles.sudoku_solver import (
    BOXES,
    check_size,
    minimal_puzzles,
    random_solutions,
    solve,
    units,
)
from slm_jax.data.puzzles.sudoku_symmetry import SudokuAugmentation, sudoku_classes
from slm_jax.data.puzzles.words import permutations, words
from slm_jax.errors import UserError

# Column names of the puzzle and its solution: ours, and those of sapientinc/sudoku-extreme.
_COLUMNS = (("puzzle", "solution"), ("question", "answer"))
_SIZES = {size * size: size for size in BOXES}
_IGNORED = str.maketrans("", "", " \t\r\n|")
_LINES = 1 << 16  # of a file, checked together
_KINDS = ("row", "column", "box")


def parse_sudoku(text: str, *, where: str = "puzzle") -> np.ndarray:
    """Reads one puzzle: its cells row by row, `.` or `0` = empty.

    White space, `|` and lines of `-` and `+` between boxes are skipped, so both one line of a file
    and a grid as `format_sudoku` prints it can be read.

    Args:
      text: 16, 36 or 81 cells.
      where: names the text in messages, e.g. "train.csv:12: puzzle".

    Returns:
      uint8 [size, size], 0 = empty. It may still have no or several solutions (`solve_sudoku`).

    Raises:
      UserError: another number of cells, a character that is not a digit of this size, clues that
        contradict each other.
    """
    grid = _cells(text, where)
    _check_clues(grid[None], lambda _: where)
    return grid


def _cells(text: str, where: str) -> np.ndarray:
    lines = [line for line in text.splitlines() if not line or line.strip(" -+|")]
    cells = "".join(lines).translate(_IGNORED)
    if len(cells) not in _SIZES:
        raise UserError(f"{where} has {len(cells)} cells: a Sudoku has 16, 36 or 81")
    size = _SIZES[len(cells)]
    codes = np.frombuffer(cells.replace(".", "0").encode("latin-1", "replace"), np.uint8)
    digits = codes - np.uint8(ord("0"))  # what is before "0" wraps round to above 200
    if digits.max() > size:
        cell = int((digits > size).argmax())
        raise UserError(
            f"{where} has {cells[cell]!r} in row {cell // size + 1}, column {cell % size + 1}: "
            f"use 1 to {size}, and `.` or 0 for an empty cell"
        )
    return digits.reshape(size, size)


def _check_clues(grids: np.ndarray, where: Callable[[int], str]) -> None:
    """Raises UserError for the first of uint8 [N, size, size] with a digit twice in a unit."""
    size = grids.shape[-1]
    members = grids.reshape(len(grids), -1)[:, units(size)]  # [N, kind, unit, cell]
    values = np.sort(members, axis=-1)
    twice = ((values[..., 1:] == values[..., :-1]) & (values[..., 1:] > 0)).any(-1)
    bad = twice.any((1, 2))
    if bad.any():
        row = int(bad.argmax())
        kind, unit = (int(i) for i in np.argwhere(twice[row])[0])
        clues = members[row, kind, unit]
        digit = next(d for d in range(1, size + 1) if (clues == d).sum() > 1)
        raise UserError(
            f"{where(row)} has the digit {digit} twice in {_KINDS[kind]} {unit + 1}: "
            "correct its clues"
        )


def _check_counts(counts: np.ndarray, where: Callable[[int], str]) -> None:
    """Raises UserError for the first puzzle whose number of solutions is not 1."""
    if (counts != 1).any():
        row = int((counts != 1).argmax())
        if counts[row]:
            raise UserError(f"{where(row)} has several solutions: give more clues")
        raise UserError(f"{where(row)} has no solution: correct its clues")


def solve_sudoku(grid: np.ndarray, *, where: str = "puzzle") -> np.ndarray:
    """The one solution uint8 [size, size] of a puzzle, integer [size, size] with 0 = empty.

    Raises:
      UserError: no solution, several solutions.
    """
    solutions, counts = solve(grid[None])
    _check_counts(counts, lambda _: where)
    return solutions[0]


def format_sudoku(grid: np.ndarray) -> str:
    """A grid integer [size, size] as lines of text with its boxes drawn; 0 = empty is `.`."""
    size = len(grid)
    height, width = BOXES[size]
    cells = [["." if digit == 0 else str(digit) for digit in row] for row in grid.tolist()]
    lines = [
        " | ".join(" ".join(row[i : i + width]) for i in range(0, size, width)) for row in cells
    ]
    rule = "-+-".join(["-" * (2 * width - 1)] * (size // width))
    bands = ["\n".join(lines[i : i + height]) for i in range(0, size, height)]
    return f"\n{rule}\n".join(bands)


def sudoku_tokens(grids: np.ndarray) -> np.ndarray:
    """Tokens uint8 [..., L] of grids [..., size, size] of digits (0 = empty)."""
    return (np.asarray(grids) + 1).astype(np.uint8).reshape(*grids.shape[:-2], -1)


def sudoku_grids(tokens: np.ndarray) -> np.ndarray:
    """Grids int64 [..., size, size] of tokens [..., L]; blank and padding become 0."""
    size = math.isqrt(tokens.shape[-1])
    digits = np.maximum(np.asarray(tokens, np.int64) - 1, 0)
    return digits.reshape(*tokens.shape[:-1], size, size)


def sudoku_set(puzzles: np.ndarray, solutions: np.ndarray, name: str) -> PuzzleSet:
    """A set of puzzles and solutions, integer [N, size, size] of digits, that can be augmented."""
    size = puzzles.shape[-1]
    return PuzzleSet(
        inputs=sudoku_tokens(puzzles),
        labels=sudoku_tokens(solutions),
        puzzle_ids=np.zeros(len(puzzles), np.int32),
        vocab_size=size + 2,
        height=size,
        width=size,
        n_puzzle_ids=1,
        name=name,
        augmentation=SudokuAugmentation(size),
    )


def generate_sudoku(size: int, n_puzzles: int, *, seed: int) -> PuzzleSet:
    """Locally minimal puzzles with one solution; puzzle i is a pure function of (seed, size, i).

    12,000 of 6x6 take about 4 CPU-seconds (8 to 13 clues), 1000 of 9x9 about 3 (24 clues).

    Raises:
      UserError: a size other than 4, 6 and 9, n_puzzles below 1.
    """
    check_size(size)
    if n_puzzles < 1:
        raise UserError(f"n_puzzles={n_puzzles}: choose at least 1")
    solutions = random_solutions(size, n_puzzles, seed=seed)
    return sudoku_set(minimal_puzzles(solutions, seed=seed), solutions, f"sudoku-{size}x{size}")


def split_sudoku(
    puzzles: PuzzleSet, n_test: int, *, seed: int, by: str = "solution"
) -> tuple[PuzzleSet, PuzzleSet]:
    """(train, test) such that no augmentation of a training puzzle gives away a test puzzle.

    Args:
      puzzles: Sudokus of one size.
      n_test: puzzles of the test set.
      seed: decides which classes are tested.
      by: "solution": no solution grid of the test is equivalent to one of the training set.
        "puzzle": no puzzle is, which is weaker. The 28,200,960 grids of 6x6 make only 49 classes,
        so there the first tests on two or three of them, the second on all.

    Raises:
      UserError: 4x4 (its 288 grids are two classes), another `by`, too few classes.
    """
    if puzzles.height == 4:
        raise UserError(
            "size=4: augmentation turns the training puzzles into the test puzzles, for there are "
            "only 288 grids in two classes: choose size 6 or 9"
        )
    classes = sudoku_classes(sudoku_grids(puzzles.inputs), sudoku_grids(puzzles.labels), by=by)
    return split_by_class(puzzles, classes, n_test, seed=seed)


def load_sudoku(
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    check_unique: bool = True,
) -> PuzzleSet:
    """Reads a CSV (.csv or .csv.gz) with columns puzzle and solution (or question and answer).

    Other columns are skipped. Every line is parsed and its solution checked; `limit` then draws
    that many puzzles, whose uniqueness is proven (0.1 ms of CPU for an easy 9x9, 3 ms for one of
    the hardest).

    Args:
      path: the file; its puzzles have one size.
      limit: draw so many puzzles (all if there are fewer), in the order of the file.
      seed: of the draw.
      check_unique: prove that each puzzle has one solution.

    Raises:
      UserError: no such file or column, a bad puzzle; the message names file and line.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: choose at least 1")
    file = Path(path)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for rows in itertools.batched(_rows(file), _LINES):
        parts.append(_checked(file, rows, len(parts[0][1][0]) if parts else None))
    if not parts:
        raise UserError(f"path={file} has no puzzles: give at least one line below the header")
    lines, puzzles, solutions = (np.concatenate(part) for part in zip(*parts, strict=True))
    if limit is not None:
        order = permutations(words(seed, 5, np.arange(len(lines)), n_words=1)[:, 0])
        drawn = np.sort(order[:limit])
        lines, puzzles, solutions = lines[drawn], puzzles[drawn], solutions[drawn]
    if check_unique:
        _check_counts(solve(puzzles)[1], lambda i: f"{file}:{lines[i]}: puzzle")
    return sudoku_set(puzzles, solutions, file.name.removesuffix(".gz").removesuffix(".csv"))


def _checked(
    file: Path, rows: Sequence[tuple[int, str, str]], size: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Line numbers int64 [N], puzzles and solutions uint8 [N, size, size] of some rows."""
    names = ("puzzle", "solution")
    grids: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for line, *texts in rows:
        for name, text, column in zip(names, texts, grids, strict=True):
            grid = _cells(text, f"{file}:{line}: {name}")
            size = size or len(grid)
            if len(grid) != size:
                raise UserError(
                    f"{file}:{line}: {name} has {grid.size} cells, the first puzzle {size**2}: "
                    "give each size a file of its own"
                )
            column.append(grid)
    lines = np.array([row[0] for row in rows])
    puzzles, solutions = np.stack(grids[0]), np.stack(grids[1])
    _check_clues(puzzles, lambda i: f"{file}:{lines[i]}: puzzle")
    _check_clues(solutions, lambda i: f"{file}:{lines[i]}: solution")
    empty = (solutions == 0).any((1, 2))
    if empty.any():
        raise UserError(f"{file}:{lines[empty.argmax()]}: solution has empty cells: fill them")
    wrong = ((puzzles > 0) & (puzzles != solutions)).any((1, 2))
    if wrong.any():
        raise UserError(
            f"{file}:{lines[wrong.argmax()]}: solution differs from the clues of its puzzle: "
            "correct one of them"
        )
    return lines, puzzles, solutions


def _rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, puzzle, solution) of each line of a CSV file."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8", newline="") as text:
            reader = csv.reader(text)
            header = next(reader, [])
            columns = next((c for c in _COLUMNS if set(c) <= set(header)), None)
            if columns is None:
                raise UserError(
                    f"{file}:1: columns are {','.join(header)!r}: name two of them puzzle and "
                    "solution"
                )
            at = [header.index(name) for name in columns]
            for cells in reader:
                if not cells:
                    continue
                if len(cells) <= max(at):
                    raise UserError(
                        f"{file}:{reader.line_num}: {len(cells)} columns, the header has "
                        f"{len(header)}: write puzzle,solution"
                    )
                yield reader.line_num, cells[at[0]], cells[at[1]]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"path={file} cannot be read as CSV: {error}") from error
