"""Programs of generation for a mesh: a single row too, of every grouping of heads."""

import jax
import pytest

from slm_jax.models.presets import dense
from slm_jax.parallel import MeshConfig, make_mesh
from slm_jax.plan.serving import Serving, lower_serving


@pytest.mark.parametrize("n_kv_heads", [4, 1])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("tensor", [4, 1])
def test_one_row_keeps_its_place_on_the_mesh(n_kv_heads: int, phase, tensor: int) -> None:
    model = dense(32, 1, 4, n_kv_heads, d_ff=64, vocab_size=64)
    mesh = MeshConfig(fsdp=1, tensor=tensor)
    serving = Serving(model, phase, 32, mesh=mesh, cache_dtype="int8")
    lowered = lower_serving(serving, make_mesh(mesh, jax.devices()[:tensor]))
    cache = next(leaf for leaf in jax.tree.leaves(lowered.state) if leaf.ndim == 5)
    heads = "tensor" if n_kv_heads > 1 else None
    assert (cache.shape[1:], cache.sharding.spec[3]) == ((1, 32, n_kv_heads, 8), heads)
