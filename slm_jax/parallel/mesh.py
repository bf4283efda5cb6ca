"""The device mesh: five named axes, all Explicit, size one where unused."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from slm_jax.errors import UserError
from slm_jax.parallel.rules import use_rules

MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on at most one axis takes all that remain."""

    data: int = 1
    """Replicas: batch is split, weights are copied."""
    fsdp: int = -1
    """Batch and weights are both split; weights are gathered where they are used."""
    expert: int = 1
    """Batch is split, and inside a mixture-of-experts layer the experts are."""
    sequence: int = 1
    """Tokens of one row are split."""
    tensor: int = 1
    """Heads, MLP width and vocabulary are split."""
    ring: bool = False
    """Attention over tokens of split rows passes keys round the devices in place of gathering them:
    the same result in less memory."""

    def resolve(self, n_devices: int) -> tuple[int, ...]:
        """Axis sizes in the order of `MESH_AXES`, with -1 filled in.

        Raises:
            UserError: if the sizes cannot multiply to `n_devices`.
        """
        sizes = [getattr(self, name) for name in MESH_AXES]
        open_axes = [i for i, n in enumerate(sizes) if n == -1]
        if len(open_axes) > 1 or any(n < 1 and n != -1 for n in sizes):
            raise UserError(f"mesh={sizes}: sizes are positive and at most one of them is -1")
        known = math.prod(n for n in sizes if n != -1)
        if open_axes and n_devices % known == 0:
            sizes[open_axes[0]] = n_devices // known
        if math.prod(sizes) != n_devices:
            raise UserError(
                f"mesh={dict(zip(MESH_AXES, sizes, strict=True))} does not fill {n_devices} "
                f"device(s): the product of the axes must be {n_devices}"
            )
        return tuple(sizes)

    def rules(self) -> contextlib.AbstractContextManager[None]:
        """The table of logical axes as this mesh wants it, for `with` around the tracing."""
        return use_rules(kv_seq="sequence" if self.ring else None)


def make_mesh(
    config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Builds the mesh over `devices` (default: all); enter it with `jax.set_mesh`.

    Every axis is Explicit, so array types carry their sharding and an ambiguous operation is an
    error instead of a guess. A single device is the mesh of size one: there is one code path.
    Several slices of TPUs are joined by the data centre's network, far slower than their own links:
    only `data` goes over it, one reduction of the gradients a step.

    Raises:
        UserError: if the sizes in `config` do not multiply to the number of devices, or `data` does
            not divide among the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = (config or MeshConfig()).resolve(len(devices))
    # Nodes of GPUs have numbers too, but a network that every axis can use.
    numbers = (getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu")
    slices = set(numbers) or {0}
    if sizes[0] % len(slices):
        raise UserError(
            f"mesh.data={sizes[0]}: {len(slices)} slices of TPUs are joined by a slow network, "
            f"which only replicas can stand: choose a multiple of {len(slices)}"
        )
    if len(devices) == 1:
        grid = np.array(devices).reshape(sizes)
    elif len(slices) == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        inside = (sizes[0] // len(slices), *sizes[1:])
        across = (len(slices), 1, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, across, devices, allow_split_physical_axes=True
        )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))
