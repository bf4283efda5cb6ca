"""Tiny runs are compiled for real slices: what came of it is kept until a source changes."""

from dataclasses import replace
from pathlib import Path

import pytest
from slm_kernels.aot import find_libtpu, simulate
from slm_kernels.aot.gpu_targets import find_cuda

from slm_jax import cli
from slm_jax.errors import UserError
from slm_jax.models.presets import preset
from slm_jax.models.trm import n_parameters
from slm_jax.parallel import MeshConfig
from slm_jax.plan import Compiled, Plan, compile_run, make_plan
from slm_jax.plan.collectives import Collective
from slm_jax.plan.memory import least_bytes
from slm_jax.plan.program import refusal_bytes
from slm_jax.plan.report import remedies
from slm_jax.slices import find_slice
from slm_jax.train.experiment import Experiment
from slm_jax.train.trm_presets import TRM_PRESETS

V5E_4 = find_slice("tpu-v5e-4")
LM = Experiment(
    model=replace(preset("tiny-dense"), dtype="bfloat16"), batch_size=8, seq_len=256, ema_decay=0.99
)
TRM = replace(TRM_PRESETS["sudoku-6x6"], mesh=MeshConfig(data=-1, fsdp=1))


@pytest.fixture
def libtpu() -> None:
    try:
        find_libtpu()
    except FileNotFoundError as e:
        pytest.skip(str(e))


@pytest.mark.usefixtures("libtpu")
def test_a_language_model_is_compiled() -> None:
    c = compile_run(LM, V5E_4)
    assert c.fits
    assert c.arguments["average"] == c.arguments["weights"]
    moments = c.arguments["optimizer"] - 2 * c.arguments["weights"]
    assert 0 < moments <= 64  # two moments and counts
    assert c.arguments["batch"] == 8 // 4 * 256 * 4 * 5
    assert sum(c.arguments.values()) <= c.argument_bytes < V5E_4.hbm
    assert sum(c.arguments.values()) < least_bytes(LM, 4) <= c.device_bytes
    assert c.temporary_bytes > 0
    # FSDP: weights gathered, gradients scattered, in a loop over the layers.
    kinds = {x.kind for x in c.collectives}
    assert {"all-gather", "reduce-scatter"} <= kinds
    assert {x.group for x in c.collectives} == {4}
    # Attention's kernels, forward and backward, in each layer.
    assert {"flash" in call.name or "attention" in call.name for call in c.pallas} == {True}
    assert {call.runs for call in c.pallas} == {LM.model.n_layers}


@pytest.mark.usefixtures("libtpu")
def test_a_recursive_model_is_compiled() -> None:
    plan = make_plan(TRM, V5E_4, compile_run(TRM, V5E_4))
    c = plan.compiled
    assert {x.kind for x in c.collectives} == {"all-reduce"}
    # Replicas: gradients are added up over them, those of z's updates and of y's apart, and so are
    # a few scalars. Twice as much would mean that one is added up in a loop.
    gradients = 4 * n_parameters(TRM.model)
    assert gradients <= sum(x.bytes for x in c.collectives) < 2.1 * gradients
    assert plan.estimate is not None
    assert plan.estimate > plan.bounds["matrix units"] > 0


@pytest.mark.usefixtures("libtpu")
def test_between_slices_goes_a_part_of_the_gradients() -> None:
    two = find_slice("tpu-v5e-4x2")
    run = replace(TRM, mesh=MeshConfig(data=2, fsdp=4))
    plan = make_plan(run, two, compile_run(run, two))
    inside, between = (
        [c for c in plan.compiled.collectives if c.leaves_slice == leaves]
        for leaves in (False, True)
    )
    # Each of the four chips of a slice sends the part of the gradients that it holds, those of z's
    # updates and of y's apart, in whole tiles.
    gradients = 4 * n_parameters(run.model)
    assert gradients / 4 <= sum(c.bytes for c in between) < gradients
    assert {c.group for c in between} == {2}
    assert max(c.group for c in inside) <= 4
    assert plan.bounds["interconnect"] == sum(c.sent for c in inside) / two.interconnect
    with pytest.raises(UserError, match=r"mesh.data=1: 2 slices .*: choose a multiple of 2"):
        compile_run(replace(TRM, mesh=MeshConfig()), two)


@pytest.mark.usefixtures("libtpu")
def test_a_file_of_tpu_configs_is_compiled_with_its_flags(tmp_path: Path) -> None:
    v6e = find_slice("tpu-v6e-4")
    run = replace(LM, model=replace(LM.model, n_layers=1), batch_size=4)
    assert compile_run(run, v6e, kept=tmp_path).fits
    (kept,) = tmp_path.iterdir()
    unknown = replace(v6e.kind, flags={"LIBTPU_INIT_ARGS": ("--xla_tpu_no_such_flag=true",)})
    with pytest.raises(UserError, match="xla_tpu_no_such_flag"):
        compile_run(run, replace(v6e, kind=unknown), kept=tmp_path)
    # Another memory is no other program.
    small = replace(v6e, kind=replace(v6e.kind, hbm_gib=2**-20))
    refused = compile_run(run, small, kept=tmp_path)
    assert not refused.fits
    assert refused.temporary_bytes > 2**10
    assert list(tmp_path.iterdir()) == [kept]


def test_a_recursive_model_is_compiled_for_a_gpu() -> None:
    try:
        find_cuda()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    node = find_slice("h100-2")
    plan = make_plan(TRM, node, compile_run(TRM, node))
    c = plan.compiled
    assert c.fits
    assert c.temporary_bytes > 0
    gradients = 4 * n_parameters(TRM.model)
    assert gradients <= sum(x.bytes for x in c.collectives) < 2.1 * gradients
    assert {x.group for x in c.collectives} == {2}
    assert plan.estimate is None
    assert plan.bounds["matrix units"] == plan.flops / (2 * 989e12)


@pytest.mark.usefixtures("libtpu")
def test_a_step_too_large_for_the_memory_says_what_to_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = cli.main(["plan", "sudoku-6x6", "--on", "tpu-v5e-1", "--batch-size", str(2**20)])
    assert code == 2
    said = capsys.readouterr()
    assert "does not fit" in said.err
    assert "--model.remat full" in said.err
    assert "--accumulate" in said.err
    assert "weights (argument)" in said.out


def test_a_plan_needs_a_slice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "tiny-dense"]) == 2
    assert "--on tpu-v5e-256" in capsys.readouterr().err
    assert cli.main(["plan", "tiny-dense", "--on", "cpu-8"]) == 2
    assert "not planned for" in capsys.readouterr().err


def test_cycles_that_libtpu_does_not_know_are_none() -> None:
    known, unknown = (
        f'%f.{n} = f32[] fusion(), backend_config={{"estimated_cycles":"{n}"}}'
        for n in (7, 2**63 - 1)
    )
    text = f"HloModule m\n\nENTRY %main (x: f32[]) -> f32[] {{\n  {known}\n  {unknown}\n}}\n"
    assert [op.cycles for op in simulate.operations(text)] == [7, None]


def _plan(run: Experiment, **changes: object) -> Plan:
    arguments = {"weights": 2**30, "optimizer": 2**31, "average": 0, "carry": 0, "batch": 0}
    given = {"arguments": arguments, "fits": False, "temporary_bytes": 40 * 2**30} | changes
    return make_plan(run, V5E_4, Compiled(**given))


def test_bounds_are_those_of_the_peaks() -> None:
    sent = [Collective("all-gather", 1, 2 * 10**9, 1e9, 4)]
    plan = _plan(LM, collectives=sent, temporary_bytes=10**8)
    assert plan.bounds["interconnect"] == pytest.approx(1e9 / 100e9)
    state = 3 * 2**30
    assert plan.bounds["memory"] == pytest.approx((2 * state + 2e8) / 819e9)
    assert plan.bounds["matrix units"] == pytest.approx(plan.flops / 4 / 197e12)
    assert plan.bound == ("interconnect", plan.bounds["interconnect"])
    assert plan.mfu(plan.at_mfu(0.4)) == pytest.approx(0.4)
    full = _plan(replace(LM, model=replace(LM.model, remat="full")))
    assert full.model_flops == plan.model_flops
    assert full.flops > plan.flops


def test_remedies_fit_what_is_too_large() -> None:
    run = replace(LM, batch_size=64)
    told = remedies(_plan(run))
    assert told[0].endswith("--model.remat full")
    # 40 GiB of temporaries beside 4 GiB of weights, optimiser and gradients: a quarter at a time.
    assert told[1].endswith("--accumulate 4")
    done = replace(run, model=replace(run.model, remat="full"), accumulate=16)
    assert remedies(_plan(done)) == ["take more chips"]
    large = {"weights": 2**33, "optimizer": 2**34, "average": 0, "carry": 0, "batch": 0}
    copied = replace(run, mesh=MeshConfig(data=4, fsdp=1))
    assert remedies(_plan(copied, arguments=large)) == [
        "split the weights too: --mesh.data 1 --mesh.fsdp 4"
    ]
    assert "5 times the chips" in remedies(_plan(run, arguments=large))[0]


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: the total memory required for HLO "
            "temporaries (20.5G) exceeds available HBM (15.75G)",
            20.5 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 1.5T of 15.75G hbm.", 1.5 * 2**40),
        ("INVALID_ARGUMENT: Used 1.5T of 15.75G hbm.", None),
    ],
)
def test_libtpu_says_how_much_it_would_take(message: str, needed: float | None) -> None:
    assert refusal_bytes(message) == needed
