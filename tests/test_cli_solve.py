"""`slm solve`: frames, verdicts, and what it says about puzzles that cannot be asked."""

import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from slm_jax.cli import main, solve
from slm_jax.data.puzzles import (
    ArcTasks,
    MazeConfig,
    Mazes,
    format_sudoku,
    parse_maze,
    parse_sudoku,
    solve_sudoku,
    sudoku_tokens,
)
from slm_jax.data.puzzles.maze import PATH
from slm_jax.models.presets import dense
from slm_jax.models.trm import refine
from slm_jax.train.experiment import Experiment
from slm_jax.train.optimizer import OptimizerConfig, ScheduleConfig
from slm_jax.train.serialize import to_json
from slm_jax.train.trm_experiment import TRMExperiment, load_model
from tests.train import tiny_trm

PUZZLE = "..3.6..1...2....2.......5....13..4.."
SOLUTION = "243165615342136524452613564231321456"
MAZE = "S #  \n# # #\n     \n ### \n    G"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 6x6 that has learned nothing yet."""
    return tiny_trm.write_run(tiny_trm.experiment(tmp_path_factory.mktemp("sudoku") / "run"))


def lines_of(text: str) -> list[list[str]]:
    """Title and rows of every frame."""
    shown = text.partition("weights\n")[2].strip("\n")
    return [part.split("\n") for part in shown.split("\n\n")]


def answer_with(monkeypatch: pytest.MonkeyPatch, *answers: tuple[str, float]) -> None:
    """Has the model say digits and a halting logit in each step."""

    def said(model: object, tokens: np.ndarray) -> Iterator[solve.Step]:
        for text, halt in itertools.chain(answers, itertools.repeat(answers[-1])):
            digits = np.array([int(c) for c in text.replace(".", "0")])
            yield solve.Step((digits + 1).astype(np.int32), halt)

    monkeypatch.setattr(solve, "refined", said)


def one_line(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert main(["solve", *args]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    return shown.err


def test_the_steps_shown_are_those_of_the_model(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solution = solve_sudoku(parse_sudoku(PUZZLE))
    tokens = sudoku_tokens(parse_sudoku(PUZZLE))
    frames = {}
    for ema, flag in ((True, "--ema"), (False, "--no-ema")):
        capsys.readouterr()
        assert main(["solve", str(trained), "--puzzle", PUZZLE, "--steps", "5", flag]) == 0
        out = capsys.readouterr().out
        assert f"{'averaged' if ema else 'raw'} weights\n" in out
        frames[ema] = lines_of(out)
        first, *steps, end = frames[ema]
        assert first == ["puzzle: 9 cells given", *format_sudoku(parse_sudoku(PUZZLE)).split("\n")]
        model, _ = load_model(trained, ema=ema)
        want = refine(model, jnp.asarray(tokens, jnp.int32)[None], jnp.zeros(1, jnp.int32), 5)
        before = tokens
        for k, (title, *rows) in enumerate(steps, 1):
            said = np.asarray(want.predictions[k - 1, 0])
            cells = re.sub("[-+| ]", "", "".join(rows))
            assert cells == "".join("?.123456"[token] for token in said)
            halt = 1 / (1 + np.exp(-float(want.halt[k - 1, 0])))
            start = f"step {k} of 5: halting probability {halt:.1%}, "
            assert title.startswith(f"{start}changed: {(said != before).sum()}, breaking a rule: ")
            assert int(title.split()[-1]) > 0
            before = said
        assert len(steps) == 5
        assert end == [f"not solved after 5 steps: {title.split()[-1]} cells break a rule"]
        assert "".join(map(str, solution.ravel())) not in out.replace(" ", "").replace("|", "")
    assert frames[True] != frames[False]
    # As many as in training, unless told otherwise.
    assert main(["solve", str(trained), "--puzzle", PUZZLE]) == 0
    assert "step 3 of 3" in capsys.readouterr().out


def test_verdicts_changes_and_broken_rules(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = "244165" + SOLUTION[6:]  # 4 for the clue 3: twice in row 1, in column 3, in box 1
    asked = ["solve", str(trained), "--puzzle", PUZZLE]
    answer_with(monkeypatch, ("." * 36, -9.0), (twice, -1.0), (SOLUTION, 2.0))
    capsys.readouterr()
    assert main([*asked, "--steps", "4"]) == 0
    _, *steps, end = lines_of(capsys.readouterr().out)
    titles = [rows[0].partition(": ")[2] for rows in steps]
    assert titles == [
        "halting probability 0.0%, changed: 9, breaking a rule: 36",
        "halting probability 26.9%, changed: 36, breaking a rule: 3",
        "halting probability 88.1%, changed: 1, breaking a rule: 0",
        "halting probability 88.1%, changed: 0, breaking a rule: 0",
    ]
    assert end == ["solved after 4 steps"]
    # A valid grid of another puzzle keeps all rules but the clues.
    other = SOLUTION.translate(str.maketrans("123456", "234561"))
    answer_with(monkeypatch, (other, -1.0))
    assert main([*asked, "--steps", "1", "--show-solution"]) == 0
    shown = lines_of(capsys.readouterr().out)[-1]
    assert shown[:2] == ["not solved after 1 step: 9 cells break a rule", "solution"]
    assert shown[2:] == format_sudoku(parse_sudoku(SOLUTION)).split("\n")


def test_halting_stops_at_a_positive_logit(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, ("." * 36, -0.1), (SOLUTION, 0.1))
    asked = ["solve", str(trained), "--puzzle", PUZZLE, "--steps", "9"]
    for flags, n in (([], 9), (["--halt"], 2)):
        capsys.readouterr()
        assert main([*asked, *flags]) == 0
        assert capsys.readouterr().out.endswith(f"solved after {n} steps\n")


def test_a_terminal_draws_over_the_last_step_in_colours(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Console(
        file=io.StringIO(), force_terminal=True, color_system="standard", width=100, height=40
    )
    monkeypatch.setattr(solve, "console", lambda: screen)
    monkeypatch.setattr(solve, "_PAUSE", 0.0)
    near = SOLUTION[:-1] + "5"  # 5 for 6: twice in the last row, column and box
    answer_with(monkeypatch, (near, -1.0), (SOLUTION, 1.0))
    assert main(["solve", str(trained), "--puzzle", PUZZLE, "--steps", "2"]) == 0
    out = screen.file.getvalue()  # type: ignore[attr-defined]
    up = "\x1b[1A"
    assert up in out
    before, _, last = out.rpartition("step 2 of 2")
    row = last.splitlines()[8]
    assert row == "\x1b[1m3\x1b[0m 2 1 | \x1b[1m4\x1b[0m 5 \x1b[33m6\x1b[0m"
    first_step = before.partition("step 1 of 2")[2].splitlines()[8]
    assert first_step.endswith("| \x1b[1m4\x1b[0m \x1b[4;33m5\x1b[0m \x1b[4;33m5\x1b[0m")
    assert first_step.startswith("\x1b[1m3\x1b[0m \x1b[33m2\x1b[0m")


def test_a_puzzle_comes_from_a_file_or_stdin(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shown(given: str) -> str:
        capsys.readouterr()
        assert main(["solve", str(trained), "--puzzle", given, "--steps", "1"]) == 0
        return capsys.readouterr().out

    file = tmp_path / "puzzle.txt"
    file.write_text(format_sudoku(parse_sudoku(PUZZLE)) + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PUZZLE.replace('.', '0')}\n"))
    assert shown(PUZZLE) == shown(str(file)) == shown("-")
    file.write_text(f"{PUZZLE}\n{PUZZLE}\n")
    assert f"puzzle={file} has 72 cells" in one_line(capsys, str(trained), "--puzzle", str(file))
    file.write_bytes(b"\xff\xfe")
    assert "cannot be read" in one_line(capsys, str(trained), "--puzzle", str(file))


@pytest.mark.parametrize(
    ("puzzle", "words"),
    [
        (PUZZLE[:-1], "puzzle has 35 cells: a Sudoku has 16, 36 or 81"),
        ("1234341221434321", "puzzle is 4x4: the model in RUN solves 6x6, so give 36 cells"),
        ("x" + PUZZLE[1:], "is no file and has 'x' in row 1, column 1: use 1 to 6"),
        ("7" + PUZZLE[1:], "puzzle has '7' in row 1, column 1: use 1 to 6"),
        ("3" + PUZZLE[1:], "puzzle has the digit 3 twice in row 1"),
        ("12345." + "." * 11 + "6" + "." * 18, "puzzle has no solution"),
        ("." * 36, "puzzle has several solutions"),
        ("puzle.txt", "puzzle='puzle.txt' is no file and has 9 cells"),
        ("", "puzzle has 0 cells"),
    ],
)
def test_bad_sudokus_are_one_line(
    puzzle: str, words: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = one_line(capsys, str(trained), "--puzzle", puzzle)
    assert words.replace("RUN", str(trained)) in line


def test_a_run_on_mazes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_trm.experiment(
        tmp_path / "mazes",
        model=tiny_trm.model(6, 25, n_puzzle_ids=1),
        data=Mazes(MazeConfig(5, 5, min_path=3), n_train=20, n_valid=4, n_test=8),
        table_schedule=ScheduleConfig(0.01, "constant", 0),
        optimizer=OptimizerConfig("adam_atan2", clip_norm=None, table_decay=0.1),
        ema_decay=None,
    )
    out = str(tiny_trm.write_run(config))
    capsys.readouterr()
    assert main(["solve", out, "--puzzle", MAZE, "--show-solution"]) == 0
    shown = capsys.readouterr().out
    assert "raw weights\n" in shown  # there are no others
    first, *steps, end = lines_of(shown)
    assert first == ["puzzle: 9 cells given", *MAZE.split("\n")]
    assert [len(rows) for rows in steps] == [6, 6, 6]
    assert end[0].startswith("not solved after 3 steps: ")
    assert end[1:] == ["solution", "So#  ", "#o# #", " oooo", " ###o", "    G"]

    ring = "S    \n ### \n ### \n ### \n    G"
    for maze, cells, says in (
        (MAZE, [1, 6, 11, 12, 13, 14, 19], "solved after 3 steps"),
        (ring, [1, 2, 3, 4, 9, 14, 19], "solved after 3 steps"),
        (ring, [5, 10, 15, 20, 21, 22, 23], "solved after 3 steps"),
        (MAZE, [1, 6, 11, 12, 13, 14], "not solved after 3 steps: 2 cells break a rule"),
        (MAZE, [1, 3, 6, 11, 12, 13, 14, 19], "not solved after 3 steps: 1 cell breaks a rule"),
        (
            MAZE,
            [1, 6, 11, 10, 15, 20, 21, 22, 23],
            "not solved after 3 steps: what is marked is no shortest path from S to G",
        ),
    ):
        said = parse_maze(maze).ravel()
        said[cells] = PATH
        step = solve.Step(said.astype(np.int32), 0.0)
        monkeypatch.setattr(solve, "refined", lambda *_, step=step: itertools.repeat(step))
        assert main(["solve", out, "--puzzle", maze]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == says

    for maze, words in (
        (MAZE.replace("G", " "), "0 cells G"),
        (MAZE.replace("#  ", "#x "), "'x' in row 1, column 4"),
        (MAZE.replace("     ", "#####"), "no way from S to G"),
        (MAZE.replace("# # #", "# # "), "4 cells in row 2 and 5 in row 1"),
        ("S   G\n#####\n#####", "maze of 3 x 5: the model in"),
        ("S", "maze of 1 x 1: give 3 to 30"),
    ):
        assert words in one_line(capsys, out, "--puzzle", maze)


def test_runs_that_solve_no_puzzles_and_steps_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, config in (
        ("arc", TRMExperiment(tiny_trm.model(12, 900), ArcTasks())),
        ("lm", Experiment(dense(16, 1, 2, d_ff=32))),
        ("begun", tiny_trm.experiment(tmp_path / "begun")),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(to_json(config)))

    def says(name: str) -> str:
        return one_line(capsys, str(tmp_path / name), "--puzzle", PUZZLE)

    assert "answers ARC tasks" in says("arc")
    assert "trains a language model: give a run that trains a recursive reasoner" in says("lm")
    assert "there is none to restore" in says("begun")
    assert "config.json" in says("nothing")
    assert "steps=0" in one_line(capsys, str(trained), "--puzzle", PUZZLE, "--steps", "0")
