"""What a run is trained and scored on: sizes, no leak between the parts, errors, fingerprint."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm_jax.data.puzzles import (
    ArcTasks,
    MazeConfig,
    Mazes,
    PuzzleData,
    PuzzleSet,
    PuzzleSplits,
    SudokuFiles,
    SudokuGenerated,
    dihedral,
    generate_sudoku,
    maze_solved,
    open_puzzles,
    sudoku_grids,
)
from slm_jax.data.puzzles.sudoku_symmetry import SudokuAugmentation
from slm_jax.data.puzzles.words import words
from slm_jax.errors import UserError

SIX = SudokuGenerated(6, n_train=60, n_valid=10, n_test=20)
NINE = SudokuGenerated(9, n_train=20, n_valid=3, n_test=5)
MAZES = Mazes(MazeConfig(5, 5), n_train=50, n_valid=10, n_test=20)


def write_csv(file: Path, puzzles: PuzzleSet) -> None:
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["puzzle", "solution"])
        for tokens in zip(puzzles.inputs, puzzles.labels, strict=True):
            writer.writerow(["".join(map(str, sudoku_grids(t).ravel())) for t in tokens])


def grid(seed: int, side: int) -> list[list[int]]:
    cells: list[list[int]] = np.random.default_rng(seed).integers(0, 10, (side, side)).tolist()
    return cells


def arc_task(seed: int, n_train: int = 2) -> dict[str, Any]:
    """Demonstrations and one test, of grids 2x2 to 3x3."""

    def pair(i: int) -> dict[str, Any]:
        return {"input": grid(100 * seed + i, 2), "output": grid(100 * seed + i + 50, 3)}

    return {"train": [pair(i) for i in range(n_train)], "test": [pair(n_train)]}


@pytest.fixture
def files(tmp_path: Path) -> SudokuFiles:
    puzzles = generate_sudoku(6, 60, seed=3)
    write_csv(tmp_path / "train.csv", puzzles.take(slice(40)))
    write_csv(tmp_path / "test.csv", puzzles.take(slice(40, None)))
    return SudokuFiles(
        tmp_path / "train.csv", tmp_path / "test.csv", n_train=None, n_valid=8, n_test=12
    )


@pytest.fixture
def arc(tmp_path: Path) -> ArcTasks:
    (tmp_path / "training.json").write_text(json.dumps({"a": arc_task(1), "b": arc_task(2)}))
    (tmp_path / "evaluation.json").write_text(json.dumps({"c": arc_task(3), "d": arc_task(4, 3)}))
    return ArcTasks(
        (tmp_path / "training.json",), tmp_path / "evaluation.json", n_variants=5, n_valid=1
    )


def sizes(splits: PuzzleSplits) -> tuple[int, int, int]:
    return len(splits.train), len(splits.valid), len(splits.test)


def sudoku_variants(puzzles: PuzzleSet, n: int) -> set[bytes]:
    """Each puzzle itself and in `n` random variants."""
    group = SudokuAugmentation(puzzles.height)
    found = {row.tobytes() for row in puzzles.inputs.astype(np.uint8)}
    for i in range(n):
        g = group.draw(words(i, np.arange(len(puzzles)), n_words=group.n_words))
        found |= {row.tobytes() for row in g.on_tokens(puzzles.inputs).astype(np.uint8)}
    return found


@pytest.mark.parametrize("config", [SIX, NINE], ids=["6x6", "9x9"])
def test_generated_sudokus(config: SudokuGenerated) -> None:
    splits = open_puzzles(config)
    assert sizes(splits) == (config.n_train, config.n_valid, config.n_test)
    assert splits.augment
    assert splits.arc is None
    everything = [splits.train, splits.valid, splits.test]
    rows = {row.tobytes() for part in everything for row in part.inputs}
    assert len(rows) == sum(sizes(splits))
    trained = sudoku_variants(splits.train, 100)
    assert len(trained) > 90 * config.n_train
    for part in everything[1:]:
        assert trained.isdisjoint(row.tobytes() for row in part.inputs.astype(np.uint8))


def test_sudokus_from_files(files: SudokuFiles) -> None:
    splits = open_puzzles(files)
    assert sizes(splits) == (32, 8, 12)
    drawn = open_puzzles(replace(files, n_train=20, n_test=None))
    assert sizes(drawn) == (20, 8, 20)
    for part in (drawn.valid, drawn.test):
        assert sudoku_variants(drawn.train, 100).isdisjoint(r.tobytes() for r in part.inputs)


def test_training_puzzles_that_are_tested_in_disguise_are_left_out(files: SudokuFiles) -> None:
    test = open_puzzles(files).test
    group = SudokuAugmentation(6)
    g = group.draw(words(7, np.arange(12), n_words=group.n_words))
    disguised = replace(test, inputs=g.on_tokens(test.inputs), labels=g.on_tokens(test.labels))
    others = generate_sudoku(6, 20, seed=9)
    both = {name: np.concatenate([getattr(disguised, name), getattr(others, name)])
            for name in ("inputs", "labels", "puzzle_ids")}  # fmt: skip
    write_csv(files.train, replace(others, **both))
    splits = open_puzzles(replace(files, n_valid=4))
    assert sizes(splits) == (16, 4, 12)
    own = {row.tobytes() for row in others.inputs}
    assert {row.tobytes() for p in (splits.train, splits.valid) for row in p.inputs} == own
    write_csv(files.train, disguised)
    with pytest.raises(UserError, match="holds no puzzle that is not equivalent to one of test="):
        open_puzzles(replace(files, n_valid=4))


def test_mazes() -> None:
    splits = open_puzzles(MAZES)
    assert sizes(splits) == (50, 10, 20)
    assert splits.augment
    assert not open_puzzles(replace(MAZES, augment=False)).augment
    turned = {
        dihedral(maze.reshape(5, 5), which).tobytes()
        for maze in splits.train.inputs
        for which in range(8)
    }
    for part in (splits.valid, splits.test):
        assert turned.isdisjoint(maze.tobytes() for maze in part.inputs)
        assert maze_solved(part.inputs, part.labels, 5).all()


def test_arc(arc: ArcTasks) -> None:
    splits = open_puzzles(arc)
    assert splits.arc is not None
    variants = splits.arc.variants
    assert variants.names == ("a", "b", "c", "d")
    # All of a and b, the demonstrations of c and d; each question once, and in all variants.
    assert sizes(splits) == (3 + 3 + 2 + 3, 1, 2)
    assert len(splits.arc.asked) == len(variants.ids("c")) + len(variants.ids("d"))
    assert splits.test.puzzle_ids.tolist() == [variants.ids(name)[0] for name in "cd"]
    assert set(splits.arc.tasks) == {"c", "d"}
    trained = {row.tobytes() for row in splits.train.inputs}
    assert trained.isdisjoint(row.tobytes() for row in splits.arc.asked.inputs)
    assert splits.valid.inputs.tobytes() == splits.test.inputs[:1].tobytes()


def test_arc_tasks_of_the_evaluation_are_not_trained_on(arc: ArcTasks) -> None:
    plain = open_puzzles(arc).fingerprint
    # One by name, one under another name by its test.
    more = {"a": arc_task(1), "b": arc_task(2), "c": arc_task(3), "z": arc_task(4, 3)}
    arc.training[0].write_text(json.dumps(more))
    assert open_puzzles(arc).fingerprint == plain


def test_arc_tests_without_an_output_are_refused(arc: ArcTasks) -> None:
    task = arc_task(3)
    del task["test"][0]["output"]
    arc.evaluation.write_text(json.dumps({"c": task}))
    with pytest.raises(UserError, match="task c has no test output"):
        open_puzzles(arc)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(SIX, n_train=0), "n_train=0: choose at least 1"),
        (replace(SIX, n_valid=0), "n_valid=0"),
        (replace(MAZES, n_test=-1), "n_test=-1"),
        (SudokuFiles(n_test=0), "n_test=0"),
        (ArcTasks(n_valid=0), "n_valid=0"),
        (SudokuGenerated(5), "size=5: choose 4"),
        (SudokuGenerated(4, 10, 2, 2), "size=4: augmentation turns the training puzzles into"),
        (
            Mazes(MazeConfig(3, 3, min_path=4), 100, 10, 20),
            "n_train=100: .* left beside 30 to score",
        ),
        (SudokuFiles(Path("none.csv")), "path=none.csv cannot be read"),
        (ArcTasks(evaluation=Path("none.json")), "path=none.json cannot be read"),
    ],
)
def test_what_cannot_be_opened_is_refused(config: PuzzleData, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_puzzles(config)


def test_files_of_two_sizes_are_refused(files: SudokuFiles) -> None:
    write_csv(files.test, generate_sudoku(9, 3, seed=0))
    with pytest.raises(UserError, match=r"holds puzzles of side 9, train=.* of 6"):
        open_puzzles(files)
    files.test.write_text(f"puzzle,solution\n{'.' * 36},{'.' * 36}\n")
    with pytest.raises(UserError, match=r"test.csv:2: solution has empty cells"):
        open_puzzles(files)


def test_fingerprint_is_of_the_puzzles(files: SudokuFiles) -> None:
    plain = open_puzzles(SIX)
    assert open_puzzles(SIX).fingerprint == plain.fingerprint
    assert len(plain.fingerprint) == 64
    others = [replace(SIX, seed=1), replace(SIX, n_test=19), replace(MAZES, seed=1), MAZES]
    found = {open_puzzles(config).fingerprint for config in others}
    assert len(found | {plain.fingerprint}) == 5
    for name in ("inputs", "labels"):
        changed = getattr(plain.test, name).copy()
        changed[-1, -1] ^= 1  # one cell of one puzzle
        test = replace(plain.test, **{name: changed})
        assert replace(plain, test=test).fingerprint != plain.fingerprint
    before = open_puzzles(files).fingerprint
    text = files.test.read_text().splitlines(keepends=True)
    files.test.write_text("".join(text[:-9]))
    assert open_puzzles(files).fingerprint != before
