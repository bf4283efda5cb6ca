"""What is saved on eight devices is what is loaded on one, and on another mesh."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.data import open_data, valid_batches
from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.nn.module import named_leaves
from slm_jax.parallel import MeshConfig, make_mesh, shard_batch
from slm_jax.train.checkpoint import Checkpoints, named_arrays
from slm_jax.train.checksum import checksums
from slm_jax.train.experiment import (
    compile_program,
    load_experiment,
    load_model,
    load_run_tokenizer,
    run,
)
from slm_jax.train.loop import CHECKPOINTS_FOLDER
from slm_jax.train.metrics import read_metrics
from tests.train.conftest import FinishedRun, MakeExperiment


def assert_same_bits(got: object, want: object) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("average", [False, True])
def test_loaded_model_is_the_trained_one(finished: FinishedRun, average: bool) -> None:
    trained = finished.state.ema if average else finished.state.model
    leaf = trained.blocks[0].channel.up.w.get_value()
    assert not leaf.sharding.is_fully_replicated  # it was saved from eight devices
    model, config = load_model(finished.config.out, ema=average)
    assert config == dataclasses.replace(finished.config, overwrite=False)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(model)} == {1}
    assert [*named_leaves(model)] == [*named_leaves(trained)]
    assert_same_bits(model, trained)

    mesh = make_mesh(config.mesh)
    batch = next(iter(valid_batches(open_data(config.data), batch_size=8, seq_len=16)))
    got = logits(model, {k: jnp.asarray(v) for k, v in batch.items()})
    with jax.set_mesh(mesh):
        want = logits(trained, shard_batch(batch, mesh))
    np.testing.assert_allclose(got, want, atol=1e-5)


@jax.jit
def logits(model: LM, batch: dict[str, jax.Array]) -> jax.Array:
    return model(batch["tokens"], positions=batch["positions"], segments=batch["segments"])[0]


def test_average_differs_from_the_weights(finished: FinishedRun) -> None:
    models = [load_model(finished.config.out, ema=average)[0] for average in (False, True)]
    leaves = [np.asarray(m.embed.w.get_value()) for m in models]
    assert np.abs(leaves[0] - leaves[1]).max() > 1e-3


def test_whole_state_moves_to_another_mesh_bit_by_bit(finished: FinishedRun) -> None:
    mesh = make_mesh(MeshConfig(data=8, fsdp=1))
    program = compile_program(dataclasses.replace(finished.config, mesh=MeshConfig(8, 1)), mesh)
    folder = finished.config.out / CHECKPOINTS_FOLDER
    with Checkpoints(folder, read_only=True) as checkpoints:
        step, state, position, _ = checkpoints.restore(program.state)
    assert (step, position) == (6, {"next_index": 6})
    assert state.model.embed.w.get_value().sharding.is_fully_replicated
    assert_same_bits(state, finished.state)


def test_run_goes_on_on_another_mesh(finished: FinishedRun, tmp_path: Path) -> None:
    out = tmp_path / "moved"
    shutil.copytree(finished.config.out, out)
    shutil.rmtree(out / CHECKPOINTS_FOLDER / "6")
    (out / "result.json").unlink()
    before = read_metrics(out)
    result = run(dataclasses.replace(finished.config, out=out, mesh=MeshConfig(data=8, fsdp=1)))
    after = read_metrics(out)
    assert [r["step"] for r in after] == [r["step"] for r in before]
    assert after[:4] == before[:4]
    for a, b in zip(after[4:6], before[4:6], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert result.valid_loss == pytest.approx(finished.result.valid_loss, rel=1e-5)


@pytest.mark.slow
def test_fewer_and_more_devices_take_the_same_next_step(finished: FinishedRun) -> None:
    """Restored on 8, 4, 2, 1 and again 8 devices, each from what the one before had saved."""
    config = finished.config
    folder = config.out.parent / "chain"
    shutil.copytree(config.out / CHECKPOINTS_FOLDER, folder)
    batch = next(iter(valid_batches(open_data(config.data), batch_size=16, seq_len=16)))
    digests, losses = [], []
    for step, n in enumerate((8, 4, 2, 1, 8), 7):
        mesh = make_mesh(MeshConfig(data=1, fsdp=n), jax.devices()[:n])
        program = compile_program(config, mesh)
        with jax.set_mesh(mesh):
            with Checkpoints(folder) as checkpoints:
                state = checkpoints.restore(program.state).state
                checkpoints.save(step, state, {}, {})
            digests.append(checksums(named_arrays(state)))
            _, metrics = program.step(state, shard_batch(batch, mesh), np.float32(0.01))
        losses.append(float(metrics["loss"]))
    assert all(digest == digests[0] for digest in digests)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    assert losses[0] == losses[-1]


def test_a_loaded_experiment_resumes(finished: FinishedRun, tmp_path: Path) -> None:
    """Though the run was started with `overwrite`, in a folder that has moved since."""
    out = tmp_path / "moved"
    shutil.copytree(finished.config.out, out)
    text = (out / "config.json").read_text()
    assert '"overwrite": false' in text
    (out / "config.json").write_text(text.replace('"overwrite": false', '"overwrite": true'))
    config = load_experiment(out)
    assert config == dataclasses.replace(finished.config, out=out)
    assert run(config) == finished.result


def test_loading_what_is_not_there(make_experiment: MakeExperiment, finished: FinishedRun) -> None:
    out = make_experiment().out
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(out)
    out.mkdir()
    text = (finished.config.out / "config.json").read_text()
    (out / "config.json").write_text(text)
    with pytest.raises(UserError, match="there is none to restore"):
        load_model(out)
    (out / "config.json").write_text(text.replace('"ema_decay": 0.9', '"ema_decay": null'))
    with pytest.raises(UserError, match="keeps no average"):
        load_model(out, ema=True)


def test_a_tokenizer_that_changed_is_refused(finished: FinishedRun, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    text = (finished.config.out / "config.json").read_text()
    (out / "config.json").write_text(text)
    tokenizer = load_run_tokenizer(out)
    assert tokenizer.name == finished.config.data.tokenizer
    other = text.replace(tokenizer.fingerprint, 64 * "0")
    assert other != text
    (out / "config.json").write_text(other)
    with pytest.raises(UserError, match=r"is not what the run in .* was trained with"):
        load_run_tokenizer(out)
