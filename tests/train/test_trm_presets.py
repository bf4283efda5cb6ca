"""The named runs on puzzles: sizes, cost and hyper-parameters of the paper (arXiv 2510.04871)."""

import json

import pytest

from slm_jax.data.puzzles import ArcTasks, MazeConfig, Mazes
from slm_jax.models.trm import n_parameters
from slm_jax.train.serialize import from_json, to_json
from slm_jax.train.trm_experiment import TRMExperiment, step_flops
from slm_jax.train.trm_presets import TRM_PRESETS

EACH = pytest.mark.parametrize("name", TRM_PRESETS)
PAPER = {
    "sudoku-extreme": 5_028_866,
    "sudoku-extreme-attention": 6_828_034,
    "maze-hard": 6_822_914,
    "arc-agi-1": 6_829_058,
    "arc-agi-2": 6_829_058,
}


@pytest.mark.parametrize(("name", "count"), PAPER.items())
def test_full_sizes_are_those_of_the_paper(name: str, count: int) -> None:
    assert n_parameters(TRM_PRESETS[name].model) == count


def test_what_is_no_size_of_the_paper_is_small() -> None:
    small = TRM_PRESETS.keys() - PAPER.keys()
    assert small == {"sudoku-6x6", "sudoku-9x9"}
    assert all(10_000 < n_parameters(TRM_PRESETS[name].model) < 500_000 for name in small)


@pytest.mark.parametrize(
    ("name", "flops"), [("sudoku-extreme", 2.1e18), ("maze-hard", 2.0e19), ("sudoku-6x6", 6.3e12)]
)
def test_cost_of_a_whole_run(name: str, flops: float) -> None:
    preset = TRM_PRESETS[name]
    assert preset.steps * step_flops(preset) == pytest.approx(flops, rel=0.03)


def test_cost_of_sudoku_by_hand() -> None:
    """Both SwiGLUs of two blocks, 21 applications and 14 more for the backward pass, the heads."""
    slots, d = 97, 512
    across, along = 3 * slots * 512 * d, 3 * d * 1536 * slots  # multiply-adds
    one = 2 * 2 * (across + along)
    heads = 2 * d * (81 * 11 + 2)
    applied = 3 * 7 + 2 * 7
    want = 768 * (applied * one + 3 * heads)
    assert step_flops(TRM_PRESETS["sudoku-extreme"]) == pytest.approx(want, rel=1e-2)


def test_hyper_parameters_of_the_paper() -> None:
    for name in PAPER:
        p = TRM_PRESETS[name]
        arc = name.startswith("arc")
        assert (p.batch_size, p.ema_decay, p.objective.n_supervision) == (768, 0.999, 16), name
        assert (p.schedule.learning_rate, p.schedule.shape) == (1e-4, "constant"), name
        assert p.schedule.warmup_steps == 2000, name
        assert p.optimizer.name == "adam_atan2", name
        assert (p.optimizer.b1, p.optimizer.b2) == (0.9, 0.95), name
        assert p.optimizer.weight_decay == p.optimizer.table_decay == (0.1 if arc else 1.0), name
        assert p.table_schedule is not None
        assert p.table_schedule.learning_rate == (1e-2 if arc else 1e-4), name
        m = p.model
        assert (m.d_model, m.n_layers, m.n_cycles, m.n_prefix) == (512, 2, 3, 16), name
        assert m.n_latent_steps == (6 if name.startswith("sudoku") else 4), name
        assert m.mixer == ("mlp" if name == "sudoku-extreme" else "attention"), name
    maze = TRM_PRESETS["maze-hard"].data
    assert isinstance(maze, Mazes)
    assert maze.maze == MazeConfig(30, 30, min_path=111)
    for name, n_tasks in (("arc-agi-1", 960), ("arc-agi-2", 1280)):
        data = TRM_PRESETS[name].data
        assert isinstance(data, ArcTasks)
        # Every task in all its variants and as itself, and id 0.
        ids = TRM_PRESETS[name].model.n_puzzle_ids
        assert ids == n_tasks * (data.n_variants + 1) + 1


@EACH
def test_json_gives_the_same_run(name: str) -> None:
    preset = TRM_PRESETS[name]
    assert from_json(TRMExperiment, json.loads(json.dumps(to_json(preset)))) == preset
