"""Meshes and the logical-axis rules; the lowest layer of the package."""

from slm_jax.parallel.batch import local_rows, shard_batch
from slm_jax.parallel.mesh import MESH_AXES, MeshConfig, make_mesh
from slm_jax.parallel.rules import RULES, gather, shardings, spec, use_rules

__all__ = [
    "MESH_AXES",
    "RULES",
    "MeshConfig",
    "gather",
    "local_rows",
    "make_mesh",
    "shard_batch",
    "shardings",
    "spec",
    "use_rules",
]
