"""A run on puzzles that compiles in seconds and takes milliseconds a step."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.sharding import Mesh

from slm_jax.data.puzzles import SudokuGenerated, open_puzzles
from slm_jax.models.trm import TRM, TRMConfig
from slm_jax.parallel import MeshConfig, make_mesh
from slm_jax.train import folder, trm_experiment
from slm_jax.train.checkpoint import CHECKPOINTS_FOLDER, Checkpoints
from slm_jax.train.loop import LoopConfig
from slm_jax.train.optimizer import ScheduleConfig
from slm_jax.train.serialize import to_json
from slm_jax.train.tasks.trm import TRMLossConfig
from slm_jax.train.trm_experiment import TRMExperiment

SUDOKU = SudokuGenerated(6, n_train=40, n_valid=8, n_test=19)


def model(vocab_size: int = 8, seq_len: int = 36, **changes: Any) -> TRMConfig:
    """One block of width 8, applied twice a step."""
    sizes = {"d_model": 8, "n_heads": 1, "n_layers": 1, "n_prefix": 1, "ff_multiple": 8}
    depth = {"n_cycles": 1, "n_latent_steps": 1}
    return TRMConfig(vocab_size, seq_len, **{**sizes, **depth, **changes})


def experiment(out: Path, **changes: Any) -> TRMExperiment:
    """Six steps of 6x6 Sudoku, a checkpoint every second."""
    return TRMExperiment(
        **{
            "model": model(),
            "data": SUDOKU,
            "schedule": ScheduleConfig(0.02, "constant", warmup_steps=2),
            "objective": TRMLossConfig(3),
            "steps": 6,
            "batch_size": 16,
            "ema_decay": 0.5,
            "loop": LoopConfig(checkpoint_every=2, quiet=True),
            "out": out,
            **changes,
        }
    )


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Runs in it are on the first device; a mesh in a run's configuration always takes all."""

    def mesh(config: MeshConfig) -> Mesh:
        return make_mesh(config, jax.devices()[:1])

    with mock.patch.object(trm_experiment, "make_mesh", mesh):
        yield


def write_run(config: TRMExperiment) -> Path:
    """The folder of a run that has checkpointed its initial weights; the average is of others."""
    identity = to_json(config) | {"data_fingerprint": open_puzzles(config.data).fingerprint}
    folder.make_folder(config.out, identity, overwrite=False)
    init = jax.jit(lambda key: TRM(config.model, key))
    weights = {"model": init(jax.random.key(0))}
    if config.ema_decay is not None:
        weights["ema"] = init(jax.random.key(1))
    with Checkpoints(config.out / CHECKPOINTS_FOLDER) as checkpoints:
        checkpoints.save(1, weights, {"next_index": 1}, {})
    return config.out
