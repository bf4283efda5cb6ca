"""What a run is trained and scored on: a configuration in, three sets of puzzles out."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm_jax.data.puzzles.arc import ArcTask, load_arc, without_tasks_of
from slm_jax.data.puzzles.arc_variants import (
    ArcVariants,
    arc_test_set,
    arc_train_set,
    arc_variants,
)
from slm_jax.data.puzzles.maze import MazeConfig, generate_mazes, maze_classes
from slm_jax.data.puzzles.puzzle_set import PuzzleSet, split_by_class
from slm_jax.data.puzzles.sudoku import (
    generate_sudoku,
    load_sudoku,
    split_sudoku,
    sudoku_grids,
)
from slm_jax.data.puzzles.sudoku_symmetry import sudoku_classes
from slm_jax.errors import UserError


@dataclass(frozen=True)
class SudokuGenerated:
    """Locally minimal Sudokus, made here; no test puzzle is a training puzzle in disguise."""

    size: int = 6
    """Side: 6 or 9."""
    n_train: int = 1000
    """Training puzzles; each is drawn in a new variant every time."""
    n_valid: int = 200
    """Puzzles scored during training."""
    n_test: int = 1000
    """Puzzles scored once, at the end."""
    seed: int = 0
    """Of puzzles and split."""


@dataclass(frozen=True)
class SudokuFiles:
    """Sudokus from CSV files with the columns puzzle and solution (or question and answer)."""

    train: Path = Path("data/sudoku-extreme/train.csv")
    """Training puzzles; `.csv` or `.csv.gz`."""
    test: Path = Path("data/sudoku-extreme/test.csv")
    """Puzzles to score."""
    n_train: int | None = 1000
    """Draw so many; `None` is all, less `n_valid`. Those that are equivalent to a puzzle that is
    scored are left out, so there may be fewer."""
    n_valid: int = 200
    """Puzzles of the training file kept back and scored during training."""
    n_test: int | None = 1000
    """Draw so many; `None` is all."""
    seed: int = 0
    """Of the draws."""


@dataclass(frozen=True)
class Mazes:
    """Mazes with their shortest path, made here."""

    maze: MazeConfig = MazeConfig()
    """Size and difficulty."""
    n_train: int = 1000
    """Training mazes."""
    n_valid: int = 100
    """Mazes scored during training."""
    n_test: int = 1000
    """Mazes scored once, at the end."""
    augment: bool = True
    """Turn and mirror the training mazes."""
    seed: int = 0
    """Of mazes and split."""


@dataclass(frozen=True)
class ArcTasks:
    """ARC-AGI tasks, each in many variants; scored by the vote over them."""

    training: tuple[Path, ...] = (Path("data/arc-agi/training.json"),)
    """Files of tasks to train on, their tests included; JSON of id to task, `.gz` or not."""
    evaluation: Path = Path("data/arc-agi/evaluation.json")
    """Tasks that are asked; their demonstrations are trained on, their tests are not."""
    n_variants: int = 1000
    """Most variants of a task beside itself: turned, mirrored, with permuted colours."""
    n_valid: int = 200
    """Of the asked grids, so many are scored during training too, each in its own form only."""
    seed: int = 0
    """Of the variants."""


PuzzleData = SudokuGenerated | SudokuFiles | Mazes | ArcTasks


class ArcQuestions(NamedTuple):
    """What two attempts at the tests of ARC tasks are voted from.

    Attributes:
        variants: the table of puzzle ids.
        tasks: the tasks that are asked.
        asked: their test inputs in all variants.
    """

    variants: ArcVariants
    tasks: dict[str, ArcTask]
    asked: PuzzleSet


@dataclass(frozen=True, eq=False)
class PuzzleSplits:
    """Opened data of a run.

    Attributes:
        train: to draw from.
        valid: scored during training.
        test: scored at the end.
        augment: whether training puzzles are drawn in random variants.
        arc: for ARC only; its `test` has every question once, as it is asked.
    """

    train: PuzzleSet
    valid: PuzzleSet
    test: PuzzleSet
    augment: bool = True
    arc: ArcQuestions | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all puzzles."""
        digest = hashlib.sha256()
        for puzzles in (self.train, self.valid, self.test):
            for array in (puzzles.inputs, puzzles.labels, puzzles.puzzle_ids):
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


def open_puzzles(config: PuzzleData) -> PuzzleSplits:
    """Makes or reads the puzzles of a run.

    Raises:
        UserError: a number below 1, a file that cannot be read, a bad puzzle, too few of them.
    """
    for name in ("n_train", "n_valid", "n_test"):
        number = getattr(config, name, None)
        if number is not None and number < 1:
            raise UserError(f"{name}={number}: choose at least 1")
    match config:
        case SudokuGenerated():
            return _generated_sudoku(config)
        case SudokuFiles():
            return _sudoku_files(config)
        case Mazes():
            return _mazes(config)
        case ArcTasks():
            return _arc(config)


def _generated_sudoku(config: SudokuGenerated) -> PuzzleSplits:
    held = config.n_valid + config.n_test
    # Some more than asked for: equivalent puzzles leave the training side with their class.
    n = config.n_train + held + (config.n_train + held) // 10 + 10
    # 6x6 has 49 classes of solutions only: a split by them would test on two or three.
    by = "puzzle" if config.size == 6 else "solution"
    puzzles = generate_sudoku(config.size, n, seed=config.seed)
    train, rest = split_sudoku(puzzles, held, seed=config.seed, by=by)
    _check_enough(train, config.n_train, held)
    return PuzzleSplits(
        train.take(slice(config.n_train)),
        rest.take(slice(config.n_valid)),
        rest.take(slice(config.n_valid, None)),
    )


def _check_enough(train: PuzzleSet, n_train: int, held: int) -> None:
    if len(train) < n_train:
        raise UserError(
            f"n_train={n_train}: {len(train)} puzzles are left beside {held} to score, the "
            "others are equivalent to those: choose fewer"
        )


def _sudoku_files(config: SudokuFiles) -> PuzzleSplits:
    limit = None if config.n_train is None else config.n_train + config.n_valid
    puzzles = load_sudoku(config.train, limit=limit, seed=config.seed)
    test = load_sudoku(config.test, limit=config.n_test, seed=config.seed)
    if test.height != puzzles.height:
        raise UserError(
            f"test={config.test} holds puzzles of side {test.height}, train={config.train} of "
            f"{puzzles.height}: give files of one size"
        )
    # Augmentation would turn them into the test puzzles.
    tested = np.isin(_sudoku_classes(puzzles), _sudoku_classes(test))
    if tested.all():
        raise UserError(
            f"train={config.train} holds no puzzle that is not equivalent to one of "
            f"test={config.test}: give files of different puzzles"
        )
    puzzles = puzzles.take(~tested)
    train, valid = split_sudoku(puzzles, config.n_valid, seed=config.seed, by="puzzle")
    return PuzzleSplits(train, valid, test)


def _sudoku_classes(puzzles: PuzzleSet) -> np.ndarray:
    return sudoku_classes(sudoku_grids(puzzles.inputs), sudoku_grids(puzzles.labels), by="puzzle")


def _mazes(config: Mazes) -> PuzzleSplits:
    held = config.n_valid + config.n_test
    n = config.n_train + held + (config.n_train + held) // 10 + 10  # as for Sudokus
    mazes = generate_mazes(config.maze, n, seed=config.seed)
    train, rest = split_by_class(mazes, maze_classes(mazes), held, seed=config.seed)
    _check_enough(train, config.n_train, held)
    return PuzzleSplits(
        train.take(slice(config.n_train)),
        rest.take(slice(config.n_valid)),
        rest.take(slice(config.n_valid, None)),
        config.augment,
    )


def _arc(config: ArcTasks) -> PuzzleSplits:
    evaluation = load_arc(config.evaluation)
    for name, task in evaluation.items():
        if any(pair.output is None for pair in task.test):  # before a long run, not after it
            raise UserError(
                f"evaluation={config.evaluation}: task {name} has no test output, so it cannot be "
                "scored: give tasks with known outputs"
            )
    training: dict[str, ArcTask] = {}
    for path in config.training:
        # Files overlap: ARC-AGI-2 repeats tasks of ARC-AGI-1.
        training |= without_tasks_of(load_arc(path), evaluation)
    variants = arc_variants(training | evaluation, config.n_variants, seed=config.seed)
    asked = arc_test_set(evaluation, variants, max_variants=1)
    return PuzzleSplits(
        arc_train_set(training, evaluation, variants),
        asked.take(slice(config.n_valid)),
        asked,
        arc=ArcQuestions(variants, evaluation, arc_test_set(evaluation, variants)),
    )
