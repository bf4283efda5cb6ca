"""The paper's runs at full size, each on a slice whose memory holds its step.

Minutes each; what came of it is kept under .cache/plan until a source changes.
"""

import pytest
from slm_kernels.aot import find_libtpu
from slm_kernels.aot.gpu_targets import find_cuda

from slm_jax.plan import compile_run, find_slice, make_plan
from slm_jax.train.trm_presets import TRM_PRESETS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("sudoku-extreme", "tpu-v5e-4"),
        ("sudoku-extreme-attention", "tpu-v5e-4"),
        ("maze-hard", "tpu-v5e-16"),
        ("arc-agi-1", "tpu-v5e-16"),
        ("arc-agi-2", "tpu-v5e-16"),
        ("sudoku-extreme", "h100-1"),
        ("sudoku-extreme-attention", "h100-1"),
        ("maze-hard", "h100-4"),
        ("arc-agi-1", "h100-4"),
        ("arc-agi-2", "h100-4"),
    ],
)
def test_a_full_size_run_compiles_and_fits(name: str, where: str) -> None:
    on_gpu = where.startswith("h100")
    try:
        find_cuda() if on_gpu else find_libtpu()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    run, chosen = TRM_PRESETS[name], find_slice(where)
    assert run.batch_size == 768
    plan = make_plan(run, chosen, compile_run(run, chosen))
    assert plan.compiled.fits, plan.compiled.refusal
    assert plan.share_of_hbm < 0.95
    # Attention over 916 slots runs as a kernel; 97 are too few for its tiles.
    kernels = run.model.n_slots >= 128 and run.model.mixer == "attention"
    assert bool(plan.compiled.pallas) == kernels
    # A gradient of the puzzle table, which has most of the weights, is not sent.
    sent = sum(c.sent for c in plan.compiled.collectives)
    assert sent < 2**30
