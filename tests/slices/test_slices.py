"""tpu_configs/: what the files say, how they are read, what a run takes from them."""

import copy
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import pytest
import yaml
from slm_kernels.aot import CHIPS
from slm_kernels.aot.gpu_targets import GPUS

from slm_jax import cli
from slm_jax.cli.experiment import default_run, read_run
from slm_jax.errors import UserError
from slm_jax.models.flops import PEAK_FLOPS
from slm_jax.models.lm import LMConfig
from slm_jax.models.presets import PRESETS, preset
from slm_jax.parallel import MeshConfig
from slm_jax.slices import (
    accumulate_for,
    check_hardware,
    find_slice,
    prepare_process,
    slice_names,
)
from slm_jax.slices.read import configs_folder, read_kind, read_kinds
from slm_jax.train import experiment, folder
from slm_jax.train.experiment import Experiment, find_result
from slm_jax.train.trm_presets import TRM_PRESETS

SLICES = {name: find_slice(name) for name in slice_names()}


def test_slices_have_the_chips_that_their_names_say() -> None:
    assert all(s.name == name for name, s in SLICES.items())
    assert (SLICES["h100-8"].devices, SLICES["h100-8"].topology) == (8, "h100:1x1x8")
    assert (SLICES["h100-16"].hosts, SLICES["h100-16"].topology) == (2, "h100:1x2x8")
    assert SLICES["tpu-v5e-256"].topology == "v5e:16x16"
    assert SLICES["tpu-v5p-64"].chips == SLICES["tpu-v5p-64"].devices == 32
    assert (SLICES["tpu-tpu7x-8"].chips, SLICES["tpu-tpu7x-8"].devices) == (4, 8)
    # A process a host on TPUs, a GPU on GPUs.
    assert [SLICES["tpu-v5e-8"].hosts, SLICES["tpu-v5e-16"].hosts] == [1, 4]
    assert [SLICES["tpu-v5e-16"].processes_per_host, SLICES["h100-4"].processes_per_host] == [1, 4]
    assert (SLICES["cpu-8"].hosts, SLICES["cpu-8"].devices) == (1, 8)
    # Two slices are twice the chips, of the same shape.
    one, two = find_slice("tpu-v5p-64"), find_slice("tpu-v5p-64x2")
    assert (two.slices, two.name) == (2, "tpu-v5p-64x2")
    assert (two.devices, two.chips, two.hosts) == (64, 64, 2 * one.hosts)
    assert (two.number, two.topology) == (one.number, one.topology)
    assert (two.chips_per_host, two.interconnect) == (one.chips_per_host, one.interconnect)


def test_peaks_are_those_of_the_kernels_and_of_the_mfu() -> None:
    kinds = {k for k, kind in read_kinds().items() if kind.platform != "cpu"}
    assert kinds == {*CHIPS, *GPUS}
    for s in SLICES.values():
        if s.platform != "cpu":
            chip = PEAK_FLOPS[s.kind.device_kind]
            assert s.device.flops * s.kind.devices_per_chip == pytest.approx(chip.bf16, rel=2e-3)
    assert SLICES["h100-8"].hbm == 0.95 * GPUS["h100"].memory
    assert SLICES["tpu-v6e-8"].hbm == 31.24 * 2**30
    # 100 GB/s a link and way where Google says 800 of four links, both ways; a ring has two.
    assert SLICES["tpu-v6e-256"].interconnect == pytest.approx(400e9)
    assert SLICES["tpu-v6e-8"].interconnect == pytest.approx(200e9)
    assert SLICES["tpu-tpu7x-8"].interconnect == pytest.approx(100e9)


def test_a_host_has_whole_processes_and_a_slice_whole_hosts() -> None:
    for s in SLICES.values():
        assert s.hosts * s.chips_per_host == s.chips
        assert s.processes_per_host in (1, s.chips_per_host)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tpu-v3-8", "choose from cpu-N, h100-N, h200-N, tpu-tpu7x-N, tpu-v4-N, tpu-v5e-N"),
        ("v5e-8", "tpu-v5e-N"),
        ("tpu-h100-8", "h100-N"),
        ("h100-3", "h100 comes with 1, 2, 4, 8, 16, 32, 64 GPUs"),
        ("tpu-v5e-7", "v5e comes with 1, 4, 8"),
        ("tpu-v5p-9", "TensorCores, two a chip"),
        ("tpu-v5e-016", "v5e comes with"),
        ("tpu-v5e-8x1", "two or more slices of TPUs are written tpu-v5e-256x2"),
        ("tpu-v5e-8x", "two or more slices"),
        ("h100-8x2", "two or more slices of TPUs"),
    ],
)
def test_unknown_slices_are_refused(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        find_slice(name)
    assert cli.main(["plan", "tiny-dense", "--on", name]) == 2
    assert cli.main(["train", "tiny-dense", "--on", name]) == 2


V5E: Any = yaml.safe_load((configs_folder() / "v5e.yaml").read_text())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hbm": 1}, "hbm is unknown: choose from platform, device_kind"),
        ({"platform": "npu"}, "platform='npu': choose from tpu, gpu, cpu"),
        ({"hbm_gib": "16"}, "hbm_gib='16' must be of type float"),
        ({"ring": True}, "ring=True must be of type int"),
        ({"link_gbs": None}, "link_gbs is missing: a tpu needs it"),
        ({"platform": "gpu"}, "environment.XLA_PYTHON_CLIENT_MEM_FRACTION is missing"),
        ({"sizes": {4: {"shape": [2, 4]}}}, r"sizes.4: shape=\(2, 4\) is of 8"),
        ({"sizes": {"4": {"shape": [2, 2]}}}, "sizes='4' must be of type int"),
        ({"sizes": {6: {"shape": [2, 3]}}}, "sizes.6 is not a multiple of chips_per_host=4"),
        ({"sizes": {4: {}}}, "sizes.4.shape is missing"),
        ({"defaults": {"remat": "some"}}, "defaults.remat='some': choose from none, full, dots"),
        ({"defaults": {"mesh": {"model": 2}}}, "defaults.mesh.model is unknown"),
        ({"experiments": {"x": {"compiled": [3]}}}, "experiments.x.compiled: no size has 3 chips"),
        ({"experiments": {"x": {"microbatch": 0}}}, "microbatch=0 must be at least 1"),
        ({"flags": {"XLA_FLAGS": "--xla_x"}}, "flags.XLA_FLAGS='--xla_x' must be of type list"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    file = tmp_path / "v5e.yaml"
    file.write_text(yaml.safe_dump(copy.deepcopy(V5E) | change))
    with pytest.raises(UserError, match=told) as refusal:
        read_kind(file)
    assert str(refusal.value).startswith("tpu_configs/v5e.yaml: ")


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"tpu_configs/x\.yaml"):
        read_kind(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("")
    with pytest.raises(UserError, match="the file=None must be of type dict"):
        read_kind(tmp_path / "x.yaml")


def test_every_choice_is_one_that_its_preset_can_take() -> None:
    for stem, kind in read_kinds().items():
        assert kind.experiments, stem
        for name, choices in kind.experiments.items():
            assert name in {**PRESETS, **TRM_PRESETS}
            for where in (s for s in SLICES.values() if s.chip == stem):
                if where.chips in choices.compiled:
                    assert default_run(name, where).mesh.resolve(where.devices)


@pytest.mark.parametrize(
    ("rows", "microbatch", "parts"), [(8, 8, 1), (8, 3, 4), (8, 1, 8), (6, 4, 2), (7, 2, 7)]
)
def test_microbatches_are_the_fewest_that_divide(rows: int, microbatch: int, parts: int) -> None:
    assert accumulate_for(rows, microbatch) == parts


def test_a_run_takes_what_its_slice_chooses_and_options_win() -> None:
    v5e = find_slice("tpu-v5e-256")
    assert v5e.kind.experiments["llama-3.2-1b"].microbatch == 1
    start = default_run("llama-3.2-1b", v5e)
    assert isinstance(start, Experiment)
    assert start.model.remat == "full"

    def read(*words: str) -> Any:
        return read_run(start, "llama-3.2-1b", v5e, ("--batch-size", "512", *words))

    assert read().accumulate == 2
    assert read("--accumulate=1").accumulate == 1
    assert read("--mesh.fsdp", "64", "--mesh.tensor", "4").accumulate == 8
    assert read("--model.remat", "none").model.remat == "none"
    # A preset that the file does not know takes its defaults, and nothing without a slice.
    assert default_run("gemma-2b", v5e).mesh == MeshConfig(fsdp=-1)
    assert default_run("gemma-2b", None) == Experiment(model=preset("gemma-2b"))
    # Puzzles keep their own mesh where the file does not know them.
    assert default_run("sudoku-6x6", v5e) == TRM_PRESETS["sudoku-6x6"]


def test_microbatches_that_would_change_a_run_are_no_choice_of_a_slice() -> None:
    where = find_slice("cpu-8")
    where = replace(
        where, kind=replace(where.kind, defaults=replace(where.kind.defaults, microbatch=1))
    )
    for name, parts in (("tiny-mamba", 4), ("tiny-moe", 1), ("tiny-looped", 1)):
        run = read_run(default_run(name, where), name, where, ())
        assert run.accumulate == parts  # of 32 rows over 8 devices


def _experiment(out: Path, model: LMConfig, **changes: Any) -> Experiment:
    return replace(Experiment(model=model, out=out, steps=3), **changes)


class Started(Exception):
    """The run found its folder fit."""


def test_a_run_goes_on_on_another_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus: Any = SimpleNamespace(
        fingerprint="f", tokenizer=SimpleNamespace(fingerprint="t", vocab_size=1)
    )
    monkeypatch.setattr(experiment, "make_mesh", mock.Mock(side_effect=Started))
    dense, moe = preset("tiny-dense"), preset("tiny-moe")
    for name, model in (("dense", dense), ("moe", moe)):
        run = _experiment(tmp_path / name, model)
        folder.make_folder(run.out, experiment._identity(run, corpus), overwrite=False)
    recomputed = replace(dense, remat="full")
    elsewhere = _experiment(tmp_path / "dense", recomputed, accumulate=4, mesh=MeshConfig(data=8))
    with pytest.raises(Started):
        experiment.run(elsewhere, corpus)
    assert find_result(elsewhere, corpus) is None
    with pytest.raises(UserError, match=r"another run \(batch_size: saved 32, given 64\)"):
        experiment.run(replace(elsewhere, batch_size=64), corpus)
    # Balance terms are taken over a microbatch.
    with pytest.raises(UserError, match=r"another run \(accumulate: saved 1, given 4\)"):
        experiment.run(_experiment(tmp_path / "moe", moe, accumulate=4), corpus)


def test_what_is_set_outside_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    prepare_process(find_slice("cpu-4"))
    flag = "--xla_force_host_platform_device_count"
    assert os.environ == {"XLA_FLAGS": f"{flag}=4", "JAX_PLATFORMS": "cpu"}
    os.environ.update(XLA_FLAGS=f"--xla_dump_to=d {flag}=2", JAX_PLATFORMS="tpu")
    prepare_process(find_slice("cpu-4"))
    assert os.environ == {"XLA_FLAGS": f"--xla_dump_to=d {flag}=2", "JAX_PLATFORMS": "tpu"}


def test_other_hardware_is_refused() -> None:
    assert jax.device_count() == 8
    check_hardware(find_slice("cpu-8"))
    with pytest.raises(UserError, match="on='cpu-4' is 4 devices 'cpu', here are 8 'cpu'"):
        check_hardware(find_slice("cpu-4"))
    with pytest.raises(UserError, match="start it there with `slm launch`, or leave out --on"):
        check_hardware(find_slice("tpu-v5e-8"))


def test_training_ends_on_other_hardware(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    out = tmp_path / "run"
    words = ["train", "tiny-dense", "--on", "tpu-v5e-8", "--steps", "1", "--out", str(out)]
    assert cli.main(words) == 2
    assert "is 8 devices 'TPU v5 lite', here are 8 'cpu'" in capsys.readouterr().err
    assert not out.exists()
