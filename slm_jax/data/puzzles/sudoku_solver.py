"""A Sudoku solver for many boards at once, and the generator that rests on it.

Boards are candidate masks uint16 [C, K]: bit d of [c, k] says that cell c of board k can be digit
d + 1. Boards are the last axis, so that each step is a few long NumPy operations whatever K is.
"""

from __future__ import annotations

import functools

import numpy as np

from slm_jax.data.puzzles.words import permutations, words
from slm_jax.errors import UserError

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size: rows and columns of a box

_CHUNK = 4096  # boards worked on together: their masks stay in the cache
_NARROW = 64  # and at least so many, else NumPy's overhead counts


@functools.cache
def units(size: int) -> np.ndarray:
    """Cells of the rows, columns and boxes: int64 [3, size, size] of kind, unit, cell in unit."""
    height, width = BOXES[size]
    cells = np.arange(size * size).reshape(size, size)
    boxes = cells.reshape(size // height, height, size // width, width).swapaxes(1, 2)
    return np.stack([cells, cells.T, boxes.reshape(size, size)])


@functools.cache
def _units_of_cells(size: int) -> np.ndarray:
    """The three units of each cell: int64 [3, size * size] into the flattened unit axis."""
    members = units(size).reshape(3 * size, size)
    return np.stack([np.nonzero((members == c).any(1))[0] for c in range(size * size)], axis=1)


def solve(grids: np.ndarray, *, limit: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Solves boards and counts their solutions up to `limit`.

    Args:
      grids: integer [N, size, size] digits, 0 = empty; size 4, 6 or 9.
      limit: stop counting a board's solutions here; 2 proves uniqueness.

    Returns:
      (solutions uint8 [N, size, size], one of each board's or zeros; counts int64 [N] in
      [0, limit]).
    """
    size = grids.shape[-1]
    digits = np.asarray(grids, np.int64).reshape(len(grids), -1).T
    full = np.uint16((1 << size) - 1)
    masks = np.where(digits > 0, np.uint16(1) << np.maximum(digits - 1, 0).astype(np.uint16), full)
    found, counts = _search(masks.astype(np.uint16), size, limit)
    solutions = _digits(found).T.reshape(-1, size, size)
    return solutions, counts


def _digits(masks: np.ndarray) -> np.ndarray:
    """Digit of one-bit masks, 0 of the empty mask: uint8."""
    return np.where(masks > 0, np.bitwise_count(masks - np.uint16(1)) + 1, 0).astype(np.uint8)


def _search(masks: np.ndarray, size: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth first from the boards `masks` [C, K]: a solution [C, K] (or 0), counts [K]."""
    n_boards = masks.shape[1]
    counts = np.zeros(n_boards, np.int64)
    found = np.zeros_like(masks)
    # Newest last. A narrow chunk of a deep stack keeps one hard board from growing in breadth.
    chunk = min(_CHUNK, max(_NARROW, n_boards))
    stack = [
        (masks[:, i : i + chunk], np.arange(i, min(i + chunk, n_boards)))
        for i in range(0, n_boards, chunk)
    ]
    while stack:
        boards, owners = stack.pop()
        while stack and len(owners) + len(stack[-1][1]) <= chunk:
            more, theirs = stack.pop()
            boards, owners = np.concatenate([more, boards], 1), np.concatenate([theirs, owners])
        open_ = counts[owners] < limit
        boards, owners = _propagate(boards[:, open_], owners[open_], size)
        n_candidates = np.bitwise_count(boards)
        solved = (n_candidates == 1).all(0)
        np.add.at(counts, owners[solved], 1)
        found[:, owners[solved]] = boards[:, solved]
        boards, owners = boards[:, ~solved], owners[~solved]
        if len(owners):
            # Branch on a cell with the fewest candidates: its lowest digit, or any other one.
            n_candidates = n_candidates[:, ~solved]
            cell = np.where(n_candidates > 1, n_candidates, 99).argmin(0)
            at = (cell, np.arange(len(owners)))
            lowest = boards[at] & (~boards[at] + np.uint16(1))
            without, with_ = boards.copy(), boards
            without[at] ^= lowest
            with_[at] = lowest
            stack.append((without, owners))
            stack.append((with_, owners))
    return found, np.minimum(counts, limit)


def _propagate(boards: np.ndarray, owners: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Naked and hidden singles to the fixed point; boards with a contradiction are dropped."""
    members = units(size).reshape(3 * size, size)
    of_cells = _units_of_cells(size)
    full = np.uint16((1 << size) - 1)
    done_boards, done_owners = [boards[:, :0]], [owners[:0]]
    while len(owners):
        single = np.where(boards & (boards - np.uint16(1)), np.uint16(0), boards)
        shape = (3 * size, len(owners))
        once, twice = np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)
        placed, clash = np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)
        for position in range(size):
            cells = members[:, position]
            x = boards[cells]
            twice |= once & x
            once |= x
            x = single[cells]
            clash |= placed & x
            placed |= x
        # A digit placed twice leaves another one without a cell in the end; this sees it at once.
        alive = ~((once != full) | (clash != 0)).any(0)
        only = once & ~twice
        taken = placed[of_cells[0]] | placed[of_cells[1]] | placed[of_cells[2]]
        hidden = (only[of_cells[0]] | only[of_cells[1]] | only[of_cells[2]]) & boards
        new = np.where(single != 0, boards, boards & ~taken)
        new = np.where(hidden != 0, hidden & new, new)
        alive &= (new != 0).all(0)
        moved = (new != boards).any(0)
        rest = alive & ~moved
        done_boards.append(new[:, rest])
        done_owners.append(owners[rest])
        going = alive & moved
        boards, owners = new[:, going], owners[going]
    return np.concatenate(done_boards, 1), np.concatenate(done_owners)


def random_solutions(size: int, n: int, *, seed: int) -> np.ndarray:
    """Random full grids uint8 [n, size, size]; grid i is a pure function of (seed, size, i).

    Each is filled by backtracking: the emptiest choice first, among its digits a random one first.
    All grids can occur; they are not exactly equally likely.
    """
    height, width = BOXES[size]
    row, column = (axis.ravel().tolist() for axis in np.indices((size, size)))
    box = [r // height * (size // width) + c // width for r, c in zip(row, column, strict=True)]
    # A digit order and a tie-break order for every cell of every grid.
    keys = words(seed, 3, size, np.arange(n), n_words=size * size * (size + 1))
    keys = keys.reshape(n, size * size, size + 1)
    orders, ties = permutations(keys[:, :, 1:]), permutations(keys[:, :, 0])
    full = (1 << size) - 1
    grids = np.zeros((n, size * size), np.uint8)

    def fill(grid: np.ndarray, order: list[list[int]], empty: list[int]) -> bool:
        if not empty:
            return True
        best, fewest = empty[0], 99
        for c in empty:
            count = (full & ~(rows[row[c]] | columns[column[c]] | boxes[box[c]])).bit_count()
            if count < fewest:
                best, fewest = c, count
                if count < 2:
                    break
        taken = rows[row[best]] | columns[column[best]] | boxes[box[best]]
        rest = [c for c in empty if c != best]
        for digit in order[best]:
            bit = 1 << digit
            if taken & bit:
                continue
            for used, which in ((rows, row), (columns, column), (boxes, box)):
                used[which[best]] |= bit
            grid[best] = digit + 1
            if fill(grid, order, rest):
                return True
            for used, which in ((rows, row), (columns, column), (boxes, box)):
                used[which[best]] ^= bit
        return False

    for i in range(n):
        rows, columns, boxes = [0] * size, [0] * size, [0] * size
        fill(grids[i], orders[i].tolist(), ties[i].tolist())
    return grids.reshape(n, size, size)


def minimal_puzzles(solutions: np.ndarray, *, seed: int) -> np.ndarray:
    """Locally minimal puzzles: clues removed in random order while the solution stays unique.

    One pass is enough: a clue that is needed beside more clues is needed beside fewer.

    Args:
      solutions: uint8 [N, size, size] full grids.
      seed: decides the orders; that of grid i is a pure function of (seed, i).

    Returns:
      uint8 [N, size, size], 0 = empty: one solution, and more without any one of the clues.
    """
    n, size = len(solutions), solutions.shape[-1]
    full = np.uint16((1 << size) - 1)
    bits = (np.uint16(1) << (solutions.reshape(n, -1).T - np.uint16(1))).astype(np.uint16)
    masks = bits.copy()
    order = permutations(words(seed, 4, np.arange(n), n_words=size * size)).T
    boards = np.arange(n)
    for cells in order:
        at = (cells, boards)
        # The clue can go if no solution has another digit in its cell.
        masks[at] = full & ~bits[at]
        _, counts = _search(masks, size, 1)
        masks[at] = np.where(counts == 0, full, bits[at])
    return np.where(masks == full, 0, _digits(bits)).astype(np.uint8).T.reshape(n, size, size)


def check_size(size: int) -> None:
    """Raises UserError unless there are Sudokus of this size."""
    if size not in BOXES:
        raise UserError(f"size={size}: choose 4 (boxes 2x2), 6 (2x3) or 9 (3x3)")
