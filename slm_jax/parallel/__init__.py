"""Meshes and the logical-axis rules; the lowest layer of the package."""

from slm_jax.parallel.mesh import MESH_AXES, MeshConfig, make_mesh
from slm_jax.parallel.rules import RULES, gather, shard_batch, shardings, spec, use_rules

__all__ = [
    "MESH_AXES",
    "RULES",
    "MeshConfig",
    "gather",
    "make_mesh",
    "shard_batch",
    "shardings",
    "spec",
    "use_rules",
]
