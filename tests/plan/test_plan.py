"""Tiny runs are compiled for real slices: what came of it is kept until a source changes."""

from dataclasses import replace

import pytest
from slm_kernels.aot import TARGETS, find_libtpu
from slm_kernels.aot.gpu_targets import GPU_TARGETS, find_cuda

from slm_jax import cli
from slm_jax.errors import UserError
from slm_jax.models.presets import preset
from slm_jax.models.trm import n_parameters
from slm_jax.parallel import MeshConfig
from slm_jax.plan import Compiled, Plan, compile_run, find_slice, make_plan
from slm_jax.plan.collectives import Collective
from slm_jax.plan.program import refusal_bytes
from slm_jax.plan.report import remedies
from slm_jax.plan.slices import slice_names
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


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tpu-v3-8", "choose tpu-KIND-N with a KIND of v5e, v5p, v6e, tpu7x"),
        ("h100-3", "h100-N with N of 1, 2, 4, 8"),
        ("tpu-v5e-7", "v5e slices have 1, 4, 8"),
        ("tpu-v5p-9", "TensorCores, two a chip"),
    ],
)
def test_unknown_slices_are_refused(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        find_slice(name)
    assert cli.main(["plan", "tiny-dense", "--on", name]) == 2


def test_a_plan_needs_a_slice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "tiny-dense"]) == 2
    assert "--on tpu-v5e-256" in capsys.readouterr().err


def test_slices_have_the_chips_that_their_names_say() -> None:
    slices = {name: find_slice(name) for name in slice_names()}
    assert {s.kind for s in slices.values()} == {*TARGETS, *GPU_TARGETS}
    assert (slices["h100-8"].devices, slices["h100-8"].topology) == (8, "h100:1x1x8")
    assert all(s.name == name for name, s in slices.items())
    assert slices["tpu-v5e-256"].topology == "v5e:16x16"
    assert slices["tpu-v5p-64"].chips == slices["tpu-v5p-64"].devices == 32
    assert (slices["tpu-tpu7x-8"].chips, slices["tpu-tpu7x-8"].devices) == (4, 8)
    # 100 GB/s a link and way where Google says 800 of four links, both ways; a ring has two.
    assert slices["tpu-v6e-256"].interconnect == pytest.approx(400e9)
    assert slices["tpu-v6e-8"].interconnect == pytest.approx(200e9)


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
