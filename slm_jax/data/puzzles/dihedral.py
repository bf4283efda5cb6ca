"""The eight symmetries of a square: D4 acting on grids.

Numbers are those of the TRM repository (dataset/common.py): 0 identity, 1-3 quarter turns
anticlockwise, 4 left-right mirror, 5 up-down mirror, 6 transpose, 7 anti-transpose.
"""

from __future__ import annotations

import functools

import numpy as np

from slm_jax.data.puzzles.puzzle_set import Batch
from slm_jax.data.puzzles.words import below

INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)
_OF_A_RECTANGLE = (0, 2, 4, 5)  # those that keep height and width


def dihedral(grid: np.ndarray, which: int) -> np.ndarray:
    """Applies symmetry `which` (0..7) to the last two axes; a view where NumPy can give one."""
    if which < 4:
        return np.rot90(grid, which, axes=(-2, -1))
    if which == 4:
        return grid[..., ::-1]
    if which == 5:
        return grid[..., ::-1, :]
    if which == 6:
        return np.swapaxes(grid, -2, -1)
    if which == 7:
        return np.rot90(grid, 1, axes=(-2, -1))[..., ::-1]
    raise ValueError(f"which={which} is not in [0, 8)")


@functools.cache
def cell_orders(height: int, width: int) -> np.ndarray:
    """Symmetries of a height x width grid as permutations of its cells: int64 [8 or 4, L].

    `cells[..., order]` is the transformed grid. A rectangle keeps the four that do not turn it.
    """
    cells = np.arange(height * width).reshape(height, width)
    kept = range(8) if height == width else _OF_A_RECTANGLE
    return np.stack([dihedral(cells, which).ravel() for which in kept])


class DihedralAugmentation:
    """Turns and mirrors whole grids (height x width tokens), puzzle and solution alike."""

    n_words = 1

    def __init__(self, height: int, width: int):
        self._orders = cell_orders(height, width)

    def __call__(self, batch: Batch, words: np.ndarray) -> Batch:
        """One of the symmetries for every row."""
        order = self._orders[below(words[:, 0], len(self._orders))]
        return batch | {
            name: np.take_along_axis(batch[name], order, axis=1) for name in ("inputs", "labels")
        }
