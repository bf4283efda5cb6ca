"""Training for fewer bits: the update, the way down in bits, runs, and what is written then."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from slm_jax.cli import main
from slm_jax.compress import parse_spec, quantise
from slm_jax.compress.lsq import first_step, groups_of
from slm_jax.compress.qat import QATConfig, floats, learned, rounded
from slm_jax.data import ByteTokenizer, open_data, valid_batches
from slm_jax.errors import UserError
from slm_jax.models.hf import save_hf
from slm_jax.models.loss import next_token_loss
from slm_jax.nn.linear import Linear
from slm_jax.parallel import MeshConfig, make_mesh, shardings
from slm_jax.train import experiment
from slm_jax.train.checkpoint import CHECKPOINTS_FOLDER
from slm_jax.train.experiment import (
    Experiment,
    load_experiment,
    load_learned,
    load_model,
    run,
    step_inputs,
)
from slm_jax.train.initial import check_source, with_weights_of
from slm_jax.train.metrics import read_metrics
from slm_jax.train.optimizer import OptimizerConfig
from slm_jax.train.step import StepConfig, init_state, train_step
from slm_jax.train.task import Loss
from tests.train import tiny
from tests.train.conftest import FinishedRun, MakeExperiment

# Unoptimised code: it runs a few times.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@dataclass(frozen=True)
class OneMatrix:
    """Least squares with one matrix; the log holds the weights that the loss has seen."""

    n_in: int = 16
    n_out: int = 4

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        return {
            "layer": Linear("embed -> mlp", {"embed": self.n_in, "mlp": self.n_out}, key=key)
        }, ()

    def loss(
        self, model: Any, batch: Mapping[str, jax.Array], carry: Any, key: jax.Array
    ) -> tuple[Loss, dict[str, jax.Array], Any]:
        w = model["layer"].w[...]
        total = jnp.sum(jnp.square(batch["x"] @ w - batch["y"]))
        return Loss(total, jnp.ones(())), {"seen": w}, carry

    def after_update(self, model: Any, aux: dict[str, jax.Array]) -> Any:
        return model


def test_steps_are_trained_by_factors_and_bits_fall_in_one_program() -> None:
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(8, 16)), "y": rng.normal(size=(8, 4))}
    batch = {k: v.astype(np.float32) for k, v in batch.items()}
    qat = QATConfig("w4g8", via=(8,), via_steps=2, step_rate=0.5)
    # Lion's update is a sign: a step size goes by exp(+-learning rate x step_rate x sqrt(inputs)),
    # without decay.
    config = StepConfig(OneMatrix(), OptimizerConfig("lion", weight_decay=0.5), qat=qat)
    state = jit(functools.partial(init_state, config))(np.uint32(0))
    step = jit(functools.partial(train_step, config))
    for n in range(4):
        before, (state, metrics) = state, step(state, batch, np.float32(0.01))
        seen = rounded(before.model, qat, jnp.asarray(n))["layer"].w[...]
        np.testing.assert_array_equal(metrics["seen"], seen)
        old, new = (s.model["layer"].step[...] for s in (before, state))
        np.testing.assert_allclose(np.abs(np.log(new / old)), 0.01 * 0.5 * 4, rtol=1e-4)
        levels = np.asarray(seen.T.reshape(4, 2, 8) / old[..., None])
        assert np.allclose(levels, np.rint(levels), atol=0.05) == (n >= 2)  # bfloat16
    assert step._cache_size() == 1


QAT = QATConfig("w3g8", via=(8,), via_steps=2)


def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))


@pytest.fixture(scope="module")
def trained(
    finished: FinishedRun, text: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Experiment, experiment.Result]:
    """A run that goes on from the weights of the standard one, in 8 and then 3 bits."""
    config = tiny.experiment(
        "dense", text, tmp_path_factory.mktemp("qat") / "run", qat=QAT,
        init_from=finished.config.out, mesh=MeshConfig(),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        one_device(patch)
        return config, run(config)


@jax.jit
def score(model: Any, batch: Any) -> Any:
    return next_token_loss(model, batch)[:2]


def nats(model: Any, config: Experiment) -> float:
    batches = valid_batches(
        open_data(config.data), batch_size=16, seq_len=config.seq_len, max_tokens=config.eval_tokens
    )
    total, weight = np.sum([score(model, b) for b in batches], axis=0)
    return float(total / weight)


def test_loss_of_the_run_is_that_of_what_is_written(
    trained: tuple[Experiment, experiment.Result],
) -> None:
    config, result = trained
    assert nats(load_learned(config.out)[0], config) == pytest.approx(result.valid_loss, abs=1e-5)
    assert nats(load_model(config.out)[0], config) == pytest.approx(result.valid_loss, abs=1e-5)
    average, _ = load_learned(config.out, ema=True)
    assert nats(average, config) == pytest.approx(result.valid_loss_ema, abs=1e-5)


def test_run_begins_with_the_weights_given(
    trained: tuple[Experiment, experiment.Result], finished: FinishedRun
) -> None:
    first = read_metrics(trained[0].out)[0]["loss"]
    assert first < read_metrics(finished.config.out)[0]["loss"] - 0.3
    assert first == pytest.approx(finished.result.valid_loss, abs=0.3)


@pytest.mark.slow
def test_resumed_run_has_the_same_bits(
    trained: tuple[Experiment, experiment.Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, result = trained
    out = tmp_path / "resumed"
    shutil.copytree(config.out, out)
    shutil.rmtree(out / CHECKPOINTS_FOLDER / "6")
    (out / "result.json").unlink()
    one_device(monkeypatch)
    again = run(dataclasses.replace(load_experiment(out), init_from=config.init_from))
    assert (again.valid_loss, again.valid_loss_ema) == (result.valid_loss, result.valid_loss_ema)
    clock = {"tokens_per_second"}
    lines = [
        [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(folder)]
        for folder in (config.out, out)
    ]
    assert lines[0] == lines[1]
    models = [load_learned(folder)[0] for folder in (config.out, out)]
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), *models))


def test_what_is_not_used_is_not_part_of_a_run(
    trained: tuple[Experiment, experiment.Result], finished: FinishedRun
) -> None:
    """Runs of before there was a choice go on: their configuration says nothing of it."""
    saved = json.loads((finished.config.out / "config.json").read_text())
    assert not {"qat", "init_from"} & set(saved)
    saved = json.loads((trained[0].out / "config.json").read_text())
    assert saved["qat"]["spec"] == "w3g8"
    assert load_experiment(trained[0].out) == trained[0]
    with pytest.raises(UserError, match=r"holds another run \(qat\.spec: saved w3g8, given w4"):
        run(dataclasses.replace(trained[0], qat=QATConfig("w4g8", via=(8,), via_steps=2)))
    with pytest.raises(UserError, match=r"trains floats \(qat.spec=None\): there are no codes"):
        load_learned(finished.config.out)


def test_other_weights_on_a_mesh(finished: FinishedRun, tmp_path: Path) -> None:
    """Of a run saved on eight devices, and of a Hugging Face folder."""
    want, config = load_model(finished.config.out)
    hf = tmp_path / "hf"
    save_hf(want, hf, tokenizer=ByteTokenizer())
    qat = QATConfig("w4g8")
    down = want.blocks[0].channel.down.w[...]
    first = jit(lambda w: first_step(w, groups_of(w.shape, 1, 1, qat.formats[0]), 7))(down)
    step, _ = step_inputs(dataclasses.replace(config, qat=qat))
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        begin = functools.partial(init_state, step)
        places = shardings(jax.eval_shape(begin, np.uint32(0)), mesh)
        state = jit(begin, out_shardings=places)(np.uint32(0))
        for source in (finished.config.out, hf):
            check_source(source, config.model, ByteTokenizer(), out=tmp_path)
            new = with_weights_of(source, config.model, qat, state)
            for tree in (new.model, new.ema):
                leaves = zip(jax.tree.leaves(floats(tree)), jax.tree.leaves(want), strict=True)
                assert all(np.array_equal(a, b) for a, b in leaves)
            same = jax.tree.map(lambda a, b: a.sharding == b.sharding, new, state)
            assert jax.tree.all(same)
            matrix = new.model.blocks[0].channel.down
            assert matrix.step[...].sharding.spec == P(None, "fsdp", None)
            np.testing.assert_allclose(matrix.step[...], first, rtol=1e-6)


def test_weights_that_do_not_fit_are_refused(
    finished: FinishedRun, make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    source, config = finished.config.out, finished.config

    def refused(message: str, source: Path = source, **changes: Any) -> None:
        with pytest.raises(UserError, match=message):
            run(make_experiment(init_from=source, **changes))
        assert not (tmp_path / "run").exists()

    refused(r"has no config.json", source=tmp_path)
    wider = dataclasses.replace(config.model, n_layers=3, final_softcap=30.0)
    refused(r"is another model \(n_layers: it has 2, given 3 and 1 more\): give the", model=wider)
    refused(r"is the run folder itself", source=tmp_path / "run")
    other: Any = SimpleNamespace(name="other", fingerprint="0")
    with pytest.raises(UserError, match=r"data.tokenizer=other is not the tokenizer of init_from"):
        check_source(source, config.model, other, out=tmp_path)
    refused(r"qat.via=\(8,\) at qat.via_steps=6 takes all of steps=6",
            qat=QATConfig("w4", via=(8,), via_steps=6))  # fmt: skip


def test_training_for_three_bits_beats_rounding_afterwards() -> None:
    """Inputs are correlated, so that the error of one weight can be made good by others."""
    qat, task, optimizer = QATConfig("w3"), OneMatrix(64, 16), OptimizerConfig(weight_decay=0.0)

    def trainer(qat: QATConfig) -> Any:
        config = StepConfig(task, optimizer, qat=qat)

        def train(batch: Any, seed: jax.Array) -> Any:
            def one(state: Any, rate: jax.Array) -> Any:
                return train_step(config, state, batch, rate)[0], None

            rates = 0.01 * (1 - jnp.arange(400) / 400)
            model = jax.lax.scan(one, init_state(config, seed), rates)[0].model
            small = learned(model, qat) if qat.on else quantise(model, parse_spec("w3"))
            error = batch["x"] @ small["layer"].weight(jnp.float32) - batch["y"]
            return jnp.sum(jnp.square(error))

        return jit(train)

    runs = [trainer(qat), trainer(QATConfig())]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(128, 8)) @ rng.normal(size=(8, 64)) + 0.1 * rng.normal(size=(128, 64))
        batch = {"x": x, "y": x @ rng.normal(size=(64, 16)) / 8}
        batch = {k: v.astype(np.float32) for k, v in batch.items()}
        trained, afterwards = (float(run(batch, np.uint32(seed))) for run in runs)
        assert trained < 0.5 * afterwards, (seed, trained, afterwards)


@pytest.mark.slow
def test_quantize_writes_what_was_learned(
    trained: tuple[Experiment, experiment.Result], tmp_path: Path, capsys
) -> None:
    config, result = trained
    command = ["quantize", str(config.out), "--eval-tokens", "300", "--calibration-tokens", "16"]
    assert main([*command, "--batch-size", "16", "--out", str(tmp_path / "out")]) == 0
    facts = json.loads((tmp_path / "out" / "quantised.json").read_text())
    assert (facts["spec"], facts["vocab"], facts["method"]) == ("w3g8", "w8", "qat")
    for loss in ("loss_before", "loss_after"):
        assert facts[loss]["nats"] == pytest.approx(result.valid_loss, abs=1e-5)
    capsys.readouterr()
    assert main([*command, "--spec", "w4", "--out", str(tmp_path / "other")]) == 2
    assert "spec=w4: the run in" in capsys.readouterr().err
