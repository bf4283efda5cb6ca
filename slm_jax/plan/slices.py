"""TPU slices by the names that Google Cloud gives them, and nodes of GPUs."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from slm_kernels.aot import TARGETS, Target
from slm_kernels.aot.gpu_targets import GPU_TARGETS, GpuTarget

from slm_jax.errors import UserError

_FLAT = {
    1: (1, 1),
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
}
_CUBES = {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
    512: (8, 8, 8),
    1024: (8, 8, 16),
    2048: (8, 16, 16),
}


@dataclass(frozen=True)
class Generation:
    """What a slice needs to know of its chips beside `slm_kernels.aot.TARGETS`.

    Attributes:
        shapes: chips along each axis of the torus, by the number of chips.
        named_per_chip: what the number in a slice's name counts: chips, or 2 TensorCores each.
        devices_per_chip: jax devices.
        hbm: bytes of a device that a program may use: what libtpu says when it refuses one.
        link: bytes/s that a chip sends over one link of the interconnect. A chip has two links an
            axis; Google publishes their sum, both ways.
        wraps: whether an axis of this many chips is closed to a ring.
    """

    shapes: Mapping[int, tuple[int, ...]]
    named_per_chip: int
    devices_per_chip: int
    hbm: float
    link: float
    wraps: int


# Interconnect and names: the pages of each generation in the Cloud TPU documentation.
_GENERATIONS = {
    "v5e": Generation(_FLAT, 1, 1, hbm=15.75 * 2**30, link=400e9 / 2 / 4, wraps=16),
    "v5p": Generation(_CUBES, 2, 1, hbm=95.73 * 2**30, link=1200e9 / 2 / 6, wraps=4),
    "v6e": Generation(_FLAT, 1, 1, hbm=31.24 * 2**30, link=800e9 / 2 / 4, wraps=16),
    "tpu7x": Generation(_CUBES, 2, 2, hbm=94.74 * 2**30, link=1200e9 / 2 / 6, wraps=4),
}


@dataclass(frozen=True)
class Slice:
    """A slice.

    Attributes:
        name: as in `tpu-v5e-256`.
        kind: key of `TARGETS`.
        shape: chips along each axis.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Devices that jax sees: two of a tpu7x chip."""
        return self.chips * _GENERATIONS[self.kind].devices_per_chip

    @property
    def topology(self) -> str:
        """The name that libtpu knows the slice by."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def device(self) -> Target:
        """Peaks of one device."""
        return TARGETS[self.kind]

    @property
    def hbm(self) -> float:
        """Bytes that a program may use on one device."""
        return _GENERATIONS[self.kind].hbm

    @property
    def interconnect(self) -> float:
        """Bytes/s that one device can send to others, at most.

        In a slice with a corner that is a corner's: what everyone has to send, it has to send too.
        """
        generation = _GENERATIONS[self.kind]
        links = sum(0 if n == 1 else (2 if n % generation.wraps == 0 else 1) for n in self.shape)
        return max(links, 1) * generation.link / generation.devices_per_chip


@dataclass(frozen=True)
class Node:
    """GPUs that NVLink joins.

    Attributes:
        name: as in `h100-8`.
        kind: key of `GPU_TARGETS`.
        devices: how many.
    """

    name: str
    kind: str
    devices: int

    @property
    def chips(self) -> int:
        """GPUs."""
        return self.devices

    @property
    def topology(self) -> str:
        """The name that jax's plugin knows the node by."""
        return f"{self.kind}:1x1x{self.devices}"

    @property
    def device(self) -> GpuTarget:
        """Peaks of one GPU."""
        return GPU_TARGETS[self.kind]

    @property
    def hbm(self) -> float:
        """Bytes that a program may use: the compiler refuses nothing, and the driver needs some."""
        return 0.95 * self.device.memory

    @property
    def interconnect(self) -> float:
        """Bytes/s that one GPU can send: fourth-generation NVLink, 900 GB/s both ways."""
        return 450e9


_NODES = (1, 2, 4, 8)


def slice_names() -> list[str]:
    """Every name of a slice or node, the smallest of a kind first."""
    return [
        f"tpu-{kind}-{chips * generation.named_per_chip}"
        for kind, generation in _GENERATIONS.items()
        for chips in generation.shapes
    ] + [f"{kind}-{number}" for kind in GPU_TARGETS for number in _NODES]


def find_slice(name: str) -> Slice | Node:
    """What is called `name`: `tpu-v5e-256`, `h100-8`. Of v5p and tpu7x it counts TensorCores.

    Raises:
        UserError: if there is none.
    """
    gpu = re.fullmatch(rf"({'|'.join(GPU_TARGETS)})-(\d+)", name.lower())
    if gpu is not None and int(gpu[2]) in _NODES:
        return Node(name.lower(), gpu[1], int(gpu[2]))
    kinds = "|".join(_GENERATIONS)
    found = re.fullmatch(rf"tpu-({kinds})-(\d+)", name.lower())
    if found is None:
        raise UserError(
            f"on={name!r} cannot be compiled for: choose tpu-KIND-N with a KIND of "
            f"{', '.join(_GENERATIONS)}, or {', '.join(GPU_TARGETS)}-N with N of "
            f"{', '.join(map(str, _NODES))}"
        )
    kind, number = found[1], int(found[2])
    generation = _GENERATIONS[kind]
    chips, rest = divmod(number, generation.named_per_chip)
    if rest or chips not in generation.shapes:
        sizes = ", ".join(str(n * generation.named_per_chip) for n in generation.shapes)
        counts = "TensorCores, two a chip" if generation.named_per_chip == 2 else "chips"
        raise UserError(f"on={name!r}: {kind} slices have {sizes} {counts}")
    return Slice(f"tpu-{kind}-{number}", kind, generation.shapes[chips])
