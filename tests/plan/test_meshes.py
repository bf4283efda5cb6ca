"""Experts and rows that are split over devices, compiled for a TPU slice that is not there."""

import pytest
from slm_kernels.aot import find_libtpu

from slm_jax.models.lm import LMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.ssm import MambaConfig
from slm_jax.parallel import MeshConfig
from slm_jax.plan import compile_run
from slm_jax.slices import find_slice
from slm_jax.train.experiment import Experiment

pytestmark = pytest.mark.slow

V5E_8 = find_slice("tpu-v5e-8")
GQA = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=64)
SWIGLU = MLPConfig(512)
DROPLESS, CAPACITY = MoEConfig(8, 256), MoEConfig(8, 256, dispatch="capacity")
SCANS = (LayerConfig(MambaConfig(512), SWIGLU), LayerConfig(GQA, SWIGLU))


def collectives(pattern: tuple[LayerConfig, ...], mesh: MeshConfig) -> dict[tuple[str, int], int]:
    """How many of each kind and group size a step of four layers runs."""
    try:
        find_libtpu()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    model = LMConfig(512, 256, 4, pattern, dtype="bfloat16", remat="full")
    found = compile_run(Experiment(model, batch_size=8, seq_len=1024, mesh=mesh), V5E_8)
    assert found.fits, found.refusal
    return {(c.kind, c.group): c.count for c in found.collectives}


@pytest.mark.parametrize("experts", [DROPLESS, CAPACITY])
def test_tokens_travel_to_experts(experts: MoEConfig) -> None:
    found = collectives((LayerConfig(GQA, experts),), MeshConfig(fsdp=2, expert=4))
    # There and back in each layer: forward, again for the backward pass, and the gradients.
    assert found["all-to-all", 4] == 4 * 2 * 3
    # Gradients of the experts' three matrices at least; small ones XLA may add up otherwise.
    assert found["reduce-scatter", 2] >= 4 * 3


@pytest.mark.parametrize("ring", [False, True])
def test_rows_are_split(ring: bool) -> None:
    mesh = MeshConfig(fsdp=1, sequence=4, tensor=2, ring=ring)
    found = collectives(SCANS, mesh)
    hops = sum(n for (kind, _), n in found.items() if kind == "collective-permute")
    gathered = found.get(("all-gather", 4), 0)
    assert hops > 0  # borders of the convolution
    # Two layers with attention, whose keys and values are gathered forwards and once more.
    assert gathered >= (0 if ring else 2 * 2 * 2)
    assert hops >= (2 * 3 * 2 if ring else 0)
