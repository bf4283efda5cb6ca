"""Which rows of a global batch a process reads, and the global arrays that are made of them.

Row r of a batch is the same on any mesh and any number of processes. The mesh decides who holds it:
processes along the tensor axis hold the same rows, so rows are never counted by process number.
"""

import functools
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from slm_jax.errors import UserError
from slm_jax.parallel.rules import spec


def local_rows(mesh: Mesh, n_rows: int) -> np.ndarray:
    """The rows of a global batch that the devices of this process hold: int64, ascending.

    Args:
        mesh: where the batch goes.
        n_rows: rows of the global batch.

    Raises:
        UserError: if the mesh cannot split the rows evenly.
    """
    n_parts, mine = _parts(NamedSharding(mesh, spec(("batch",))))
    if n_rows % n_parts:
        raise UserError(
            f"batch_size={n_rows} is not a multiple of the {n_parts} parts that the mesh splits it "
            f"into: choose {n_parts * max(1, round(n_rows / n_parts))}"
        )
    size = n_rows // n_parts
    return (np.array(mine)[:, None] * size + np.arange(size)).ravel()


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays, split over the batch axes, from the rows that every process has read.

    Args:
        batch: host arrays `[len(local_rows), ...]`; arrays with a leading accumulation dimension
            are not expected here.
        mesh: the mesh the arrays live on.
    """
    sharding = NamedSharding(mesh, spec(("batch",)))
    n_parts, mine = _parts(sharding)
    place = {part: i for i, part in enumerate(mine)}

    def whole(rows: np.ndarray) -> jax.Array:
        size = len(rows) // len(mine)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first = place[(index[0].start or 0) // size] * size
            return rows[first : first + size]

        return jax.make_array_from_callback((n_parts * size, *rows.shape[1:]), sharding, part)

    return {name: whole(rows) for name, rows in batch.items()}


@functools.lru_cache(maxsize=16)
def _parts(sharding: NamedSharding) -> tuple[int, tuple[int, ...]]:
    """Into how many parts rows are split, and which of them this process holds, ascending."""
    axes = sharding.spec[0]
    names = (axes,) if isinstance(axes, str) else (axes or ())
    n_parts = int(np.prod([sharding.mesh.shape[name] for name in names]))
    places = sharding.addressable_devices_indices_map((n_parts,)).values()
    return n_parts, tuple(sorted({index[0].start or 0 for index in places if index is not None}))
