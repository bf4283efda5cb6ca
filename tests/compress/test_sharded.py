"""Quantised models under a mesh that splits batch, weights and heads compute what they do alone."""

import jax
import numpy as np
import pytest

from slm_jax.compress import parse_spec, quantise
from slm_jax.parallel import MeshConfig, make_mesh, shard_batch, shardings
from tests.nn.tiny import tiny_lm, tokens

run = jax.jit(lambda model, ids: model(ids)[0])


@pytest.mark.parametrize(("name", "spec"), [("dense", "w8a8"), ("dense", "w4g4"), ("moe", "w8a8")])
def test_logits_do_not_depend_on_the_mesh(name: str, spec: str) -> None:
    model, ids = quantise(tiny_lm(name, n_layers=2), parse_spec(spec)), tokens(4, 8)
    alone = np.asarray(run(model, ids))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        split = jax.device_put(model, shardings(model, mesh))
        assert "tensor" in split.blocks[0].mixer.q.w.codes.sharding.spec[1]
        got = run(split, shard_batch({"ids": ids}, mesh)["ids"])
    np.testing.assert_allclose(np.asarray(got), alone, rtol=1e-4, atol=1e-4)
