"""ARC-AGI-1 and -2: tasks from JSON, grids as 900 tokens and back.

A grid of up to 30 x 30 colours is laid on 30 x 30 tokens: 0 padding, 1 end of grid, 2..11 colours
(TinyRecursiveModels, dataset/build_arc_dataset.py). The end is marked by a row of 1
below the grid and a column of 1 to its right, where there is room; the corner stays padding.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.errors import UserError

SIDE = 30
N_COLOURS = 10
VOCAB_SIZE = N_COLOURS + 2
END = 1


@dataclasses.dataclass(frozen=True)
class ArcPair:
    """One example of a task.

    Attributes:
      input: colours uint8 [h, w], 1 to 30 rows and columns.
      output: colours uint8 [h', w'], or None where it is not published.
    """

    input: np.ndarray
    output: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class ArcTask:
    """A task.

    Attributes:
      train: demonstrations, all with an output.
      test: what is asked.
    """

    train: tuple[ArcPair, ...]
    test: tuple[ArcPair, ...]


def load_arc(path: str | os.PathLike[str]) -> dict[str, ArcTask]:
    """Reads tasks from JSON (.json or .json.gz) of `{task_id: {"train": [...], "test": [...]}}`.

    Each example is `{"input": rows, "output": rows}`; a test example may lack its output.

    Raises:
      UserError: no such file, not JSON, a task or grid that is not as above; the message names file
        and task.
    """
    file = Path(path)
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as text:
            data = json.load(text)
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"path={file} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict) or not data:
        raise UserError(f"path={file} must be an object of task id to task, with a task or more")
    return {name: _task(task, f"{file}: task {name}") for name, task in data.items()}


def _task(task: Any, where: str) -> ArcTask:
    parts: dict[str, tuple[ArcPair, ...]] = {}
    for part in ("train", "test"):
        pairs = task.get(part) if isinstance(task, dict) else None
        if not isinstance(pairs, list) or not pairs:
            raise UserError(f"{where} has no list {part!r} of examples: add one or more")
        read = []
        for i, pair in enumerate(pairs):
            here = f"{where}, {part}[{i}]"
            if not isinstance(pair, dict) or "input" not in pair:
                raise UserError(f"{here} has no input: add its grid")
            if "output" not in pair and part == "train":
                raise UserError(f"{here} has no output: add its grid")
            output = _grid(pair["output"], f"{here}.output") if "output" in pair else None
            read.append(ArcPair(_grid(pair["input"], f"{here}.input"), output))
        parts[part] = tuple(read)
    return ArcTask(**parts)


def _grid(rows: Any, where: str) -> np.ndarray:
    lists = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
    if not lists or not rows or len({len(row) for row in rows}) != 1:
        raise UserError(f"{where} must be a list of rows of one length")
    if len(rows) > SIDE or not 1 <= len(rows[0]) <= SIDE:
        raise UserError(f"{where} is {len(rows)} x {len(rows[0])}: a grid has 1 to {SIDE} a side")
    for row in rows:
        for colour in row:
            if type(colour) is not int or not 0 <= colour < N_COLOURS:
                raise UserError(f"{where} has the colour {colour!r}: use integers 0 to 9")
    return np.array(rows, np.uint8)


def encode_grid(grid: np.ndarray, row: int = 0, column: int = 0) -> np.ndarray:
    """Tokens uint8 [900] of colours [h, w] whose top left cell is put at (row, column)."""
    height, width = grid.shape
    end_row, end_column = row + height, column + width
    if min(row, column) < 0 or max(end_row, end_column) > SIDE:
        raise ValueError(f"a grid of {height} x {width} at ({row}, {column}) leaves 30 x 30")
    tokens = np.zeros((SIDE, SIDE), np.uint8)
    tokens[row:end_row, column:end_column] = grid + 2
    if end_row < SIDE:
        tokens[end_row, column:end_column] = END
    if end_column < SIDE:
        tokens[row:end_row, end_column] = END
    return tokens.ravel()


def decode_grid(tokens: np.ndarray) -> np.ndarray:
    """The grid in tokens integer [900]: the largest rectangle of colours from the top left cell.

    This is the crop of the published evaluator (evaluators/arc.py); of equal areas the one with
    fewer rows. It makes something of any prediction; without a colour in the first cell the result
    is [0, 0]. It does not undo a translation: test inputs are never translated.

    Returns:
      uint8 [h, w] colours.
    """
    square = tokens.reshape(SIDE, SIDE)
    other = (square < 2) | (square >= VOCAB_SIZE)
    lengths = np.where(other.any(1), other.argmax(1), SIDE)  # colours at the start of each row
    widths = np.minimum.accumulate(lengths)
    areas = widths * np.arange(1, SIDE + 1)
    best = int(areas.argmax())
    if areas[best] == 0:
        return np.zeros((0, 0), np.uint8)
    return (square[: best + 1, : widths[best]] - 2).astype(np.uint8)


def grid_key(grid: np.ndarray) -> bytes:
    """Shape and colours as bytes: equal if and only if the grids are."""
    return bytes(grid.shape) + grid.astype(np.uint8).tobytes()


def without_tasks_of(
    tasks: Mapping[str, ArcTask], others: Mapping[str, ArcTask]
) -> dict[str, ArcTask]:
    """`tasks` less those that are in `others` by name, or that hold a test of one of `others`.

    ARC-AGI-2's training set holds most of ARC-AGI-1, so train on one and test on the other only
    after this.
    """
    tests = {key for task in others.values() for key in _keys(task.test)}
    return {
        name: task
        for name, task in tasks.items()
        if name not in others and tests.isdisjoint(_keys((*task.train, *task.test)))
    }


def _keys(pairs: tuple[ArcPair, ...]) -> set[tuple[bytes, bytes]]:
    return {
        (grid_key(pair.input), grid_key(pair.output)) for pair in pairs if pair.output is not None
    }
