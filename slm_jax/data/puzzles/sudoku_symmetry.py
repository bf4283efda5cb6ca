"""The symmetries of Sudoku as a group, its action on puzzles, and classes of equivalent puzzles.

The group: relabel the digits; permute the bands, the rows in a band, the stacks, the columns in a
stack; transpose where boxes are square. It takes valid grids to valid grids, and the solution of a
transformed puzzle is the transformed solution.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from slm_jax.data.puzzles.puzzle_set import Batch
from slm_jax.data.puzzles.sudoku_solver import BOXES
from slm_jax.data.puzzles.words import mix, permutations
from slm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SudokuSymmetry:
    """B elements of the group of one size n.

    (g x)[i, j] = digits[x'[rows[i], columns[j]]] with x' the transpose of x where `transpose`.

    Attributes:
      digits: int64 [B, n + 1] image of each digit; digits[:, 0] = 0, empty stays empty.
      rows: int64 [B, n], a permutation that keeps bands together.
      columns: int64 [B, n], a permutation that keeps stacks together.
      transpose: bool [B].
    """

    digits: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    transpose: np.ndarray

    def __call__(self, grids: np.ndarray) -> np.ndarray:
        """Applies the elements: g x for grids integer [B, n, n]."""
        n = grids.shape[-1]
        moved = np.take_along_axis(grids.reshape(len(grids), -1), self._cells(), axis=1)
        return np.take_along_axis(self.digits, moved, axis=1).astype(grids.dtype).reshape(-1, n, n)

    def on_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Applies the elements to tokens integer [B, L] (0 padding, 1 blank, 2.. digits)."""
        # Token t >= 1 is digit t - 1, so the table is that of the digits moved up by one.
        table = np.pad(self.digits + 1, ((0, 0), (1, 0))).astype(tokens.dtype)
        moved = np.take_along_axis(tokens, self._cells(), axis=1)
        return np.take_along_axis(table, moved, axis=1)

    def compose(self, first: SudokuSymmetry) -> SudokuSymmetry:
        """The element that does `first`, then this one."""
        inner, outer = first, self
        # A transpose exchanges the roles of the inner rows and columns.
        t = outer.transpose[:, None]
        at_rows = np.where(t, inner.columns, inner.rows)
        at_columns = np.where(t, inner.rows, inner.columns)
        return SudokuSymmetry(
            digits=np.take_along_axis(outer.digits, inner.digits, axis=1),
            rows=np.take_along_axis(at_rows, outer.rows, axis=1),
            columns=np.take_along_axis(at_columns, outer.columns, axis=1),
            transpose=inner.transpose ^ outer.transpose,
        )

    def inverse(self) -> SudokuSymmetry:
        """The element that undoes this one."""
        rows, columns = np.argsort(self.rows, axis=1), np.argsort(self.columns, axis=1)
        t = self.transpose[:, None]
        return SudokuSymmetry(
            digits=np.argsort(self.digits, axis=1),
            rows=np.where(t, columns, rows),
            columns=np.where(t, rows, columns),
            transpose=self.transpose,
        )

    def _cells(self) -> np.ndarray:
        """Which cell of x each cell of g x shows: int64 [B, n * n]."""
        n = self.rows.shape[1]
        stride_row = np.where(self.transpose, 1, n)[:, None]
        stride_column = np.where(self.transpose, n, 1)[:, None]
        cells = (self.rows * stride_row)[:, :, None] + (self.columns * stride_column)[:, None, :]
        return cells.reshape(len(cells), -1)


@dataclasses.dataclass(frozen=True)
class SudokuAugmentation:
    """Draws a uniform element of the group for each row of a batch, as TinyRecursiveModels does.

    Attributes:
      size: 4, 6 or 9.
    """

    size: int

    @property
    def n_words(self) -> int:
        """One word for each digit, band, row, stack and column, and one for the transpose."""
        height, width = BOXES[self.size]
        return 3 * self.size + self.size // height + self.size // width + 1

    def draw(self, words: np.ndarray) -> SudokuSymmetry:
        """Elements from random words uint64 [B, n_words]."""
        n = self.size
        height, width = BOXES[n]
        digits = permutations(words[:, :n]) + 1
        # Rows: the order of the bands first, then of the rows in each.
        ends = np.cumsum([n, n + n // height, n + n // width])
        rows = _in_blocks(words[:, n : ends[1]], height)
        columns = _in_blocks(words[:, ends[1] : ends[2]], width)
        transpose = (words[:, ends[2]] >> np.uint64(63)).astype(bool)
        if height != width:
            transpose = np.zeros_like(transpose)
        return SudokuSymmetry(np.pad(digits, ((0, 0), (1, 0))), rows, columns, transpose)

    def __call__(self, batch: Batch, words: np.ndarray) -> Batch:
        """One variant of every puzzle, its solution likewise."""
        symmetry = self.draw(words)
        return batch | {name: symmetry.on_tokens(batch[name]) for name in ("inputs", "labels")}


def _in_blocks(words: np.ndarray, block: int) -> np.ndarray:
    """Permutations int64 [B, n] that keep blocks of `block` together; words [B, n + n / block]."""
    n_blocks = words.shape[1] // (block + 1)
    order = permutations(words[:, :n_blocks])
    inner = permutations(words[:, n_blocks:].reshape(len(words), n_blocks, block))
    return (order[:, :, None] * block + inner).reshape(len(words), -1)


def sudoku_classes(puzzles: np.ndarray, solutions: np.ndarray, *, by: str) -> np.ndarray:
    """Hashes that the whole group leaves as they are: equal for equivalent puzzles.

    Puzzles that are not equivalent may share a hash; a split by it is then stricter than needed.
    The solution's part counts cycle types: two rows (columns) of a grid are a permutation of the
    digits, two digits one of the rows. The puzzle's part refines colours of the cells, which start
    from whether a cell is given, by those of the cells in the same row, column, box or with the
    same digit (Weisfeiler and Leman, 1968).

    Args:
      puzzles: integer [N, n, n] digits, 0 = empty.
      solutions: integer [N, n, n].
      by: "solution": equal when the solutions are equivalent; "puzzle": when the puzzles are.

    Returns:
      uint64 [N].

    Raises:
      UserError: another `by`.
    """
    if by not in ("solution", "puzzle"):
        raise UserError(f"by={by!r}: choose 'solution' or 'puzzle'")
    solutions = np.asarray(solutions, np.int64)
    if by == "solution":
        return _solution_classes(solutions)
    return mix(_solution_classes(solutions) ^ _clue_classes(np.asarray(puzzles) > 0, solutions))


def _solution_classes(grids: np.ndarray) -> np.ndarray:
    size = grids.shape[-1]
    height, width = BOXES[size]
    digits = grids - 1
    by_row = _line_pairs(digits, height)
    by_column = _line_pairs(digits.swapaxes(1, 2), width)
    by_digit = _line_pairs(np.argsort(digits, axis=-1).swapaxes(1, 2), 1)
    return mix(by_digit) ^ _both_ways(by_row, by_column, height == width)


def _both_ways(by_row: np.ndarray, by_column: np.ndarray, square: bool) -> np.ndarray:
    """Joins what rows and columns say; for square boxes a transpose must not change the result."""
    if square:
        return mix(mix(by_row) + mix(by_column))
    return mix(mix(by_row) + by_column)


def _line_pairs(lines: np.ndarray, block: int) -> np.ndarray:
    """Hash uint64 [N] of the cycle types of pairs of lines int64 [N, n, n], each a permutation.

    It does not change when lines in a block of `block`, or blocks, are permuted; nor when values
    are relabelled or positions permuted, the same way in all lines.
    """
    n = lines.shape[-1]
    inverse = np.argsort(lines, axis=-1)
    within = np.zeros((len(lines), n // block), np.uint64)
    across = np.zeros(len(lines), np.uint64)
    for a in range(n):
        for b in range(n):
            if a == b:
                continue
            step = np.take_along_axis(lines[:, b], inverse[:, a], axis=1)  # a's value to b's
            power, cycles = step, np.zeros(len(lines), np.uint64)
            for _ in range(n):  # fixed points of the powers: the cycle type
                fixed = (power == np.arange(n)).sum(1).astype(np.uint64)
                cycles = mix(cycles + fixed)
                power = np.take_along_axis(step, power, axis=1)
            if a // block == b // block:
                within[:, a // block] += mix(cycles)
            else:
                across += mix(cycles)
    total: np.ndarray = mix(mix(within.ravel()).reshape(within.shape).sum(1) + mix(across))
    return total


def _clue_classes(given: np.ndarray, solutions: np.ndarray) -> np.ndarray:
    """Hash uint64 [N] of where the clues are, given bool [N, n, n]."""
    n = solutions.shape[-1]
    height, width = BOXES[n]
    colours = given.astype(np.uint64)
    same_digit = solutions[:, None] == np.arange(1, n + 1)[:, None, None]  # [N, digit, n, n]

    def mixed(x: np.ndarray) -> np.ndarray:
        return mix(x.ravel()).reshape(x.shape)

    for _ in range(4):
        h = mixed(colours)
        rows = np.broadcast_to(h.sum(2, keepdims=True), h.shape)
        columns = np.broadcast_to(h.sum(1, keepdims=True), h.shape)
        blocks = h.reshape(-1, n // height, height, n // width, width).sum((2, 4))
        boxes = blocks.repeat(height, 1).repeat(width, 2)
        digits = np.einsum("ndij,nij->nd", same_digit, h)
        digit = np.take_along_axis(digits, solutions.reshape(len(h), -1) - 1, 1).reshape(h.shape)
        lines = _both_ways(rows.ravel(), columns.ravel(), height == width).reshape(h.shape)
        colours = mixed(mixed(mixed(h + lines) + boxes) + digit)
    return mix(colours.sum((1, 2)))
