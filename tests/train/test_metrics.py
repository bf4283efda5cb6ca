import json
import math
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from slm_jax.data import open_data, valid_batches
from slm_jax.models.lm import LM
from slm_jax.train.metrics import METRICS_FILE, MetricLog, bits_per_byte, read_metrics
from tests.train.conftest import FinishedRun


def board(folder: Path) -> dict[tuple[str, int], float]:
    """(tag, step) -> value of all TensorBoard scalars: records of length, crc, event, crc."""
    scalars = {}
    for path in sorted((folder / "tensorboard").glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[length + 16 :]
            for value in event.summary.value:
                scalars[value.tag, event.step] = value.simple_value
    return scalars


def test_one_line_a_step_of_finite_numbers(finished: FinishedRun) -> None:
    lines = (finished.config.out / METRICS_FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 5, 5]  # the last is the evaluation
    steps, evaluation = records[:-1], records[-1]
    for r in steps:
        assert r.keys() == {
            *("step", "loss", "nll", "grad_norm", "learning_rate", "tokens_per_second"),
            *("bits_per_byte", "skipped"),
        }
        assert r["skipped"] == 0
        schedule = finished.config.schedule
        assert r["learning_rate"] == schedule(r["step"], finished.config.steps)
        assert r["loss"] == pytest.approx(r["nll"], rel=1e-6)  # a dense model has no other terms
        assert r["bits_per_byte"] == pytest.approx(r["nll"] / math.log(2))  # a token is a byte
    assert all(math.isfinite(v) for r in records for v in r.values())
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert evaluation == {
        "step": 5,
        "valid_loss": finished.result.valid_loss,
        "valid_loss_ema": finished.result.valid_loss_ema,
        "valid_bits_per_byte": finished.result.valid_bits_per_byte,
    }
    assert finished.result.tokens == 6 * 16 * 16


def test_tensorboard_has_the_same_numbers(finished: FinishedRun) -> None:
    records = read_metrics(finished.config.out)
    want = {(k, r["step"]): v for r in records for k, v in r.items() if k != "step"}
    got = board(finished.config.out)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("average", [False, True])
def test_held_out_loss_is_the_mean_over_tokens(finished: FinishedRun, average: bool) -> None:
    """From logits and the log-softmax of numpy, row by row."""
    config, state = finished.config, finished.state
    model: LM = jax.tree.map(np.asarray, state.ema if average else state.model)  # on one device
    total = weight = 0.0
    for batch in valid_batches(
        open_data(config.data), batch_size=8, seq_len=16, max_tokens=config.eval_tokens
    ):
        tokens, positions, segments = map(
            jnp.asarray, (batch[k] for k in ("tokens", "positions", "segments"))
        )
        logits = np.asarray(model(tokens, positions=positions, segments=segments)[0], np.float64)
        log_sum = np.log(np.exp(logits).sum(axis=-1))
        picked = np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        total += ((log_sum - picked) * batch["weights"]).sum()
        weight += batch["weights"].sum()
    result = finished.result.valid_loss_ema if average else finished.result.valid_loss
    assert result == pytest.approx(total / weight, rel=1e-5)


def test_bits_per_byte_does_not_depend_on_the_tokenizer() -> None:
    assert bits_per_byte(math.log(2), 1.0) == 1.0
    # Eight bits a token of four bytes.
    assert bits_per_byte(math.log(256), 4.0) == pytest.approx(2.0)


def write(folder: Path, first_step: int, steps: range) -> None:
    log = MetricLog(folder, first_step=first_step)
    for step in steps:
        log.write(step, {"loss": step / 3, "moe_load": np.full((1, 2), 0.5, np.float32)})
    log.close()


def test_lines_keep_all_bits_and_arrays(tmp_path: Path) -> None:
    write(tmp_path, 0, range(3))
    assert read_metrics(tmp_path) == [
        {"step": s, "loss": s / 3, "moe_load": [[0.5, 0.5]]} for s in range(3)
    ]


def test_resuming_drops_what_a_killed_run_left_behind(tmp_path: Path) -> None:
    write(tmp_path, 0, range(6))
    write(tmp_path, 4, range(4, 8))
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(8))


def test_an_evaluation_that_is_made_again_is_written_once(tmp_path: Path) -> None:
    write(tmp_path, 0, range(2))
    for loss in (0.5, 0.25):  # the first was killed after it, before the next checkpoint
        log = MetricLog(tmp_path, first_step=2, evaluated=False)
        log.write(1, {"valid_loss": loss})
        log.close()
    got = [(r["step"], r.get("valid_loss")) for r in read_metrics(tmp_path)]
    assert got == [(0, None), (1, None), (1, 0.25)]


@pytest.mark.parametrize("keep", [0, 4])
def test_a_torn_line_is_not_appended_to(tmp_path: Path, keep: int) -> None:
    """It may be the only one that the checkpoint does not cover."""
    write(tmp_path, 0, range(keep))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "lo')
    write(tmp_path, keep, range(keep, 6))
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(6))
    assert (tmp_path / METRICS_FILE).read_text().count("\n") == 6
