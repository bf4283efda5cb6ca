"""The search against measuring every candidate, and what it prints."""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import pytest
from slm_kernels.aot import find_libtpu

import slm_jax.cli.plan
from slm_jax import cli
from slm_jax.errors import UserError
from slm_jax.models.presets import dense, preset
from slm_jax.parallel import MeshConfig, make_mesh
from slm_jax.plan import Compiled, compile_run
from slm_jax.plan.memory import least_bytes
from slm_jax.plan.program import Run
from slm_jax.plan.search import Found, candidates, describe, search, seconds_of
from slm_jax.slices import Slice, find_slice
from slm_jax.train.experiment import Experiment, step_inputs
from slm_jax.train.step import lower_step

V5E_4, H100_2 = find_slice("tpu-v5e-4"), find_slice("h100-2")
# Its weights are large beside its activations, so that splitting them is what counts.
RUN = Experiment(model=dense(64, 8, 4, 2, 256, vocab_size=256), batch_size=4, seq_len=32)

_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def with_hbm(where: Slice, n: float) -> Slice:
    return replace(where, kind=replace(where.kind, hbm_gib=n / 2**30))


@functools.cache
def measured(run: Run) -> Compiled:
    """The step on fake CPU devices."""
    assert isinstance(run, Experiment)
    step, batch = step_inputs(run)
    lowered = lower_step(step, make_mesh(run.mesh, jax.devices()[:2]), batch)
    memory = lowered.step.compile(_QUICK).memory_analysis()
    assert memory is not None
    return Compiled(
        {"all": memory.argument_size_in_bytes},
        argument_bytes=memory.argument_size_in_bytes,
        new_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
    )


def limited(compiled: Compiled, where: Slice) -> Compiled:
    """As `compile_run` answers on a device of that memory."""
    used = compiled.device_bytes
    if used <= where.hbm:
        return compiled
    return replace(compiled, fits=False, temporary_bytes=used)


def agrees_with_measuring(
    run: Experiment, on: Slice, compile_one: Callable[[Run], Compiled]
) -> Found:
    bytes_of = {r: compile_one(r).device_bytes for r in candidates(run, on) if r.mesh.tensor < 4}
    for r, n in bytes_of.items():
        assert least_bytes(r, on.devices) <= n, describe(r, on)
    # A memory that holds some of them.
    where = with_hbm(on, sorted(bytes_of.values())[len(bytes_of) // 4])
    found = search(
        run,
        where,
        limit=len(bytes_of),
        progress=lambda line: None,
        compile_one=lambda r, where: limited(compile_one(r), where),
    )
    fitting = {plan.run for plan in found.fitting}
    assert fitting == {r for r, n in bytes_of.items() if n <= where.hbm}
    too_large = {plan.run for plan in found.too_large}
    assert too_large | set(found.pruned) == set(bytes_of) - fitting
    assert not found.untried
    seconds = [seconds_of(plan) for plan in found.fitting]
    assert seconds == sorted(seconds)
    # Two key-value heads are not split over four devices.
    assert {r.mesh.tensor for r, _ in found.refused} == ({4} if on.devices == 4 else set())
    return found


@pytest.mark.slow
def test_a_search_finds_what_measuring_all_finds() -> None:
    # What is left out unmeasured is surely too large; a TPU's program outweighs so small a model.
    assert agrees_with_measuring(replace(RUN, batch_size=2), H100_2, measured).pruned


@pytest.mark.slow
def test_a_search_for_a_tpu_finds_what_compiling_all_finds() -> None:
    try:
        find_libtpu()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    agrees_with_measuring(RUN, V5E_4, lambda run: compile_run(run, V5E_4))


def test_candidates_are_all_that_divide() -> None:
    runs = list(candidates(replace(RUN, batch_size=2), V5E_4))
    meshes = {(r.mesh.data, r.mesh.fsdp, r.mesh.tensor) for r in runs}
    assert meshes == {(1, 1, 4), (1, 2, 2), (2, 1, 2)}  # no more than two parts of two rows
    assert {r.accumulate for r in runs if r.mesh.tensor == 4} == {1, 2}
    assert {r.model.remat for r in runs} == {"none", "dots", "full"}
    assert len(runs) == len(set(runs)) == 3 * (2 + 1 + 1)
    # Balance terms would be other ones in smaller microbatches; other axes stay.
    moe = replace(
        RUN, model=preset("tiny-moe"), mesh=MeshConfig(expert=2), accumulate=2, batch_size=8
    )
    found = list(candidates(moe, V5E_4))
    assert {(r.accumulate, r.mesh.expert) for r in found} == {(2, 2)}
    assert {(r.mesh.data, r.mesh.fsdp, r.mesh.tensor) for r in found} == {
        (1, 1, 2),
        (1, 2, 1),
        (2, 1, 1),
    }


def test_the_limit_leaves_the_least_promising(capsys: pytest.CaptureFixture[str]) -> None:
    compiled: list[Run] = []

    def compile_one(run: Run, where: Slice) -> Compiled:
        compiled.append(run)
        return Compiled({"weights": 2**20})

    lines: list[str] = []
    found = search(RUN, V5E_4, limit=3, progress=lines.append, compile_one=compile_one)
    assert len(found.fitting) == 3
    assert len(found.untried) == len(list(candidates(RUN, V5E_4))) - 3 - len(found.refused)
    assert (compiled[0].model.remat, compiled[0].accumulate) == ("none", 1)
    assert all(run.model.remat != "full" for run in compiled)
    assert lines[0].endswith("compiling 3")
    assert [line[:3] for line in lines[1::2]] == ["1/3", "2/3", "3/3"]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that says half of the memory for `none`, and too much for `dots`."""

    def compile_one(run: Run, where: Slice) -> Compiled:
        state = {"weights": 2**20, "optimizer": 2**21}
        if run.model.remat == "dots":
            return Compiled(state, fits=False, temporary_bytes=2**40)
        return Compiled(state, argument_bytes=2**21, temporary_bytes=round(where.hbm / 2))

    monkeypatch.setattr(slm_jax.cli.plan, "compile_run", compile_one)
    fake = functools.partial(search, compile_one=compile_one)
    monkeypatch.setattr(slm_jax.cli.plan, "search", fake)


@pytest.mark.usefixtures("no_compiler")
def test_a_search_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "tiny-dense", "--on", "tpu-v5e-4", "--search", "8"]) == 0
    said = capsys.readouterr()
    assert "compiling 8" in said.err
    assert "50%" in said.out
    assert "compiled, too large" in said.out
    assert "not compiled, the limit was reached" in said.out
    assert "refused: " in said.out
    assert "the first: --mesh.data" in said.out
    assert cli.main(["plan", "tiny-dense", "--on", "tpu-v5e-4", "--search", "all"]) == 2
    assert "search='all'" in capsys.readouterr().err


def test_a_search_in_which_nothing_fits_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(run: Run, where: Slice) -> Compiled:
        raise UserError("no compiler is here")

    def too_large(run: Run, where: Slice) -> Compiled:
        return Compiled({}, fits=False, temporary_bytes=2**40)

    words = ["plan", "sudoku-6x6", "--on", "tpu-v5e-1", "--search", "2"]
    for compile_one, told in ((refused, "no compiler is here"), (too_large, "take more chips")):
        fake = functools.partial(search, compile_one=compile_one)
        monkeypatch.setattr(slm_jax.cli.plan, "search", fake)
        assert cli.main(words) == 2
        assert told in capsys.readouterr().err


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    "words",
    [
        "--compare tiny-dense tiny-mamba --on tpu-v5e-4",
        "tiny-dense --compare tpu-v5e-4 tpu-v6e-8 --batch-size 32",
    ],
)
def test_two_plans_side_by_side(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *words.split()]) == 0
    said = capsys.readouterr().out
    first, second = words.partition("--compare ")[2].split()[:2]
    assert f"{first} ┃ " in said.replace("  ", " ") or first in said
    assert second in said
    for row in ("slice", "weights", "memory of a device", "least time", "MFU"):
        assert f"│ {row}" in said


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--compare tiny-dense", "takes two names"),
        ("--compare tiny-dense tiny-moe", "on=None"),
        ("--compare tpu-v5e-4 tpu-v6e-4 --on tpu-v5e-4", "with --on these are two presets"),
        ("--compare tiny-dense tpu-v6e-4", "on='tiny-dense' does not exist"),
    ],
)
def test_comparisons_that_say_too_little(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *words.split()]) == 2
    assert told in capsys.readouterr().err
