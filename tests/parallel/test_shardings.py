"""How every parameter of every preset is split, as text.

`WRITE_GOLDEN=1 pytest tests/parallel/test_shardings.py` writes the text anew: read what changed.
"""

import functools
import os
from pathlib import Path

import jax

from slm_jax.errors import UserError
from slm_jax.models.lm import LM
from slm_jax.models.presets import PRESETS
from slm_jax.nn.module import named_leaves
from slm_jax.parallel import make_mesh, shardings
from tests.parallel.compare import parse_mesh

GOLDEN = Path(__file__).parent / "golden" / "shardings.txt"
MESHES = ("data8", "fsdp8", "data2-tensor4", "expert4-fsdp2", "sequence4-tensor2")


def describe(name: str) -> str:
    """A line a parameter: its size, and what of it a device holds on each mesh."""
    model = jax.eval_shape(functools.partial(LM, PRESETS[name]), jax.random.key(0))
    leaves = named_leaves(model)
    lines = [name, *(f"  {k}  {size(v.get_value().shape)}" for k, v in leaves.items())]
    for mesh_name in MESHES:
        try:
            places = named_leaves(shardings(model, make_mesh(parse_mesh(mesh_name))))
        except UserError as e:
            lines.append(f"  {mesh_name} refused: {e}")
            continue
        for i, (k, v) in enumerate(leaves.items(), 1):
            whole = v.get_value().shape
            part = places[k].get_value().shard_shape(whole)
            if part != whole:
                lines[i] += f"  {mesh_name} {size(part)}"
    return "\n".join(lines) + "\n"


def size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def test_every_parameter_of_every_preset_is_split_as_before() -> None:
    found = "\n".join(map(describe, PRESETS))
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(found)
    assert found == GOLDEN.read_text()
