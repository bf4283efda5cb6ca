"""Named runs on puzzles: sizes for a CPU, and the paper's at full size.

The paper's (arXiv 2510.04871) are as the authors' code runs them, where it and the paper differ:
Adam-atan2, a rate that stays constant after the warm-up, n = 4 latent steps for mazes and ARC. A
step is one supervision step of 768 puzzles.
"""

from dataclasses import replace

from slm_jax.data.puzzles import ArcTasks, MazeConfig, Mazes, SudokuFiles, SudokuGenerated
from slm_jax.models.trm import TRMConfig
from slm_jax.parallel import MeshConfig
from slm_jax.train.optimizer import OptimizerConfig, ScheduleConfig
from slm_jax.train.tasks.trm import TRMLossConfig
from slm_jax.train.trm_experiment import TRMExperiment


def _on_30x30(vocab_size: int, n_puzzle_ids: int) -> TRMConfig:
    """The paper's model for mazes and ARC."""
    return TRMConfig(
        vocab_size,
        900,
        n_puzzle_ids,
        mixer="attention",
        n_latent_steps=4,
        dtype="bfloat16",
    )


def _for_cpu(vocab_size: int, seq_len: int, d_model: int) -> TRMConfig:
    """The reduction: narrow, one prefix slot, T = 2, n = 3."""
    return TRMConfig(
        vocab_size,
        seq_len,
        d_model=d_model,
        n_heads=4,
        n_prefix=1,
        n_cycles=2,
        n_latent_steps=3,
        ff_multiple=32,
    )


# 50,000 epochs of 1000 puzzles.
_SUDOKU_STEPS = 50_000 * 1000 // 768


def _paper(weight_decay: float, table_rate: float, table_decay: float) -> TRMExperiment:
    """What the paper's runs share; model, data and steps are replaced."""
    return TRMExperiment(
        model=TRMConfig(11, 81, n_puzzle_ids=1, dtype="bfloat16"),
        data=SudokuFiles(),
        optimizer=OptimizerConfig(
            "adam_atan2", weight_decay, clip_norm=None, table_decay=table_decay
        ),
        schedule=ScheduleConfig(1e-4, "constant", 2000),
        table_schedule=ScheduleConfig(table_rate, "constant", 2000),
        objective=TRMLossConfig(16),
        steps=_SUDOKU_STEPS,
        batch_size=768,
        ema_decay=0.999,
        # Copies: 7 M weights are less than what would be sent for them.
        mesh=MeshConfig(data=-1, fsdp=1),
    )


_SUDOKU = _paper(1.0, 1e-4, 1.0)
# Split: the puzzle table, its copy beside the average and its gradient have 2 to 2.6 GB each.
_ARC = replace(_paper(0.1, 1e-2, 0.1), mesh=MeshConfig())

TRM_PRESETS: dict[str, TRMExperiment] = {
    # Two minutes on two cores; the recursion arm of experiments/trm_sudoku.py.
    "sudoku-6x6": TRMExperiment(
        model=_for_cpu(8, 36, 48),
        data=SudokuGenerated(6),
        schedule=ScheduleConfig(2e-3, "constant", 200),
        objective=TRMLossConfig(8),
        steps=1500,
        ema_decay=0.995,
    ),
    # An hour on two cores, for puzzles of mixed difficulty: --data.train FILE --data.test FILE.
    "sudoku-9x9": TRMExperiment(
        model=_for_cpu(11, 81, 96),
        data=SudokuFiles(n_train=None),
        schedule=ScheduleConfig(2e-3, "constant", 200),
        objective=TRMLossConfig(16),
        steps=5000,
        batch_size=64,
        ema_decay=0.995,
    ),
    "sudoku-extreme": _SUDOKU,
    "sudoku-extreme-attention": replace(_SUDOKU, model=replace(_SUDOKU.model, mixer="attention")),
    # Paths of more than 110 steps. The authors' script does not augment by default; the published
    # figure needs it.
    "maze-hard": replace(
        _SUDOKU,
        model=_on_30x30(6, 1),
        data=Mazes(MazeConfig(min_path=111)),
    ),
    # Tables for 1000 variants of each task beside itself and id 0; steps of the released weights.
    "arc-agi-1": replace(
        _ARC,
        model=_on_30x30(12, 960 * 1001 + 1),
        data=ArcTasks(),
        steps=518_071,
    ),
    "arc-agi-2": replace(
        _ARC,
        model=_on_30x30(12, 1280 * 1001 + 1),
        data=ArcTasks(),
        steps=723_914,
    ),
}
