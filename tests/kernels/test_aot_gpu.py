"""The Hopper kernels compile to machine code that spills nothing; attention multiplies with wgmma.

What compiled is remembered under .cache/aot until the kernels' sources, jax or the compiler change.
"""

import hashlib
import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from slm_kernels import profile
from slm_kernels.aot.compile import Job
from slm_kernels.aot.gpu import GpuRecord, _pairs, compile_for_gpu, table
from slm_kernels.aot.gpu_targets import GPU_TARGETS, find_cuda, summarize
from slm_kernels.cases import CASES, Work

ROOT = Path(__file__).parents[2]

# The plain causal one at both sizes of head, each other kind of mask at one. Not here, as it spills
# 24 bytes: dk and dv with a soft-cap at head_dim 128, where the derivative of tanh is kept too.
JOBS = [
    Job(case, {**CASES[case].shape, **CASES[case].small, "D": head_dim}, "gpu", backward=True)
    for case, head_dim in [
        ("attention", 64),
        ("attention", 128),
        ("attention-packed", 128),
        ("attention-full", 128),
        ("attention-window", 64),
    ]
] + [Job("scan-packed", {**CASES["scan"].shape, **CASES["scan"].small}, "gpu")]
ATTENTION = {"attention_forward", "attention_gradient_q", "attention_gradient_kv"}
SCAN = {"selective_scan_ends", "selective_scan_forward"}
SCAN_BACKWARD = {"selective_scan_gradient_ends", "selective_scan_backward"}


def _key(folder: Path | None) -> str:
    """Hash of all that decides what the kernels compile to."""
    path = sys.path if folder is None else [str(folder)]
    versions = sorted(
        f"{d.name}=={d.version}"
        for d in importlib.metadata.distributions(path=path)
        if d.name.startswith(("nvidia", "jax"))
    )
    digest = hashlib.sha256(f"{jax.__version__} {versions}".encode())
    for source in [*sorted((ROOT / "kernels" / "slm_kernels").rglob("*.py")), Path(__file__)]:
        digest.update(source.relative_to(ROOT).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:32]


@pytest.fixture(scope="module", params=GPU_TARGETS)
def failures(request: pytest.FixtureRequest) -> dict[str, str]:
    """What is wrong with a job, by its name; without an entry nothing is."""
    try:
        folder = find_cuda()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    key = _key(folder)
    seal = ROOT / ".cache" / "aot" / f"{request.param}-{key}"
    if seal.exists():
        return {}
    found = {_name(r.job): _failure(r) for r in compile_for_gpu(request.param, JOBS)}
    # Not if a source was edited meanwhile.
    if not any(found.values()) and key == _key(folder):
        seal.parent.mkdir(parents=True, exist_ok=True)
        seal.touch()
    return found


def _name(job: Job) -> str:
    return f"{job.case}-{job.shape['D']}"


def _failure(record: GpuRecord) -> str:
    if record.error:
        return record.error
    attention = record.job.case.startswith("attention")
    kernels = ATTENTION if attention else SCAN | (SCAN_BACKWARD if record.job.backward else set())
    if {k.name for k in record.kernels} != kernels:
        return f"the program has the kernels {[k.name for k in record.kernels]}"
    target = GPU_TARGETS["h100"]
    for k in record.kernels:
        wanted = ("HGMMA", "UTMALDG", "UTMASTG") if attention else ("UTMALDG",)
        operations = {name: k.operations.get(name, 0) for name in wanted}
        if not all(operations.values()):
            return f"{k.name}: {operations}: no wgmma, or no copies by TMA"
        if k.spill_stores or k.spill_loads or k.operations.get("STL", 0):
            return f"{k.name} spills {k.spill_stores} bytes"
        if k.warnings:
            return f"{k.name}: ptxas warns {k.warnings}"
        if not 0 < k.shared < target.shared:
            return f"{k.name}: {k.shared} bytes of shared memory"
    return ""


@pytest.mark.parametrize("name", [_name(job) for job in JOBS])
def test_compiles_without_spills(failures: dict[str, str], name: str) -> None:
    assert not failures.get(name)


@pytest.mark.slow
def test_backward_scan_compiles_without_spills() -> None:
    try:
        find_cuda()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    (record,) = compile_for_gpu("h100", [replace(JOBS[-1], backward=True)])
    assert not _failure(record)


def test_one_failure_leaves_the_others() -> None:
    try:
        find_cuda()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    shape = {**CASES["attention"].shape, "S": 256, "D": 64}
    bad, good = compile_for_gpu(
        "h100", [Job("attention", shape, name) for name in ("absent", "gpu")]
    )
    assert "implementation='absent' does not exist" in bad.error
    assert not good.error
    assert [k.name for k in good.kernels] == ["attention_forward"]
    assert 'custom_call_target="mosaic_gpu' in good.hlo


LOG = """\
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Function properties for kernel
    0 bytes stack frame, 24 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers
"""
SASS = """\
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @P0 UTMALDG.4D [UR8], [UR4] ;
        /*0020*/              @!UP1 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
.L_x_1:
        /*0040*/              @P0 BRA `(.L_x_1) ;
"""


def test_the_plugin_is_of_the_installed_jax() -> None:
    pinned = (ROOT / "kernels" / "cuda.txt").read_text()
    assert f"jax-cuda13-plugin=={jax.__version__} " in pinned
    assert f"jax-cuda13-pjrt=={jax.__version__} " in pinned


def test_summary() -> None:
    kernel = summarize("k", LOG, SASS, "Resources(smem_scratch_bytes=84992, tmem=0)")
    assert (kernel.registers, kernel.spill_stores, kernel.spill_loads) == (168, 24, 44)
    assert kernel.shared == 84992
    assert kernel.operations == {"LDC": 1, "UTMALDG": 1, "HGMMA": 2, "BRA": 1}
    assert kernel.warnings == ["C7510"]
    with pytest.raises(ValueError, match="kernel='k': no"):
        summarize("k", "", SASS, "")


def test_dumps_are_paired_by_kernel() -> None:
    names = ["a_0.ptx", "b_1.ptx", "a_2.ptx", "a_0.resources.txt", "a_1.resources.txt"]
    names += ["b_2.resources.txt", "b_1.cubin"]
    assert _pairs(names) == [
        ("a_0.ptx", "a_0.resources.txt"),
        ("b_1.ptx", "b_2.resources.txt"),
        ("a_2.ptx", "a_1.resources.txt"),
    ]


def test_table() -> None:
    kernel = summarize("k", LOG, SASS, "Resources(smem_scratch_bytes=84992, tmem=0)")
    shape = dict(CASES["attention"].shape)
    record = GpuRecord(Job("attention", shape, "gpu"), kernels=[kernel])
    lines = table(record, Work(flops=989e9, bytes=3352), GPU_TARGETS["h100"]).splitlines()
    assert lines[1].split() == ["k", "168", "24/44", "B", "83", "KiB", "5", "2", "1", "0", "0"]
    assert "floor 1,000.0 us (wgmma)" in lines[2]
    assert lines[3] == "k: ptxas warns C7510"


def test_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match="target='a100' is unknown: choose from h100"):
        compile_for_gpu("a100", [])


def test_missing_cuda_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLM_CUDA", str(tmp_path))
    assert profile.main(["attention", "--target", "h100"]) == 1
    assert "run `make cuda`" in capsys.readouterr().err
