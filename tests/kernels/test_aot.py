"""Every named kernel compiles for every TPU, forward and backward.

What compiled is remembered under .cache/aot until the kernels' sources, jax or libtpu change.
"""

from pathlib import Path

import pytest
from slm_kernels.aot import TARGETS, Job, Record, compile_jobs, find_libtpu
from slm_kernels.aot.compile import _why
from slm_kernels.aot.sources import fingerprint
from slm_kernels.cases import CASES

ROOT = Path(__file__).parents[2]

JOBS = [
    Job(name, {**case.shape, **case.small}, backward=backward)
    for name, case in CASES.items()
    for backward in ((False, True) if case.gradients else (False,))
]


@pytest.fixture(scope="module", params=TARGETS)
def failures(request: pytest.FixtureRequest) -> dict[tuple[str, bool], str]:
    """Why a case, forward (false) or backward (true), has no program with kernels of ours."""
    target = request.param
    try:
        key = fingerprint(target)
    except FileNotFoundError as e:
        pytest.skip(str(e))
    seal = ROOT / ".cache" / "aot" / key
    if seal.exists():
        return {}
    found = {(r.job.case, r.job.backward): _failure(r) for r in compile_jobs(target, JOBS)}
    # Not if a source was edited meanwhile.
    if not any(found.values()) and key == fingerprint(target):
        seal.parent.mkdir(parents=True, exist_ok=True)
        seal.touch()
    return found


def _failure(record: Record) -> str:
    if record.error:
        return record.error
    missing = not record.calls or "tpu_custom_call" not in record.hlo
    return "the program has no Pallas kernel" if missing else ""


@pytest.mark.parametrize(
    ("case", "backward"),
    [(job.case, job.backward) for job in JOBS],
    ids=[f"{job.case}-{'backward' if job.backward else 'forward'}" for job in JOBS],
)
def test_compiles(failures: dict[tuple[str, bool], str], case: str, backward: bool) -> None:
    assert not failures.get((case, backward))


def test_one_failure_leaves_the_others(tmp_path: Path) -> None:
    try:
        find_libtpu()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    shape = {**CASES["scan"].shape, **CASES["scan"].small}
    bad, good = compile_jobs(
        "v5e", [Job("scan", shape, implementation="absent"), Job("scan", shape)]
    )
    assert "implementation='absent' does not exist" in bad.error
    assert not good.error
    assert [call.name for call in good.calls] == ["selective_scan_forward"]
    assert good.calls[0].bytes > 0


def test_a_dead_child_is_explained() -> None:
    told = "F1122 11:39 llo_dumper.cc] Static LLO profiling of flash.1 failed: FIFO is full.\nmore"
    assert _why(told) == "Static LLO profiling of flash.1 failed: FIFO is full."
    assert _why("noise\nMemoryError: out\n") == "MemoryError: out"
    assert "without a word: noise" in _why("noise")


def test_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match="target='v3' is unknown: choose from v5e"):
        compile_jobs("v3", [])
