import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import attention_efficiency as study
import jax
import numpy as np
import pytest
from attention_efficiency_cells import (
    Cells,
    Timing,
    compiled,
    filled_state,
    prompt_flops,
    token_flops,
)
from attention_efficiency_report import CompiledCell, MeasuredCell, in_words
from slm_kernels.aot import find_libtpu
from slm_kernels.aot.gpu_targets import find_cuda

from slm_jax import cli
from slm_jax.errors import UserError
from slm_jax.infer.step import prefill, round_up
from slm_jax.models.flops import forward_flops
from slm_jax.models.lm import LM
from slm_jax.models.presets import state_bytes, summary
from slm_jax.slices import find_slice

TINY = study.Shape(32, 2, 4, 2, window=24, d_ff=96, vocab_size=64, dtype="float32", d_ff_multiple=8)
WIDE = study.Shape(
    512, 2, 4, 2, window=128, d_ff=1024, vocab_size=512, dtype="bfloat16", d_ff_multiple=128
)
TIMING = Timing(batch=1, chunk=16, new_tokens=2, cache_dtype=None)
ARGS = [
    *("--small.d-model", "32", "--small.n-layers", "2", "--small.n-heads", "4"),
    *("--small.d-ff", "96", "--small.window", "24"),
    *("--arms", "mha", "mamba", "--contexts", "16", "32", "--longest-prompt", "16"),
    *("--rounds", "2", "--chunk", "16", "--new-tokens", "2", "--on"),
]


def test_caches_have_the_bytes_of_the_formula() -> None:
    def at(arm: str, context: int) -> int:
        return state_bytes(study.model(TINY, arm, 64), context)

    layers, head_dim, number = 2, 32 // 4, 4
    for arm, heads in (("mha", 4), ("gqa", 2), ("mqa", 1)):
        assert at(arm, 64) == layers * 2 * 64 * heads * head_dim * number, arm
    assert at("window", 64) == layers * 2 * 24 * 4 * head_dim * number
    assert at("window", 16) == at("mha", 16)
    # Three inputs of the convolution and 16 state values a channel, whatever the length.
    assert at("mamba", 64) == at("mamba", 1) == layers * (2 * 32) * (3 + 16) * number


@pytest.mark.parametrize("shape", [study.Efficiency.small, study.Efficiency.large])
def test_models_have_equal_parameters(shape: study.Shape) -> None:
    sizes = {arm: summary(study.model(shape, arm, 1024)).total for arm in study.ARMS}
    for arm, size in sizes.items():
        assert abs(size / sizes["mha"] - 1) < 0.01, arm
    if shape == study.Efficiency.large:  # Llama 7B's, without its head
        assert (
            sizes["mha"] == 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
        )
    with pytest.raises(UserError, match="d_ff=8: the mixer mamba alone has more parameters"):
        study.model(replace(shape, d_ff=8), "mamba", 1024)


@pytest.mark.parametrize("arm", study.ARMS)
def test_operations_of_a_token(arm: str) -> None:
    config = study.model(TINY, arm, 64)
    # The tokens of a row add up to the row, and the last one sees all before it.
    row = sum(token_flops(config, n) for n in range(1, 49))
    assert row == pytest.approx(48 * forward_flops(config, 48).total)
    assert prompt_flops(config, 48) == pytest.approx(row - 47 * 2 * 32 * 64)  # one head
    keys = {"window": 24 - 16, "mamba": 0}.get(arm, 48 - 16)
    more = token_flops(config, 48) - token_flops(config, 16)
    assert more == pytest.approx(2 * 4 * 32 * keys)  # layers, two products of 2 x width


def test_one_program_serves_where_the_state_has_stopped_growing() -> None:
    config = study.Efficiency(compiled_contexts=(16, 32, 64), on=())
    window, mamba, mha = (study.model(TINY, arm, 64) for arm in ("window", "mamba", "mha"))
    same = study._same_program
    assert [same(config, window, "decode", n) for n in (16, 32, 64)] == [16, 32, 32]
    assert [same(config, mamba, "decode", n) for n in (16, 32, 64)] == [16, 16, 16]
    assert [same(config, mha, "decode", n) for n in (16, 32, 64)] == [16, 32, 64]
    assert [same(config, mamba, "prefill", n) for n in (16, 32, 64)] == [16, 32, 64]


@pytest.mark.parametrize(("arm", "context"), [("window", 40), ("gqa", 16)])
def test_a_filled_state_is_that_of_a_prompt(arm: str, context: int) -> None:
    config = study.model(TINY, arm, 64)
    filled = filled_state(config, context, TIMING)
    model = LM(config, jax.random.key(0))
    tokens = np.ones((1, context), np.int32)
    _, state = prefill(model, tokens, tokens, round_up(context + 4), chunk=8)
    read = state["blocks"][0]
    assert jax.tree.map(jax.typeof, filled) == jax.tree.map(jax.typeof, state)
    assert np.array_equal(filled["blocks"][0].positions, read.positions)
    counted = state_bytes(config, read.k.shape[2])
    assert counted == read.k.nbytes + read.v.nbytes == filled["blocks"][0].k.nbytes * 2


def test_the_study_runs_reports_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    args = [*ARGS, "--out", str(out)]
    assert cli.run(study.main, study.Efficiency, args=args) == 0
    lines = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    cells = {(r["phase"], r["context"], r["arm"]): r for r in lines if r["kind"] == "measured"}
    arms = ("mha", "mamba")
    assert list(cells) == [
        (phase, n, arm) for phase, n in (("decode", 16), ("decode", 32), ("prefill", 16))
        for arm in arms
    ]  # fmt: skip
    log = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert [c["arm"] for c in log] == [*arms] * 6  # in turn
    for (phase, context, arm), row in cells.items():
        rounds = [
            c["seconds"]
            for c in log
            if (c["phase"], c["context"], c["arm"]) == (phase, context, arm)
        ]
        assert len(rounds) == row["data"]["rounds"] == 2
        tokens = context if phase == "prefill" else 1
        assert row["speed"] == pytest.approx(tokens / np.mean(rounds))  # the median of two
        assert row["cache"] == state_bytes(
            study.model(replace(TINY, vocab_size=257), arm, 32), context
        )
    text = (out / "report.md").read_text()
    assert "| mamba |" in text
    assert "Measured here, from 16 to 32 tokens" in text
    assert (out / "report.png").stat().st_size > 10_000

    # What is there is not timed again, a line that a kill has cut is.
    timed, again = study.timed, []
    monkeypatch.setattr(study, "timed", lambda *a: again.append(a[1:3]) or timed(*a))
    file = out / "cells.jsonl"
    file.write_text(file.read_text()[:-9])
    assert cli.run(study.main, study.Efficiency, args=args) == 0
    assert again == [("prefill", 16)]
    assert cli.run(study.main, study.Efficiency, args=[*args, "--chunk", "8"]) == 2
    assert "holds cells of another study (chunk: saved 16, given 8)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": ("mha", "lstm")}, "arms='lstm' does not exist: choose from mha"),
        ({"arms": ("gqa",)}, "lacks mha"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"contexts": (2048, 1024)}, "must rise"),
        ({"compiled_contexts": (0,)}, r"compiled_contexts=\(0,\) must rise, from 1 token on"),
        ({"contexts": (1000,)}, "contexts=1000 is not a multiple of chunk=512"),
        ({"on": ("cpu-8",)}, "on='cpu-8' is no accelerator"),
        ({"on": ("tpu-v5e-3",)}, "on='tpu-v5e-3'"),
    ],
)
def test_bad_options_are_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        study.Efficiency(**({"on": ()} | changes))


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise FileNotFoundError("no compiler: run `make libtpu`")

    monkeypatch.setattr(study, "find_libtpu", missing)
    with pytest.raises(UserError, match="on='tpu-v5e-4': no compiler: run `make libtpu`"):
        study.Efficiency(on=("tpu-v5e-4",))


@pytest.mark.slow
def test_a_decode_step_is_compiled_for_tpus() -> None:
    try:
        find_libtpu()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    config = study.model(WIDE, "mha", 1024)
    where = find_slice("tpu-v5e-4")
    cell = compiled(config, "decode", 1024, TIMING, where)
    assert not cell["refusal"]
    # A head and a quarter of every matrix a chip; each has the positions of all slots.
    positions = 2 * 4 * 1024
    assert cell["state"] == state_bytes(config, 1024) / 4 + positions
    assert 2 * summary(config).total / 4 <= cell["weights"] < 2.1 * summary(config).total / 4
    assert cell["bytes"] == cell["weights"] + cell["state"] < cell["memory"]
    assert cell["bounds"]["memory"] == cell["bytes"] / where.device.bandwidth
    assert cell["bounds"]["matrix units"] == cell["flops"] / 4 / where.device.flops
    assert cell["kernels"] == ["decode_attention"]
    assert cell["estimate"] > max(cell["bounds"].values())


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["gqa", "window", "mamba"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_programs_are_compiled_for_a_gpu(arm: str, phase: Any) -> None:
    try:
        find_cuda()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    config = study.model(WIDE, arm, 256)
    cell = compiled(config, phase, 256, TIMING, find_slice("h100-1"))
    assert not cell["refusal"]
    slots = {"window": 128, "mamba": 0}.get(arm, 256)
    assert cell["state"] == state_bytes(config, 256) + 2 * 4 * slots
    assert cell["estimate"] is None  # nothing is simulated


def _measured(arm: str, context: int, seconds: float, cache: int) -> MeasuredCell:
    return MeasuredCell(arm, "decode", context, 1, cache, {"seconds": seconds})


def test_the_sentences_are_made_of_the_numbers() -> None:
    measured = [
        _measured("mha", 16, 0.1, 100),
        _measured("mqa", 16, 0.1, 25),
        _measured("mha", 64, 0.4, 400),
        _measured("mqa", 64, 0.125, 100),
    ]
    shared = {"on": "tpu-v5e-4", "phase": "decode"}
    found = [
        CompiledCell(arm, 64, 1, 0, shared | {
            "state": state, "bytes": 10e9 + state, "estimate": 3 * seconds,
            "bounds": {"memory": seconds, "matrix units": seconds / 2},
        })
        for arm, state, seconds in (("mha", 10e9, 8e-3), ("mqa", 2e9, 5e-3))
    ]  # fmt: skip
    here, there = in_words(measured, found)
    assert "from 16 to 64 tokens of context decode keeps mha 25, mqa 80 %" in here
    assert "against mha, mqa 3.2 times (0.25 of its cache)" in here
    assert "behind 64 at least 20.0 GB a device with mha, 50% of it cache, 8.0 ms" in there
    assert "mqa 1.60 times; XLA expects its own programs to take 3.0 to 3.0 times" in there
    # Without a simulator there is nothing to expect, and what was refused is left out.
    for cell in found:
        cell.data["estimate"] = None  # type: ignore[index]
    refused = CompiledCell("gqa", 64, 1, 0, shared | {"refusal": "too large"})
    (_, there) = in_words(measured, [*found, refused])
    assert "expects" not in there
    assert "gqa" not in there


def test_cells_of_other_models_are_refused(tmp_path: Path) -> None:
    Cells(tmp_path, {"small": asdict(TINY)}).put({"arm": "mha", "context": 16, "round": 0})
    again = Cells(tmp_path, {"small": asdict(TINY)})
    assert again.get(arm="mha", context=16, round=0) is not None
    assert again.get(arm="mha", context=16, round=1) is None
    with pytest.raises(UserError, match=r"small\.d_model: saved 32, given 64"):
        Cells(tmp_path, {"small": asdict(replace(TINY, d_model=64))})
