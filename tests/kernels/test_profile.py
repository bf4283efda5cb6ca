"""The profiler's reading of libtpu's dumps, its arithmetic, and one profile from end to end."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from slm_kernels import profile
from slm_kernels.aot import TARGETS, find_libtpu, simulate
from slm_kernels.aot.compile import PallasCall
from slm_kernels.cases import CASES, Work

# Cut from what libtpu wrote for jax's flash attention and for a loop around a copy.
HLO = """\
HloModule jit_run, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  ROOT %add.1 = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"99"}
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.2 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"50"}
  ROOT %kernel.1 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
}

%cond (arg: (s32[], f32[8])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(10)
  ROOT %compare.1 = pred[] compare(%i, %constant.4), direction=LT
}

ENTRY %main (q: f32[8]) -> f32[8] {
  %copy.3 = f32[8]{0} copy(%q), backend_config={"estimated_cycles":"7"}
  %while.1 = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  ROOT %flash.1 = f32[8]{0} custom-call(%y), custom_call_target="tpu_custom_call", backend_config={"bundle_analysis_data":{"estimated_cycles":"146248","flops":"0"}}
}
"""  # noqa: E501

TRACE = """\
0x0: bundle slots:
  %s0_s0 = inlined_call_operand.hbm [shape: bf16[1,2,4096,128], index: 0, kind: input]

0x1: bundle slots:
  %104 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s103_s18, /*size_in_granules=*/4096, /*vmem=*/%s85_s3
  %135 = dma.vmem_to_hbm [thread:$0]  /*vmem=*/%s10, /*size_in_granules=*/8, /*hbm=*/%s8_s1

0x2: bundle slots:
  %286 = dma.done.wait %s284_s10, 4096 /* pipeline-emitter-dma-wait for hbm */
"""

SLOTS = """\
== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 1 0 0 0 2
4 1 4 2 0 1 0 1 1 0
4 2 3 1 1 1 1 1 1 0
0 0 1 0 0 1 1 0 0 0
"""

CALL = PallasCall("kernel", flops=0, transcendentals=0, bytes=0, split=True, runs=1)


def test_operations_count_loops() -> None:
    found = {o.name: (o.cycles, o.runs, o.pallas) for o in simulate.operations(HLO)}
    assert found == {
        "copy.3": (7, 1, False),
        "fusion.2": (50, 10, False),
        "kernel.1": (None, 10, True),
        "flash.1": (146248, 1, True),
    }


def test_a_loop_of_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match="while='cond': no trip count"):
        simulate.operations(HLO.replace("constant(10)", "parameter(0)"))


def test_trace_counts_hbm_traffic() -> None:
    assert simulate.read_trace(iter(TRACE.splitlines())) == simulate.Trace(3, 4104 * 32, True)
    unknown = TRACE.replace("/*size_in_granules=*/8", "/*size_in_granules=*/%s3")
    assert not simulate.read_trace(iter(unknown.splitlines())).known


def test_slots() -> None:
    slots = simulate.read_slots(SLOTS)
    assert (slots.bundles, slots.spills) == (4, 3)
    assert slots.use["MXU"] == 8 / 16
    assert slots.use["VALU"] == 8 / 16
    assert slots.use["EUP"] == 1 / 4


def test_dumps_are_found_by_kernel(tmp_path: Path) -> None:
    (tmp_path / "1795-flash.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(SLOTS)
    (tmp_path / "flash.1_bundles.txt").write_text(TRACE)
    slots, trace = (
        simulate.find_slots(tmp_path, "flash.1"),
        simulate.find_trace(tmp_path, "flash.1"),
    )
    assert slots is not None
    assert slots.bundles == 4
    assert trace is not None
    assert trace.bundles == 3
    assert simulate.find_slots(tmp_path, "flash.10") is None
    assert simulate.find_trace(tmp_path, "flash.10") is None


def test_time_is_bound_by_bandwidth() -> None:
    v5e = TARGETS["v5e"]
    trace = simulate.Trace(1, 819_000_000, True)  # one millisecond of HBM
    work = Work(bytes=409_500_000)
    fast = profile.kernel_row(CALL, work, v5e, 1000, trace, None)
    assert fast.microseconds == pytest.approx(1000)
    assert fast.share == pytest.approx(0.5)
    assert fast.bound == "HBM"
    slow = profile.kernel_row(CALL, work, v5e, 3_000_000, trace, None)
    assert slow.microseconds == pytest.approx(2000)


def test_both_cores_move_bytes() -> None:
    trace = simulate.Trace(1, 100, True)
    assert profile.kernel_row(CALL, Work(), TARGETS["v5p"], 9, trace, None).hbm_bytes == 200
    assert profile.kernel_row(CALL, Work(), TARGETS["v6e"], 9, trace, None).hbm_bytes == 100


def test_what_is_not_simulated_has_no_time() -> None:
    for cycles in (None, 0):
        row = profile.kernel_row(CALL, Work(bytes=8), TARGETS["v5e"], cycles, None, None, "gave up")
        assert row.microseconds is None
        assert row.share is None
        assert "kernel: not simulated: gave up" in profile.table([row])


@pytest.mark.parametrize(("window", "causal"), [(None, True), (None, False), (512, True)])
def test_attention_work_counts_what_is_seen(window: int | None, causal: bool) -> None:
    name = {(None, True): "attention", (None, False): "attention-full"}.get(
        (window, causal), "attention-window"
    )
    shape = {"B": 3, "S": 700, "H": 4, "K": 2, "D": 32}
    q, k = np.arange(700)[:, None], np.arange(700)
    seen = np.ones((700, 700), bool)
    if causal:
        seen = (k <= q) & (q - k < (window or 700))
    work = CASES[name].work(shape, False)
    assert work.transcendentals == 12 * seen.sum()
    assert work.flops == 12 * seen.sum() * 4 * 32
    tokens = 3 * 700
    assert work.bytes == tokens * (4 + 2 + 2 + 4) * 32 * 2 + 700 * 4


def test_roofline() -> None:
    seconds, bound = profile.roofline(Work(flops=197e9, bytes=1), TARGETS["v5e"])
    assert (seconds, bound) == (pytest.approx(1e-3), "MXU")
    seconds, bound = profile.roofline(Work(vector_ops=4 * 1024 * 1.5e9), TARGETS["v5e"])
    assert (seconds, bound) == (pytest.approx(1), "VALU")


def test_shape() -> None:
    assert profile.parse_shape("B=2,S=8", {"B": 1, "S": 4, "D": 128}) == {"B": 2, "S": 8, "D": 128}
    with pytest.raises(ValueError, match="no axis 'X': choose from B"):
        profile.parse_shape("X=2", {"B": 1})
    with pytest.raises(ValueError, match="B='0' is no size"):
        profile.parse_shape("B=0", {"B": 1})


def test_jax_has_no_scan() -> None:
    case = CASES["scan"]
    with pytest.raises(
        ValueError, match="against='jax': not known for this case: choose from 'xla'"
    ):
        case.build(case.shape, "jax", backward=False)


def test_missing_libtpu_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else real(name)
    )
    monkeypatch.setenv("SLM_LIBTPU", str(tmp_path))
    assert profile.main(["attention"]) == 1
    assert "run `make libtpu`" in capsys.readouterr().err


@pytest.mark.slow
def test_profile_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        find_libtpu()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    file = tmp_path / "rows.json"
    assert profile.main(["attention", "--against", "jax", "--json", str(file)]) == 0
    assert "share" in capsys.readouterr().out
    ours, other = json.loads(file.read_text())
    kernel, *_, whole = ours["rows"]
    assert kernel["kernel"] == "attention_forward"
    assert 0 < kernel["share"] < 1
    assert 0 < whole["share"] < kernel["share"]
    assert kernel["hbm_bytes"] >= kernel["least_bytes"] > 0
    assert 0 < kernel["slots"]["MXU"] <= 1
    # What the prototype of this profiler measured for blocks of 512.
    assert other["rows"][0]["cycles"] == pytest.approx(146_248, rel=0.02)
    assert other["rows"][0]["hbm_bytes"] == 172 * 131_072
