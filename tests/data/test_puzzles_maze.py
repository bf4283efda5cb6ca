import numpy as np
import pytest

from slm_jax.data.puzzles import (
    MazeConfig,
    dihedral,
    generate_mazes,
    maze_classes,
    maze_solved,
    puzzle_batches,
)
from slm_jax.data.puzzles.dihedral import INVERSE, DihedralAugmentation, cell_orders
from slm_jax.data.puzzles.maze import CHARACTERS, GOAL, OPEN, PATH, START, WALL
from slm_jax.errors import UserError


def tokens(text: str) -> np.ndarray:
    return np.array([CHARACTERS.index(c) + 1 for c in text.replace("\n", "")])


def steps_from(maze: np.ndarray, source: int) -> np.ndarray:
    """Distances by relaxation over the whole grid [h, w], sharing nothing with the generator."""
    steps = np.where(maze == source, 0.0, np.inf)
    while True:
        padded = np.pad(steps, 1, constant_values=np.inf)
        best = np.minimum.reduce(
            [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        )
        new = np.where(maze == WALL, np.inf, np.minimum(steps, best + 1))
        if (new == steps).all():
            return steps
        steps = new


CONFIGS = pytest.mark.parametrize(
    "config",
    [
        MazeConfig(30, 30, min_path=111),
        MazeConfig(30, 30, min_path=80, loops=0.1),
        MazeConfig(12, 9, min_path=10, loops=0.3, unique=False),
        MazeConfig(5, 8),
        MazeConfig(3, 3, min_path=6),
    ],
)


@CONFIGS
def test_labels_are_shortest_paths(config: MazeConfig) -> None:
    mazes = generate_mazes(config, 10, seed=0)
    assert mazes.inputs.shape == (10, config.height * config.width)
    assert maze_solved(mazes.inputs, mazes.labels, config.width).all()
    assert not maze_solved(mazes.inputs, mazes.inputs, config.width).any() or config.min_path == 1
    for maze, label in zip(mazes.inputs, mazes.labels, strict=True):
        grid = maze.reshape(config.height, config.width)
        assert set(maze.tolist()) <= {WALL, OPEN, START, GOAL}
        assert (maze == START).sum() == (maze == GOAL).sum() == 1
        np.testing.assert_array_equal(np.where(label == PATH, OPEN, label), maze)
        steps = steps_from(grid, START)
        assert np.isfinite(steps[grid != WALL]).all()  # all open cells are connected
        length = steps[grid == GOAL][0]
        assert length == (label == PATH).sum() + 1 >= config.min_path
        # Cells on some shortest path; with a single one there is one cell for each distance.
        back = steps_from(grid, GOAL)
        on_path = (steps + back == length) & (grid != WALL)
        if config.unique:
            np.testing.assert_array_equal(
                on_path.ravel(), (label == PATH) | (label == START) | (label == GOAL)
            )


def test_without_loops_the_corridors_are_a_tree() -> None:
    for maze in generate_mazes(MazeConfig(30, 30), 5, seed=0).inputs.reshape(5, 30, 30):
        open_ = maze != WALL
        n_edges = (open_[1:] & open_[:-1]).sum() + (open_[:, 1:] & open_[:, :-1]).sum()
        assert open_.sum() == n_edges + 1 == 2 * 15 * 15 - 1
    more = generate_mazes(MazeConfig(30, 30, loops=0.5), 5, seed=0)
    assert ((more.inputs != WALL).sum(1) == 449 + 98).all()  # half of the 196 walls that were left


def test_a_maze_depends_on_seed_and_index_only() -> None:
    config = MazeConfig(11, 11, min_path=12)
    many, few = generate_mazes(config, 6, seed=1), generate_mazes(config, 3, seed=1)
    np.testing.assert_array_equal(many.inputs[:3], few.inputs)
    np.testing.assert_array_equal(many.labels[:3], few.labels)
    assert (generate_mazes(config, 3, seed=2).inputs != few.inputs).any(1).all()
    assert (many.vocab_size, many.n_puzzle_ids, many.puzzle_ids.any()) == (6, 1, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"height": 31}, r"height=31 is not in \[3, 30\]"),
        ({"width": 2}, r"width=2 is not in \[3, 30\]"),
        ({"loops": 1.5}, "loops=1.5 is not in"),
        ({"min_path": 0}, "min_path=0: a path in a maze of 30 x 30 has 1 to 448 steps"),
        ({"height": 4, "width": 4, "min_path": 7}, "has 1 to 6 steps"),
    ],
)
def test_impossible_mazes_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MazeConfig(**fields)


def test_mazes_that_do_not_come_about_are_refused() -> None:
    # All walls open: no path is longer than from corner to corner.
    with pytest.raises(UserError, match="min_path=17: 200 mazes of 8 x 8 with loops=1"):
        generate_mazes(MazeConfig(8, 8, min_path=17, loops=1), 1, seed=0)
    with pytest.raises(UserError, match="n_mazes=0"):
        generate_mazes(MazeConfig(8, 8), 0, seed=0)


MAZE = tokens("S  ### #   G #  ")


@pytest.mark.parametrize(
    ("path", "solved"),
    [
        ("Soo###o#  oG #  ", True),
        ("S  ### #   G #  ", False),  # no path
        ("Soo###o#   G #  ", False),  # a gap
        ("Soo###o#  oG # o", False),  # a cell too many
        ("Soo###o#   G #oo", False),  # not connected, right number
        ("Soo###o#  oS #  ", False),  # the goal is gone
        ("Soo ##o#  oG #  ", False),  # a wall is gone
        ("Soo###o#  oG #o ", False),
        ("Sooo## o   G #  ", False),  # through walls
    ],
)
def test_check_of_a_path(path: str, solved: bool) -> None:
    assert maze_solved(MAZE[None], tokens(path)[None], 4).tolist() == [solved]


def test_any_shortest_path_is_right_and_a_longer_one_is_not() -> None:
    maze = tokens("S       G")
    paths = ["Soo  o  G", "S  oo  oG", "So  oo  G", "S  o  ooG"]
    predictions = np.stack([tokens(path) for path in paths])
    assert maze_solved(np.tile(maze, (4, 1)), predictions, 3).all()
    longer = tokens("S Go#oooo"), tokens("S G #    ")
    assert not maze_solved(longer[1][None], longer[0][None], 3).any()
    assert not maze_solved(np.zeros((1, 9), int), np.zeros((1, 9), int), 3).any()  # padding


def test_dihedral_symmetries_are_a_group() -> None:
    grid = np.arange(12).reshape(3, 4)
    images = [dihedral(grid, k) for k in range(8)]
    assert len({(image.shape, image.tobytes()) for image in images}) == 8
    for k in range(8):
        np.testing.assert_array_equal(dihedral(images[k], INVERSE[k]), grid)
        for j in range(8):  # closed
            both = dihedral(images[k], j)
            same = [both.shape == i.shape and bool((both == i).all()) for i in images]
            assert sum(same) == 1
    np.testing.assert_array_equal(images[6], grid.T)
    np.testing.assert_array_equal(dihedral(np.stack([grid, grid + 1]), 7)[1], images[7] + 1)
    with pytest.raises(ValueError, match="which=8"):
        dihedral(grid, 8)


@pytest.mark.parametrize(("height", "width", "n"), [(6, 6, 8), (5, 8, 4)])
def test_a_turned_maze_has_the_turned_solution(height: int, width: int, n: int) -> None:
    mazes = generate_mazes(MazeConfig(height, width, min_path=4), 20, seed=0)
    orders = cell_orders(height, width)
    assert len(orders) == n
    for order in orders:
        turned = mazes.inputs[:, order], mazes.labels[:, order]
        assert maze_solved(*turned, width).all()
        again = [mazes.inputs[:, order][:, back] for back in orders]
        assert any((a == mazes.inputs).all() for a in again)  # it has an inverse
    one = mazes.take(slice(1))
    batch = next(puzzle_batches(one, batch_size=200, seed=0, augment=True))
    assert len(np.unique(batch["inputs"], axis=0)) == n
    assert maze_solved(batch["inputs"], batch["labels"], width).all()
    assert isinstance(mazes.augmentation, DihedralAugmentation)


def test_classes_of_mazes() -> None:
    mazes = generate_mazes(MazeConfig(7, 7), 30, seed=0)
    classes = maze_classes(mazes)
    assert len(np.unique(classes)) == 30
    turned = generate_mazes(MazeConfig(7, 7), 30, seed=0)
    turned.inputs[:] = np.stack(
        [dihedral(m.reshape(7, 7), i % 8).ravel() for i, m in enumerate(turned.inputs)]
    )
    np.testing.assert_array_equal(maze_classes(turned), classes)
