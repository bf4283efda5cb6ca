"""Mazes: find a shortest path from S to G.

A maze is a grid of the characters `# SGo` (wall, open, start, goal, path), tokens 1..5 with 0 for
padding (as in TinyRecursiveModels). Inputs show walls, S and G; labels also the path between
them.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable

import numpy as np

from slm_jax.data.puzzles.dihedral import DihedralAugmentation, cell_orders
from slm_jax.data.puzzles.puzzle_set import PuzzleSet
from slm_jax.data.puzzles.words import mix
from slm_jax.errors import UserError

CHARACTERS = "# SGo"
WALL, OPEN, START, GOAL, PATH = range(1, 6)
VOCAB_SIZE = 6

_ATTEMPTS = 200  # mazes tried for one that has a long enough path


@dataclasses.dataclass(frozen=True)
class MazeConfig:
    """What mazes to generate.

    Rooms lie on every second row and column. A random depth-first walk joins all of them by a
    spanning tree of corridors; then walls between neighbouring rooms are opened, which makes loops.

    Attributes:
      height: rows, 3 to 30.
      width: columns, 3 to 30.
      min_path: fewest steps from S to G; Maze-Hard has more than 110 on 30 x 30.
      loops: share in [0, 1] of the walls left between rooms that are opened.
      unique: only mazes with a single shortest path; otherwise the label is one of them.
    """

    height: int = 30
    width: int = 30
    min_path: int = 1
    loops: float = 0.0
    unique: bool = True

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if not 3 <= value <= 30:
                raise UserError(f"{name}={value} is not in [3, 30]: choose 30 for Maze-Hard")
        if not 0 <= self.loops <= 1:
            raise UserError(f"loops={self.loops} is not in [0, 1]")
        longest = 2 * ((self.height + 1) // 2) * ((self.width + 1) // 2) - 2
        if not 1 <= self.min_path <= longest:
            raise UserError(
                f"min_path={self.min_path}: a path in a maze of {self.height} x {self.width} has "
                f"1 to {longest} steps"
            )


def generate_mazes(config: MazeConfig, n_mazes: int, *, seed: int) -> PuzzleSet:
    """Random mazes with the path; maze i is a pure function of (config, seed, i).

    1000 mazes of 30 x 30 take about 3 CPU-seconds.

    Raises:
      UserError: n_mazes below 1; no path of `min_path` steps in 200 mazes.
    """
    if n_mazes < 1:
        raise UserError(f"n_mazes={n_mazes}: choose at least 1")
    inputs = np.empty((n_mazes, config.height * config.width), np.uint8)
    labels = np.empty_like(inputs)
    for i in range(n_mazes):
        inputs[i], labels[i] = _maze(config, np.random.default_rng([abs(seed), seed < 0, i]))
    return PuzzleSet(
        inputs=inputs,
        labels=labels,
        puzzle_ids=np.zeros(n_mazes, np.int32),
        vocab_size=VOCAB_SIZE,
        height=config.height,
        width=config.width,
        n_puzzle_ids=1,
        name=f"maze-{config.height}x{config.width}",
        augmentation=DihedralAugmentation(config.height, config.width),
    )


def _maze(config: MazeConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One maze and its label: uint8 [L] each."""
    for _ in range(_ATTEMPTS):
        cells = _corridors(config, rng)
        start = int(rng.choice(np.flatnonzero(cells == OPEN)))
        distance, ways = _distances(cells, config.width, start)
        goals = distance >= config.min_path
        if config.unique:
            goals &= ways == 1
        if not goals.any():
            # From the farthest cell of any cell, the farthest is as far as a tree allows.
            start = int(distance.argmax())
            distance, ways = _distances(cells, config.width, start)
            goals = (distance >= config.min_path) & ((ways == 1) | (not config.unique))
        if goals.any():
            goal = int(rng.choice(np.flatnonzero(goals)))
            maze = cells.copy()
            maze[start], maze[goal] = START, GOAL
            return maze, _with_path(maze, goal, distance, config, lambda n: int(rng.integers(n)))
    raise UserError(
        f"min_path={config.min_path}: {_ATTEMPTS} mazes of {config.height} x {config.width} with "
        f"loops={config.loops} had no such path: choose a shorter path or fewer loops"
    )


def _with_path(
    maze: np.ndarray,
    goal: int,
    distance: np.ndarray,
    grid: MazeConfig,
    choose: Callable[[int], int],
) -> np.ndarray:
    """The label uint8 [L]: a shortest path back from the goal, `choose` among equal ways."""
    label = maze.copy()
    cell = goal
    while distance[cell] > 1:
        back = [c for c in _beside(cell, grid) if distance[c] == distance[cell] - 1]
        cell = back[choose(len(back))]
        label[cell] = PATH
    return label


def solve_maze(maze: np.ndarray, *, where: str = "puzzle") -> np.ndarray:
    """A shortest path from S to G, one of them where there are several.

    Args:
      maze: tokens integer [height, width], as `parse_maze` gives them.
      where: names the maze in messages.

    Returns:
      Tokens uint8 [height, width]: the maze with the cells of the path marked.

    Raises:
      UserError: there is no way.
    """
    cells, grid = maze.astype(np.uint8).ravel(), MazeConfig(*maze.shape)
    start, goal = (int(np.flatnonzero(cells == token)[0]) for token in (START, GOAL))
    distance, _ = _distances(cells, grid.width, start)
    if distance[goal] < 0:
        raise UserError(f"{where} has no way from S to G: open one of its walls")
    return _with_path(cells, goal, distance, grid, lambda n: 0).reshape(maze.shape)


def _corridors(config: MazeConfig, rng: np.random.Generator) -> np.ndarray:
    """Walls and open cells uint8 [L]."""
    height, width = config.height, config.width
    # Rooms at even or odd places: with an even side, the wall that is left over is on either side.
    top = int(rng.integers(2)) if height % 2 == 0 else 0
    left = int(rng.integers(2)) if width % 2 == 0 else 0
    n_rows, n_columns = (height + 1) // 2, (width + 1) // 2

    def cell(row: int, column: int) -> int:  # in units of half a room
        return (top + row) * width + left + column

    cells = np.full(height * width, WALL, np.uint8)
    row, column = int(rng.integers(n_rows)), int(rng.integers(n_columns))
    seen = {(row, column)}
    walk = [(row, column)]
    cells[cell(2 * row, 2 * column)] = OPEN
    choices = rng.random(2 * n_rows * n_columns).tolist()  # the walk moves so often, there and back
    while walk:
        row, column = walk[-1]
        ahead = [
            (r, c)
            for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
            if 0 <= r < n_rows and 0 <= c < n_columns and (r, c) not in seen
        ]
        if not ahead:
            walk.pop()
            continue
        r, c = ahead[int(choices.pop() * len(ahead))]
        cells[cell(row + r, column + c)] = OPEN
        cells[cell(2 * r, 2 * c)] = OPEN
        seen.add((r, c))
        walk.append((r, c))
    between = [cell(2 * r + 1, 2 * c) for r in range(n_rows - 1) for c in range(n_columns)]
    between += [cell(2 * r, 2 * c + 1) for r in range(n_rows) for c in range(n_columns - 1)]
    closed = [c for c in between if cells[c] == WALL]
    n_opened = round(config.loops * len(closed))
    cells[rng.permutation(np.array(closed, np.int64))[:n_opened]] = OPEN
    return cells


def _beside(cell: int, grid: MazeConfig) -> list[int]:
    """The cells above, below, left and right."""
    return [
        cell + step
        for step, inside in (
            (-grid.width, cell >= grid.width),
            (grid.width, cell < (grid.height - 1) * grid.width),
            (-1, cell % grid.width > 0),
            (1, cell % grid.width < grid.width - 1),
        )
        if inside
    ]


def _distances(cells: np.ndarray, width: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Breadth-first search over cells that are no wall.

    Args:
      cells: tokens [L].
      width: columns.
      start: first cell.

    Returns:
      (steps int64 [L], -1 where there is no way; number of shortest paths float64 [L], so that
      many loops cannot overflow it).
    """
    # A border of walls saves the tests for the sides.
    padded = np.pad(cells.reshape(-1, width) != WALL, 1)
    stride = width + 2
    open_ = padded.ravel().tolist()
    distance, ways = [-1] * len(open_), [0.0] * len(open_)
    first = (start // width + 1) * stride + start % width + 1
    distance[first], ways[first] = 0, 1.0
    queue = deque([first])
    while queue:
        cell = queue.popleft()
        further, n_ways = distance[cell] + 1, ways[cell]
        for step in (-stride, stride, -1, 1):
            neighbour = cell + step
            if open_[neighbour]:
                if distance[neighbour] < 0:
                    distance[neighbour] = further
                    queue.append(neighbour)
                if distance[neighbour] == further:
                    ways[neighbour] += n_ways
    inner = (slice(1, -1), slice(1, -1))
    return (
        np.array(distance).reshape(padded.shape)[inner].ravel(),
        np.array(ways).reshape(padded.shape)[inner].ravel(),
    )


def maze_solved(inputs: np.ndarray, predictions: np.ndarray, width: int) -> np.ndarray:
    """Whether each prediction marks a shortest path, be it the label's or another one.

    Args:
      inputs: tokens integer [B, L].
      predictions: tokens integer [B, L]: walls, S and G as in the inputs, path cells marked.
      width: columns of the maze.

    Returns:
      bool [B].
    """
    return np.array(
        [_solved(maze, path, width) for maze, path in zip(inputs, predictions, strict=True)], bool
    )


def _solved(maze: np.ndarray, prediction: np.ndarray, width: int) -> bool:
    marked = prediction == PATH
    if (marked & (maze != OPEN)).any() or (prediction[~marked] != maze[~marked]).any():
        return False
    starts, goals = np.flatnonzero(maze == START), np.flatnonzero(maze == GOAL)
    if len(starts) != 1 or len(goals) != 1:
        return False  # not a maze, e.g. a row of padding
    distance, _ = _distances(maze, width, int(starts[0]))
    path = np.flatnonzero(marked)
    path = np.concatenate([starts, path[np.argsort(distance[path], kind="stable")], goals])
    if (distance[path] != np.arange(len(path))).any():
        return False
    rows, columns = np.divmod(path, width)
    return bool((np.abs(np.diff(rows)) + np.abs(np.diff(columns)) == 1).all())


def maze_classes(mazes: PuzzleSet) -> np.ndarray:
    """Hashes uint64 [N] that are equal for mazes that turns and mirrors take into each other.

    For `split_by_class`: on small grids two random mazes can be the same.
    """
    total = np.zeros(len(mazes), np.uint64)
    for order in cell_orders(mazes.height, mazes.width):
        turned = mazes.inputs[:, order].astype(np.uint64)
        key = np.zeros(len(mazes), np.uint64)
        for column in turned.T:
            key = mix(key + column)
        total += mix(key)
    return total
