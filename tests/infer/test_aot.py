"""A decode step compiled for TPUs that are not there: attention is the kernel, on a mesh too."""

import subprocess
import sys

import pytest
from slm_kernels.aot import find_libtpu
from slm_kernels.aot.compile import child_environment

# Prints how many calls of the decode kernel the program of one step has.
CHILD = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from slm_jax.infer.step import decode
from slm_jax.models.lm import LM
from slm_jax.models.presets import dense
from slm_jax.parallel import shardings

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
axes = dict(data=2, fsdp=1, expert=1, sequence=1, tensor=2)
devices = np.array(topology.devices).reshape(*axes.values())
mesh = Mesh(devices, tuple(axes), axis_types=(AxisType.Explicit,) * len(axes))
config = dense(512, 2, 4, 2, 512, vocab_size=512, head_dim=128, dtype="bfloat16")
model = jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))

def placed(a, spec):
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    weights = jax.tree.map(lambda a, s: placed(a, s.spec), model, shardings(model, mesh))
    state = jax.eval_shape(lambda: model.init_state(4, 1024, sys.argv[1]))
    cache = P(None, "data", None, "tensor", None)  # layers, rows, slots, heads, width
    state = jax.tree.map(lambda a: placed(a, P(*cache[: a.ndim])), state)
    ids = placed(jax.ShapeDtypeStruct((4,), jnp.int32), P(None))
    program = decode.trace(weights, ids, ids, state).lower().compile().as_text()
calls = [line for line in program.splitlines() if "tpu_custom_call" in line]
print(sum("%decode_attention" in line for line in calls), len(calls))
"""


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_a_decode_step_runs_the_kernel_on_a_tpu_mesh(cache: str) -> None:
    try:
        find_libtpu()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, cache],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["1", "1"]  # one in the loop over the layers
