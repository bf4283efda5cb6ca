"""Mazes from lines of text."""

import numpy as np

from slm_jax.data.puzzles.maze import CHARACTERS, GOAL
from slm_jax.errors import UserError


def parse_maze(text: str, *, where: str = "puzzle") -> np.ndarray:
    """Reads one maze: its rows as lines of `#` wall, space open, `S` start and `G` goal.

    Args:
      text: 3 to 30 lines of one length, 3 to 30; empty lines before and after are skipped.
      where: names the text in messages.

    Returns:
      Tokens uint8 [height, width]. There may still be no way from S to G (`solve_maze`).

    Raises:
      UserError: lines of several lengths, too few or many cells, another character, not one S and
        one G.
    """
    lines = text.replace("\r\n", "\n").strip("\n").split("\n")
    height, width = len(lines), len(lines[0])
    for i, line in enumerate(lines, 1):
        if len(line) != width:
            raise UserError(
                f"{where} has {len(line)} cells in row {i} and {width} in row 1: give rows of one "
                "length, open cells at their ends included"
            )
    if not (3 <= height <= 30 and 3 <= width <= 30):
        raise UserError(f"{where} is a maze of {height} x {width}: give 3 to 30 rows and columns")
    cells = "".join(lines)
    for i, character in enumerate(cells):
        if character not in CHARACTERS[:GOAL]:
            raise UserError(
                f"{where} has {character!r} in row {i // width + 1}, column {i % width + 1}: use "
                "# for a wall, space for an open cell, S and G"
            )
    for character, name in (("S", "start"), ("G", "goal")):
        if cells.count(character) != 1:
            raise UserError(
                f"{where} has {cells.count(character)} cells {character}: give one {name}"
            )
    tokens = [CHARACTERS.index(character) + 1 for character in cells]
    return np.array(tokens, np.uint8).reshape(height, width)
