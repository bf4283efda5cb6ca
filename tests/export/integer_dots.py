"""The matrix products of an exported program, as they are left after XLA's optimisation.

As a script: prints the text of a program compiled for a v5e that is not there. It is a process of
its own because libtpu wants settings before jax starts.
"""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Dot(NamedTuple):
    """One product: types of result and operands, and entries of its result."""

    result: str
    left: str
    right: str
    size: int


def compiled(program: Any, *, rows: int, length: int, room: int, sharding: Any = None) -> str:
    """The optimised text of a program, its symbols replaced by numbers."""
    values = {"b": rows, "c": room, "n": length // 16}

    def fixed(a: Any) -> jax.ShapeDtypeStruct:
        shape = [d if isinstance(d, int) else int(eval(str(d), {}, values)) for d in a.shape]
        return jax.ShapeDtypeStruct(shape, a.dtype, sharding=sharding)

    args, _ = jax.tree.unflatten(program.in_tree, [fixed(a) for a in program.in_avals])
    return jax.jit(program.call).lower(*args).compile().as_text()


def dots_in(hlo: str) -> list[Dot]:
    """Every `dot` and `convolution` in a module's text."""
    found = []
    for computation in hlo.split("\n}\n"):
        types = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", computation))
        for kind, shape, left, right in re.findall(
            r"= (\w+)\[([\d,]*)\]\S* (?:dot|convolution)\((%[\w.\-]+), (%[\w.\-]+)\)", computation
        ):
            size = int(np.prod([int(n) for n in shape.split(",") if n]))
            found.append(Dot(kind, types[left], types[right], size))
    return found


def main(file: str, *sizes: str) -> None:
    """Compiles a serialised program for one TPU and prints it."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    chip = NamedSharding(Mesh(np.array(topology.devices[:1]), ("chip",)), PartitionSpec())
    program = export.deserialize(bytearray(Path(file).read_bytes()))
    rows, length, room = map(int, sizes)
    print(compiled(program, rows=rows, length=length, room=room, sharding=chip))


if __name__ == "__main__":
    main(*sys.argv[1:])
