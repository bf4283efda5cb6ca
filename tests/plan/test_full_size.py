"""Every experiment of every file in tpu_configs/, each on the slices that the file names.

Minutes each; what came of it is kept under .cache/plan until a source changes.
"""

import pytest
from slm_kernels.aot import find_libtpu
from slm_kernels.aot.gpu_targets import find_cuda

from slm_jax.cli.plan import full_size
from slm_jax.plan import compile_run, make_plan
from slm_jax.slices import find_slice, slice_names
from slm_jax.train.trm_experiment import TRMExperiment

pytestmark = pytest.mark.slow

CASES = [
    (name, where.name)
    for where in map(find_slice, slice_names("tpu", "gpu"))
    for name, choices in where.kind.experiments.items()
    if where.chips in choices.compiled
]


def test_every_file_has_an_experiment() -> None:
    covered = {find_slice(where).chip for _, where in CASES}
    assert covered == {find_slice(where).chip for where in slice_names("tpu", "gpu")}


@pytest.mark.parametrize(("name", "where"), CASES)
def test_a_full_size_run_compiles_and_fits(name: str, where: str) -> None:
    chosen = find_slice(where)
    try:
        find_cuda() if chosen.platform == "gpu" else find_libtpu()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    run = full_size(name, chosen)
    plan = make_plan(run, chosen, compile_run(run, chosen))
    assert plan.compiled.fits, plan.compiled.refusal
    assert plan.share_of_hbm < 0.9
    if isinstance(run, TRMExperiment):
        assert run.batch_size == 768
        # Attention over 916 slots runs as a kernel; 97 are too few for its tiles.
        kernels = run.model.n_slots >= 128 and run.model.mixer == "attention"
        assert bool(plan.compiled.pallas) == kernels
        # A gradient of the puzzle table, which has most of the weights, is not sent.
        assert sum(c.sent for c in plan.compiled.collectives) < 2**30
