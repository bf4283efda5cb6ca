"""A slice of TPUs, nodes of GPUs, or a CPU that is made to look like several devices."""

import math
from dataclasses import dataclass

from slm_kernels.aot import CHIPS, Target
from slm_kernels.aot.gpu_targets import GPUS, GpuTarget

from slm_jax.errors import UserError
from slm_jax.slices.kind import Kind, Size
from slm_jax.slices.read import read_kinds


@dataclass(frozen=True)
class Slice:
    """A kind of chip in one size, or several such slices joined by the data centre's network.

    Attributes:
        name: as in `tpu-v5e-256`, `h100-8`, `cpu-8`; `tpu-v5e-256x2` is two slices.
        chip: name of its file; key of `slm_kernels.aot.CHIPS` or `GPUS`.
        kind: what its file says.
        size: of its file.
        slices: how many there are; more than one of TPUs only.
    """

    name: str
    chip: str
    kind: Kind
    size: Size
    slices: int = 1

    @property
    def platform(self) -> str:
        """`tpu`, `gpu` or `cpu`."""
        return self.kind.platform

    @property
    def number(self) -> int:
        """The number in its name, of one slice."""
        return self.chips // self.slices * self.kind.named_per_chip

    @property
    def chips(self) -> int:
        """Chips of all slices; of a CPU, the devices that it is to look like."""
        return math.prod(self.size.shape) * self.slices

    @property
    def chips_per_host(self) -> int:
        """Chips that a host has, not more than there are."""
        most = self.size.chips_per_host or self.kind.chips_per_host
        return min(most, self.chips // self.slices)

    @property
    def hosts(self) -> int:
        """Machines of all slices."""
        return self.chips // self.chips_per_host

    @property
    def processes_per_host(self) -> int:
        """Processes of a run on each host."""
        return 1 if self.kind.process_per == "host" else self.chips_per_host

    @property
    def devices(self) -> int:
        """Devices that jax sees: two of a tpu7x chip."""
        return self.chips * self.kind.devices_per_chip

    @property
    def shape(self) -> str:
        """Chips along each axis of a slice, as in `16x16`."""
        return "x".join(map(str, self.size.shape))

    @property
    def topology(self) -> str:
        """What the compiler calls it: `v5e:16x16`; of GPUs `h100:1x2x8`, two nodes of eight."""
        return f"{self.chip}:{'1x' if self.platform == 'gpu' else ''}{self.shape}"

    @property
    def device(self) -> Target | GpuTarget:
        """Peaks of one device.

        Raises:
            UserError: if it is a CPU, of which no peaks are known.
        """
        if self.platform == "cpu":
            raise UserError(
                f"on={self.name!r} is this machine's CPU, which is not planned for: choose a slice "
                "of TPUs or GPUs"
            )
        return CHIPS[self.chip] if self.platform == "tpu" else GPUS[self.chip]

    @property
    def hbm(self) -> float:
        """Bytes that a program may use on one device."""
        if self.kind.hbm_gib is not None:
            return self.kind.hbm_gib * 2**30
        device = self.device
        assert isinstance(device, GpuTarget)
        return float(self.kind.environment["XLA_PYTHON_CLIENT_MEM_FRACTION"]) * device.memory

    @property
    def interconnect(self) -> float:
        """Bytes/s that one device can send to others, at most.

        In a slice of TPUs with a corner that is a corner's: what everyone has to send, it has to
        send too. Of GPUs it is NVLink's; between nodes less gets through.
        """
        link = (self.kind.link_gbs or 0) * 1e9
        if self.kind.ring is None:
            return link
        shape, ring = self.size.shape, self.kind.ring
        links = sum(0 if n == 1 else (2 if n % ring == 0 else 1) for n in shape)
        return max(links, 1) * link / self.kind.devices_per_chip


def slice_names(*platforms: str) -> list[str]:
    """Every name of a slice, the smallest of a kind first.

    Args:
        *platforms: `tpu`, `gpu`, `cpu`; none is all.
    """
    return [
        _name(stem, kind, chips)
        for stem, kind in read_kinds().items()
        for chips in kind.sizes
        if not platforms or kind.platform in platforms
    ]


def _name(stem: str, kind: Kind, chips: int) -> str:
    return f"{'tpu-' if kind.platform == 'tpu' else ''}{stem}-{chips * kind.named_per_chip}"


def find_slice(name: str) -> Slice:
    """What is called `name`: `tpu-v5e-256`, `h100-8`, `cpu-8`.

    Of v4, v5p and tpu7x the number counts TensorCores, two a chip, as Google's names do. Several
    slices of TPUs are `tpu-v5e-256x2`.

    Raises:
        UserError: if there is none.
    """
    prefix, _, number = name.lower().removeprefix("tpu-").rpartition("-")
    number, _, count = number.partition("x")
    kind = read_kinds().get(prefix)
    if kind is None or name.lower().startswith("tpu-") != (kind.platform == "tpu"):
        known = [_name(stem, k, 0)[:-1] + "N" for stem, k in read_kinds().items()]
        raise UserError(f"on={name!r} does not exist: choose from {', '.join(known)}")
    for chips, size in kind.sizes.items():
        if number == str(chips * kind.named_per_chip):
            return Slice(name.lower(), prefix, kind, size, _slices(name, kind, count))
    sizes = ", ".join(str(n * kind.named_per_chip) for n in kind.sizes)
    counts = {"tpu": "chips", "gpu": "GPUs", "cpu": "devices"}[kind.platform]
    if kind.named_per_chip == 2:
        counts = "TensorCores, two a chip"
    raise UserError(f"on={name!r}: {prefix} comes with {sizes} {counts}")


def _slices(name: str, kind: Kind, count: str) -> int:
    if not count and not name.endswith("x"):
        return 1
    if kind.platform != "tpu" or not count.isdecimal() or int(count) < 2:
        raise UserError(f"on={name!r}: two or more slices of TPUs are written tpu-v5e-256x2")
    return int(count)
