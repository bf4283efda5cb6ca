"""What a file of `tpu_configs/` holds: a kind of chip in all its sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from slm_jax.errors import UserError
from slm_jax.parallel import MeshConfig

Remat = Literal["none", "full", "dots"]
_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclass(frozen=True)
class Choices:
    """What a run is given on a kind of chip. It changes how fast a run is, not what it computes."""

    mesh: MeshConfig | None = None
    """Devices along each axis."""
    remat: Remat | None = None
    """What the backward pass recomputes."""
    microbatch: int | None = None
    """Most rows of a device that are worked on at a time."""
    compiled: tuple[int, ...] = ()
    """Sizes that `make compile-configs` compiles the step for."""

    def __post_init__(self) -> None:
        if self.microbatch is not None and self.microbatch < 1:
            raise UserError(f"microbatch={self.microbatch} must be at least 1")


@dataclass(frozen=True)
class Size:
    """A slice of so many chips."""

    shape: tuple[int, ...]
    """TPUs: chips along each axis of the torus. GPUs: nodes, and GPUs of a node."""
    chips_per_host: int | None = None
    """Where it is not what `Kind.chips_per_host` says."""


@dataclass(frozen=True)
class Cloud:
    """Names that Google Cloud and others have for a kind of chip."""

    gke_accelerator: str | None = None
    """Value of the node label `cloud.google.com/gke-tpu-accelerator`."""
    accelerator_type: str | None = None
    """Of the Cloud TPU API; {} is the number in a slice's name."""
    runtime: str | None = None
    """Image of a TPU VM; `None` if there are none to be had (TPU7x: only by GKE)."""
    gpu: str | None = None
    """SkyPilot's name of a GPU."""


@dataclass(frozen=True)
class Kind:
    """A kind of chip in all its sizes; `slm_kernels.aot` has its peak rates, by the file's name."""

    platform: Literal["tpu", "gpu", "cpu"]
    """As jax calls it."""
    device_kind: str
    """As jax calls one device."""
    chips_per_host: int
    """Chips that one host has."""
    sizes: Mapping[int, Size]
    """By the number of chips."""
    named_per_chip: int = 1
    """What the number in a slice's name counts: chips, or 2 TensorCores each."""
    devices_per_chip: int = 1
    """Devices that jax makes of a chip."""
    chip_config: str | None = None
    """What libtpu is to make of a chip that is not there, where that is not its default."""
    process_per: Literal["host", "chip"] = "host"
    """What has a process of its own."""
    hbm_gib: float | None = None
    """GiB of a device that a program may use: what libtpu says when it refuses one. Of GPUs it is a
    share of the memory, `XLA_PYTHON_CLIENT_MEM_FRACTION` of `environment`."""
    link_gbs: float | None = None
    """GB/s that a chip sends over one link of the interconnect, one way; a TPU has two an axis."""
    ring: int | None = None
    """An axis of so many chips, or a multiple, is closed to a ring."""
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Flags of the compiler by the environment variable it reads; {devices} is their number."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Other environment variables of a process."""
    cloud: Cloud = Cloud()
    """Names for launchers."""
    defaults: Choices = Choices()
    """Choices of a language model that has none of its own."""
    experiments: Mapping[str, Choices] = field(default_factory=dict)
    """Choices by preset."""

    def __post_init__(self) -> None:
        for chips, size in self.sizes.items():
            if math.prod(size.shape) != chips:
                raise UserError(f"sizes.{chips}: shape={size.shape} is of {math.prod(size.shape)}")
            of_host = size.chips_per_host or self.chips_per_host
            if chips > of_host and chips % of_host:
                raise UserError(f"sizes.{chips} is not a multiple of chips_per_host={of_host}")
        for name, choices in self.experiments.items():
            for chips in choices.compiled:
                if chips not in self.sizes:
                    raise UserError(f"experiments.{name}.compiled: no size has {chips} chips")
        needed = {"tpu": ("hbm_gib", "link_gbs", "ring"), "gpu": ("link_gbs",), "cpu": ()}
        for name in needed[self.platform]:
            if getattr(self, name) is None:
                raise UserError(f"{name} is missing: a {self.platform} needs it")
        if self.platform == "gpu" and _FRACTION not in self.environment:
            raise UserError(f"environment.{_FRACTION} is missing: it says what hbm is")
