"""The TPUs that kernels are compiled for, their ceilings, and where the compiler is found."""

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """One jax device of a TPU generation.

    Attributes:
        topology: smallest slice that libtpu describes; kernels are compiled for one device of it.
        kind: what jax calls the device.
        clock: cycles a second. Google publishes none: the peak divided by what the matrix units
            do in a cycle (4 units of 128 x 128 on v5e and each v5p core, 2 of 256 x 256 on v6e
            and tpu7x).
        flops: bf16 matrix flop/s.
        bandwidth: HBM bytes/s.
        cores: tensor cores that share the work of one device.
    """

    topology: str
    kind: str
    clock: float
    flops: float
    bandwidth: float
    cores: int = 1

    @property
    def vector_ops(self) -> float:
        """Float32 elementwise operations/s: 4 VALU slots a bundle, registers of 8 x 128."""
        return self.cores * 4 * 1024 * self.clock

    @property
    def transcendentals(self) -> float:
        """exp, tanh, ... a second: 1 EUP slot a bundle."""
        return self.cores * 1024 * self.clock


# Peaks and bandwidths: `jax.experimental.pallas.tpu.get_tpu_info()`, which follows the "System
# architecture" pages of the Cloud TPU documentation. Slots: the header of libtpu's table of slot
# use, the same on all four.
TARGETS = {
    "v5e": Target("v5e:2x2", "TPU v5 lite", clock=1.50e9, flops=197e12, bandwidth=819e9),
    "v5p": Target("v5p:2x2x1", "TPU v5", clock=1.75e9, flops=459e12, bandwidth=2460e9, cores=2),
    "v6e": Target("v6e:2x2", "TPU v6 lite", clock=1.75e9, flops=918e12, bandwidth=1640e9),
    "tpu7x": Target("tpu7x:2x2x1", "TPU7x", clock=2.20e9, flops=1155e12, bandwidth=3700e9),
}

# Chips that whole programs are compiled for; kernels are tuned for and tested on `TARGETS` only.
# v4: arXiv 2304.01433, table 4; 8 matrix units of 128 x 128 at its clock make the peak.
CHIPS = {
    "v4": Target("v4:2x2x1", "TPU v4", clock=1.05e9, flops=275e12, bandwidth=1228e9, cores=2)
} | TARGETS


def libtpu_version() -> str:
    """Version of the compiler that `find_libtpu` finds.

    Raises:
        FileNotFoundError: if there is none.
    """
    found = importlib.metadata.distributions(path=[str(find_libtpu())])
    return next(d.version for d in found if d.name == "libtpu")


def find_libtpu() -> Path:
    """The folder to put on `sys.path` so that `import libtpu` works.

    Looked for among the installed packages, then in the folder that the environment variable
    `SLM_LIBTPU` names, by default `.libtpu` of the current folder.

    Raises:
        FileNotFoundError: if it is in neither.
    """
    spec = importlib.util.find_spec("libtpu")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent.parent
    folder = Path(os.environ.get("SLM_LIBTPU", ".libtpu")).absolute()
    if not (folder / "libtpu" / "libtpu.so").is_file():
        raise FileNotFoundError(
            f"SLM_LIBTPU={folder} holds no libtpu, the compiler of TPU programs: "
            "run `make libtpu`, or point SLM_LIBTPU to where it is installed"
        )
    return folder
