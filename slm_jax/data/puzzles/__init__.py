"""Puzzles for recursive reasoners: Sudoku, mazes and ARC-AGI as grids of tokens.

    train, test = split_sudoku(generate_sudoku(6, 12_000, seed=0), 1000, seed=0, by="puzzle")
    batches = puzzle_batches(train.take(slice(1000)), batch_size=64, seed=0, augment=True)
    batch = next(batches)  # inputs, labels: int32 [64, 36], puzzle_ids: int32 [64]

Read in this order: puzzle_set.py (sets, batches, splits), sudoku.py with sudoku_solver.py and
sudoku_symmetry.py, maze.py, arc.py (tasks and tokens), arc_variants.py (ids, train and test sets),
arc_vote.py (the score), rules.py (what an answer breaks), splits.py (all that a run needs, from one
configuration).
"""

from slm_jax.data.puzzles.arc import (
    ArcPair,
    ArcTask,
    decode_grid,
    encode_grid,
    load_arc,
    without_tasks_of,
)
from slm_jax.data.puzzles.arc_variants import (
    ArcVariants,
    arc_test_set,
    arc_train_set,
    arc_variants,
)
from slm_jax.data.puzzles.arc_vote import ArcVotes, arc_score
from slm_jax.data.puzzles.dihedral import dihedral
from slm_jax.data.puzzles.maze import (
    MazeConfig,
    generate_mazes,
    maze_classes,
    maze_solved,
    solve_maze,
)
from slm_jax.data.puzzles.maze_text import parse_maze
from slm_jax.data.puzzles.puzzle_set import (
    Augmentation,
    Batch,
    OrderedBatches,
    PuzzleBatches,
    PuzzleSet,
    puzzle_batches,
    split_by_class,
)
from slm_jax.data.puzzles.rules import maze_broken, sudoku_broken
from slm_jax.data.puzzles.splits import (
    ArcQuestions,
    ArcTasks,
    Mazes,
    PuzzleData,
    PuzzleSplits,
    SudokuFiles,
    SudokuGenerated,
    open_puzzles,
)
from slm_jax.data.puzzles.sudoku import (
    format_sudoku,
    generate_sudoku,
    load_sudoku,
    parse_sudoku,
    solve_sudoku,
    split_sudoku,
    sudoku_grids,
    sudoku_set,
    sudoku_tokens,
)
from slm_jax.data.puzzles.sudoku_symmetry import SudokuSymmetry, sudoku_classes

__all__ = [
    "ArcPair",
    "ArcQuestions",
    "ArcTask",
    "ArcTasks",
    "ArcVariants",
    "ArcVotes",
    "Augmentation",
    "Batch",
    "MazeConfig",
    "Mazes",
    "OrderedBatches",
    "PuzzleBatches",
    "PuzzleData",
    "PuzzleSet",
    "PuzzleSplits",
    "SudokuFiles",
    "SudokuGenerated",
    "SudokuSymmetry",
    "arc_score",
    "arc_test_set",
    "arc_train_set",
    "arc_variants",
    "decode_grid",
    "dihedral",
    "encode_grid",
    "format_sudoku",
    "generate_mazes",
    "generate_sudoku",
    "load_arc",
    "load_sudoku",
    "maze_broken",
    "maze_classes",
    "maze_solved",
    "open_puzzles",
    "parse_maze",
    "parse_sudoku",
    "puzzle_batches",
    "solve_maze",
    "solve_sudoku",
    "split_by_class",
    "split_sudoku",
    "sudoku_broken",
    "sudoku_classes",
    "sudoku_grids",
    "sudoku_set",
    "sudoku_tokens",
    "without_tasks_of",
]
