import functools
import gzip
import itertools

import numpy as np
import pytest

from slm_jax.data.puzzles import (
    PuzzleSet,
    SudokuSymmetry,
    format_sudoku,
    generate_sudoku,
    load_sudoku,
    parse_sudoku,
    solve_sudoku,
    split_sudoku,
    sudoku_classes,
    sudoku_grids,
    sudoku_set,
    sudoku_tokens,
)
from slm_jax.data.puzzles.sudoku_solver import (
    BOXES,
    minimal_puzzles,
    random_solutions,
    solve,
    units,
)
from slm_jax.data.puzzles.sudoku_symmetry import SudokuAugmentation
from slm_jax.data.puzzles.words import words
from slm_jax.errors import UserError

# The puzzle of the Wikipedia article "Sudoku".
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
SIZES = pytest.mark.parametrize("size", [4, 6, 9])


def all_solutions(grid: np.ndarray, limit: int) -> list[np.ndarray]:
    """Brute force in cell order, sharing nothing with the solver."""
    size = len(grid)
    height, width = BOXES[size]
    if grid.all():
        return [grid.copy()]
    r, c = np.argwhere(grid == 0)[0]
    top, left = r // height * height, c // width * width
    found: list[np.ndarray] = []
    for digit in range(1, size + 1):
        box = grid[top : top + height, left : left + width]
        if digit in grid[r] or digit in grid[:, c] or digit in box:
            continue
        grid[r, c] = digit
        found += all_solutions(grid, limit - len(found))
        grid[r, c] = 0
        if len(found) >= limit:
            break
    return found


def is_valid(grids: np.ndarray) -> bool:
    size = grids.shape[-1]
    members = np.sort(grids.reshape(len(grids), -1)[:, units(size)], axis=-1)
    return bool((members == np.arange(1, size + 1)).all())


@functools.cache
def some(size: int) -> PuzzleSet:
    """30 puzzles that several tests read."""
    return generate_sudoku(size, 30, seed=2)


def symmetries(size: int, n: int, seed: int = 0) -> SudokuSymmetry:
    augmentation = SudokuAugmentation(size)
    return augmentation.draw(words(seed, np.arange(n), n_words=augmentation.n_words))


def test_solver_counts_all_grids_of_4x4() -> None:
    _, counts = solve(np.zeros((1, 4, 4), int), limit=1000)
    assert counts == [288]


@SIZES
def test_solver_agrees_with_brute_force(size: int) -> None:
    rng = np.random.default_rng(size)
    grids = random_solutions(size, 30, seed=1)
    kept = {4: 0.4, 6: 0.45, 9: 0.6}[size]
    puzzles = np.where(rng.random(grids.shape) < kept, grids, 0)
    puzzles[-5:, 0, 0] = puzzles[-5:, 0, 0] % size + 1  # another clue: often no solution
    solutions, counts = solve(puzzles, limit=5)
    want = [all_solutions(puzzle.astype(int), 5) for puzzle in puzzles]
    # Brute force does not look for contradictions among the clues.
    assert counts.tolist() == [len(w) if w and is_valid(np.array(w)) else 0 for w in want]
    assert len(set(counts.tolist())) > 2
    solved = counts > 0
    assert is_valid(solutions[solved])
    np.testing.assert_array_equal(np.where(puzzles > 0, solutions, 0)[solved], puzzles[solved])
    assert not solutions[~solved].any()


@pytest.mark.parametrize(
    ("clues", "count"),
    [("55" + "." * 79, 0), ("." * 81, 2), (PUZZLE, 1), (SOLUTION, 1), ("6" + PUZZLE[1:], 0)],
)
def test_solver_sees_contradictions_and_freedom(clues: str, count: int) -> None:
    grid = np.array([int(c) for c in clues.replace(".", "0")]).reshape(1, 9, 9)
    assert solve(grid)[1] == [count]


@SIZES
def test_generated_puzzles_are_minimal_and_have_one_solution(size: int) -> None:
    puzzles = some(size)
    grids, solutions = sudoku_grids(puzzles.inputs), sudoku_grids(puzzles.labels)
    assert is_valid(solutions)
    found, counts = solve(grids)
    assert (counts == 1).all()
    np.testing.assert_array_equal(found, solutions)
    np.testing.assert_array_equal(np.where(grids > 0, solutions, 0), grids)
    for grid in grids[:10]:  # without any one clue there are several solutions
        clues = np.argwhere(grid)
        fewer = np.repeat(grid[None], len(clues), 0)
        fewer[np.arange(len(clues)), clues[:, 0], clues[:, 1]] = 0
        assert (solve(fewer)[1] == 2).all()
    assert puzzles.vocab_size == size + 2
    assert (puzzles.height, puzzles.width, puzzles.n_puzzle_ids) == (size, size, 1)


def test_a_puzzle_depends_on_seed_and_index_only() -> None:
    many, few = generate_sudoku(6, 9, seed=3), generate_sudoku(6, 4, seed=3)
    np.testing.assert_array_equal(many.inputs[:4], few.inputs)
    np.testing.assert_array_equal(many.labels[:4], few.labels)
    assert (generate_sudoku(6, 4, seed=4).labels != few.labels).any(1).all()
    solutions = random_solutions(6, 300, seed=0)
    assert len({grid.tobytes() for grid in solutions}) == 300
    assert minimal_puzzles(solutions[:2], seed=1).tolist() != (
        minimal_puzzles(solutions[:2], seed=2).tolist()
    )


@pytest.mark.parametrize(("size", "n"), [(5, 1), (6, 0)])
def test_generator_refuses(size: int, n: int) -> None:
    with pytest.raises(UserError, match=r"size=5: choose 4|n_puzzles=0"):
        generate_sudoku(size, n, seed=0)


def test_parse_format_and_solve() -> None:
    grid = parse_sudoku(PUZZLE)
    assert grid.shape == (9, 9)
    assert format_sudoku(grid).splitlines()[:4] == [
        "5 3 . | . 7 . | . . .",
        "6 . . | 1 9 5 | . . .",
        ". 9 8 | . . . | . 6 .",
        "------+-------+------",
    ]
    np.testing.assert_array_equal(parse_sudoku(format_sudoku(grid)), grid)
    np.testing.assert_array_equal(parse_sudoku(PUZZLE.replace(".", "0") + "\n"), grid)
    solution = solve_sudoku(grid)
    np.testing.assert_array_equal(solution, parse_sudoku(SOLUTION))
    for size in (4, 6):
        one = sudoku_grids(some(size).inputs)[0]
        np.testing.assert_array_equal(parse_sudoku(format_sudoku(one)), one)
    tokens = sudoku_tokens(grid)
    assert tokens.min() == 1
    assert tokens[0] == 6  # 5
    np.testing.assert_array_equal(sudoku_grids(tokens), grid)


BAD = {
    "80 cells": (PUZZLE[:-1], "has 80 cells: a Sudoku has 16, 36 or 81"),
    "empty": ("", "has 0 cells"),
    "letter": ("5x" + PUZZLE[2:], "has 'x' in row 1, column 2: use 1 to 9"),
    "not latin": ("5日" + PUZZLE[2:], "has '日' in row 1, column 2"),
    "slash": ("5/" + PUZZLE[2:], "has '/' in row 1"),
    "digit of a larger one": ("." * 35 + "7", "has '7' in row 6, column 6: use 1 to 6"),
    "row": ("535" + PUZZLE[3:], "has the digit 5 twice in row 1"),
    "column": (PUZZLE[:9] + "5" + PUZZLE[10:], "has the digit 5 twice in"),
    "box": ("5.........5" + "." * 70, "has the digit 5 twice in box 1"),
}
UNSOLVABLE = "12345678.........9" + "." * 63
SEVERAL = {
    "no solution": (UNSOLVABLE, "has no solution"),
    "several": ("." + PUZZLE[1:9] + "." * 9 + PUZZLE[18:], "has several solutions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_refused(name: str) -> None:
    text, message = BAD[name]
    with pytest.raises(UserError) as error:
        parse_sudoku(text, where="board")
    assert message in str(error.value)
    assert str(error.value).startswith("board has ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SEVERAL)
def test_puzzles_without_one_solution_are_refused(name: str) -> None:
    text, message = SEVERAL[name]
    with pytest.raises(UserError, match=message):
        solve_sudoku(parse_sudoku(text))


@pytest.mark.parametrize("header", ["puzzle,solution,guesses", "source,question,answer,rating"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_loader_reads_both_kinds_of_file(tmp_path, header: str, suffix: str) -> None:
    made = some(9).take(slice(8))
    lines = [header]
    for puzzle, solution in zip(made.inputs, made.labels, strict=True):
        texts = ["".join(".123456789"[t - 1] for t in tokens) for tokens in (puzzle, solution)]
        lines.append(",".join([*texts, "3"] if header[0] == "p" else ["x", *texts, "3"]))
    file = tmp_path / f"some{suffix}"
    with (gzip.open if suffix.endswith("gz") else open)(file, "wt") as out:
        out.write("\n".join([*lines, "", ""]))
    loaded = load_sudoku(file)
    assert loaded.name == "some"
    np.testing.assert_array_equal(loaded.inputs, made.inputs)
    np.testing.assert_array_equal(loaded.labels, made.labels)
    drawn = load_sudoku(file, limit=3, seed=1)
    again = load_sudoku(file, limit=3, seed=1)
    np.testing.assert_array_equal(drawn.inputs, again.inputs)
    rows = [int((made.inputs == row).all(1).argmax()) for row in drawn.inputs]
    assert rows == sorted(set(rows))
    assert len(load_sudoku(file, limit=100)) == 8


HEADER = "puzzle,solution\n"
GOOD = f"{PUZZLE},{SOLUTION}\n"
FILES = {
    **{name: (f"{text},{SOLUTION}", message) for name, (text, message) in BAD.items()},
    **{
        name: (f"{text},{SOLUTION}", "differs from the clues" if name[0] == "n" else message)
        for name, (text, message) in SEVERAL.items()
    },
    "other solution": (f"{PUZZLE},{SOLUTION[9:] + SOLUTION[:9]}", "twice in box 1"),
    "not its solution": (
        f"{PUZZLE},{SOLUTION.translate(str.maketrans('12', '21'))}",
        "solution differs from the clues of its puzzle",
    ),
    "unfinished": (f"{PUZZLE},{PUZZLE}", "solution has empty cells"),
    "one column": (PUZZLE, "1 columns, the header has 2"),
    "another size": (f"{'.' * 36},{'.' * 36}", "puzzle has 36 cells, the first puzzle 81"),
    "solution of another size": (f"{PUZZLE},{'.' * 16}", "solution has 16 cells"),
}


@pytest.mark.parametrize("name", FILES)
def test_loader_names_file_and_line(tmp_path, name: str) -> None:
    line, message = FILES[name]
    file = tmp_path / "bad.csv"
    file.write_text(HEADER + GOOD + line + "\n" + GOOD)
    with pytest.raises(UserError) as error:
        load_sudoku(file)
    assert str(error.value).startswith(f"{file}:3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_loader_refuses_files(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_sudoku(tmp_path / "none.csv")
    for name, text, message in (
        ("a.csv", "", ":1: columns are ''"),
        ("b.csv", "quiz,answer\n", ":1: columns are 'quiz,answer'"),
        ("c.csv", HEADER, "has no puzzles"),
        ("d.csv.gz", HEADER, "cannot be read"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            load_sudoku(tmp_path / name)
    (tmp_path / "good.csv").write_text(HEADER + GOOD)
    with pytest.raises(UserError, match="limit=0"):
        load_sudoku(tmp_path / "good.csv", limit=0)
    several = HEADER + f"{SEVERAL['several'][0]},{SOLUTION}\n"
    (tmp_path / "several.csv").write_text(several)
    assert len(load_sudoku(tmp_path / "several.csv", check_unique=False)) == 1


@SIZES
def test_a_permuted_puzzle_has_the_permuted_solution(size: int) -> None:
    puzzles = some(size)
    grids, solutions = sudoku_grids(puzzles.inputs), sudoku_grids(puzzles.labels)
    g = symmetries(size, 30)
    moved = g(grids)
    found, counts = solve(moved)
    assert (counts == 1).all()
    np.testing.assert_array_equal(found, g(solutions))
    assert ((moved > 0).sum((1, 2)) == (grids > 0).sum((1, 2))).all()
    np.testing.assert_array_equal(g.on_tokens(puzzles.inputs), sudoku_tokens(moved))
    assert (g.on_tokens(np.zeros((30, size * size), int)) == 0).all()  # padding stays padding


@SIZES
def test_symmetries_are_a_group(size: int) -> None:
    g, h, k = (symmetries(size, 200, seed) for seed in range(3))
    x = np.random.default_rng(0).integers(0, size + 1, (200, size, size))
    np.testing.assert_array_equal(g.compose(h)(x), g(h(x)))
    np.testing.assert_array_equal(g.compose(h).compose(k)(x), g.compose(h.compose(k))(x))
    np.testing.assert_array_equal(g.inverse()(g(x)), x)
    np.testing.assert_array_equal(g(g.inverse()(x)), x)
    np.testing.assert_array_equal(g.compose(g.inverse())(x), x)


@SIZES
def test_draws_reach_the_whole_group_and_nothing_else(size: int) -> None:
    height, width = BOXES[size]
    g = symmetries(size, 4000)
    assert (g.digits[:, 0] == 0).all()
    for lines, block in ((g.rows, height), (g.columns, width)):
        np.testing.assert_array_equal(np.sort(lines, 1), np.tile(np.arange(size), (4000, 1)))
        blocks = lines.reshape(4000, -1, block) // block
        assert (blocks == blocks[:, :, :1]).all()
        share = (lines[:, :, None] == np.arange(size)).mean(0)
        np.testing.assert_allclose(share, 1 / size, atol=0.03)
    share = (g.digits[:, 1:, None] == np.arange(1, size + 1)).mean(0)
    np.testing.assert_allclose(share, 1 / size, atol=0.03)
    if height == width:
        assert abs(g.transpose.mean() - 0.5) < 0.03
    else:
        assert not g.transpose.any()


def test_all_symmetries_of_4x4_are_drawn() -> None:
    g = symmetries(4, 40_000)
    keys = np.concatenate([g.digits, g.rows, g.columns, g.transpose[:, None]], 1)
    assert len(np.unique(keys, axis=0)) == 24 * 8 * 8 * 2


@SIZES
@pytest.mark.parametrize("by", ["solution", "puzzle"])
def test_classes_do_not_change_under_symmetries(size: int, by: str) -> None:
    puzzles = some(size)
    grids, solutions = sudoku_grids(puzzles.inputs), sudoku_grids(puzzles.labels)
    classes = sudoku_classes(grids, solutions, by=by)
    g = symmetries(size, 30, seed=9)
    np.testing.assert_array_equal(sudoku_classes(g(grids), g(solutions), by=by), classes)
    n = len(np.unique(classes))
    if size == 9:
        assert n == 30
    if size == 6:
        assert n == 30 if by == "puzzle" else 10 <= n <= 30
    if size == 4 and by == "solution":
        assert n == 2


def test_classes_of_4x4_are_its_two_orbits() -> None:
    grids = np.array(all_solutions(np.zeros((4, 4), int), 1000))
    assert len(grids) == 288
    classes = sudoku_classes(grids, grids, by="solution")
    assert sorted(np.unique(classes, return_counts=True)[1].tolist()) == [96, 192]
    with pytest.raises(UserError, match="by='grid'"):
        sudoku_classes(grids, grids, by="grid")


@pytest.mark.parametrize("by", ["solution", "puzzle"])
def test_split_does_not_leak(by: str) -> None:
    puzzles = generate_sudoku(6, 400, seed=0)
    # The same puzzles once more, as augmentation would make them.
    g = symmetries(6, 400)
    copies = sudoku_set(g(sudoku_grids(puzzles.inputs)), g(sudoku_grids(puzzles.labels)), "copies")
    both = sudoku_set(
        *(
            np.concatenate([sudoku_grids(getattr(s, name)) for s in (puzzles, copies)])
            for name in ("inputs", "labels")
        ),
        "both",
    )
    train, test = split_sudoku(both, 50, seed=0, by=by)
    assert len(test) == 50
    assert 300 < len(train) <= 750
    sides = [
        set(sudoku_classes(sudoku_grids(s.inputs), sudoku_grids(s.labels), by=by).tolist())
        for s in (train, test)
    ]
    assert not sides[0] & sides[1]
    again, other = (
        split_sudoku(both, 50, seed=0, by=by)[1],
        split_sudoku(both, 50, seed=1, by=by)[1],
    )
    np.testing.assert_array_equal(test.inputs, again.inputs)
    assert (test.inputs != other.inputs).any()


def test_split_refuses() -> None:
    with pytest.raises(UserError, match=r"size=4: .* choose size 6 or 9"):
        split_sudoku(generate_sudoku(4, 10, seed=0), 2, seed=0)
    six = generate_sudoku(6, 10, seed=0)
    for n in (0, 10):
        with pytest.raises(UserError, match=f"n_test={n} is not in"):
            split_sudoku(six, n, seed=0)
    same = six.take(np.zeros(10, int))
    with pytest.raises(UserError, match="has 1 classes of equivalent puzzles"):
        split_sudoku(same, 2, seed=0)


def test_solution_of_the_example_is_right() -> None:
    found = all_solutions(parse_sudoku(PUZZLE).astype(int), 2)
    text = "".join(map(str, itertools.chain.from_iterable(found[0].tolist())))
    assert (len(found), text) == (1, SOLUTION)
