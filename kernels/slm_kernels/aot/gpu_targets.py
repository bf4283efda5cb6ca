"""The GPUs that kernels are compiled for, their ceilings, and what their machine code says.

ptxas makes machine code (SASS) of the PTX that Mosaic GPU leaves, nvdisasm prints it. Nothing is
simulated: there are counts, registers, spills and shared memory, and no cycles.
"""

import collections
import importlib.util
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

_DEVICE = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared}
  shared_memory_per_core: 233472 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory} l2_cache_size: 52428800
  clock_rate_ghz: {ghz} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{name}"
"""


@dataclass(frozen=True)
class GpuTarget:
    """A GPU and its ceilings.

    Attributes:
        name: as the driver gives it.
        architecture: of ptxas.
        cores: streaming multiprocessors.
        ghz: boost clock.
        flops: bf16 matrix flop/s, dense.
        bandwidth: HBM bytes/s.
        memory: HBM bytes.
        shared: bytes of shared memory that a block may take.
    """

    name: str
    architecture: str
    cores: int
    ghz: float
    flops: float
    bandwidth: float
    memory: int
    shared: int

    @property
    def transcendentals(self) -> float:
        """exp2, ... a second: 16 a cycle and multiprocessor (CUDA programming guide)."""
        return 16 * self.cores * self.ghz * 1e9

    def describe(self) -> str:
        """What XLA wants to know of a GPU that is not there (`GpuTargetConfigProto` as text)."""
        return _DEVICE.format(**asdict(self))


# H100 SXM5: "NVIDIA H100 Tensor Core GPU Architecture" (white paper), table 3.
GPU_TARGETS = {
    "h100": GpuTarget(
        "NVIDIA H100 80GB HBM3",
        "sm_90a",
        cores=132,
        ghz=1.98,
        flops=989e12,
        bandwidth=3352e9,
        memory=84_978_434_048,
        shared=232_448,
    ),
}

# GPUs that whole programs are compiled for. The H200 is an H100 with more and faster memory
# ("NVIDIA H200 Tensor Core GPU" data sheet; 143,771 MiB by the driver): kernels are the H100's.
GPUS = GPU_TARGETS | {
    "h200": replace(
        GPU_TARGETS["h100"], name="NVIDIA H200", bandwidth=4800e9, memory=143_771 * 2**20
    )
}


@dataclass(frozen=True)
class Kernel:
    """What is known of a compiled kernel.

    Attributes:
        name: given by its author.
        registers: of a thread at the start; a warpgroup may ask for more.
        spill_stores: bytes a thread.
        spill_loads: bytes a thread.
        shared: bytes of shared memory a block.
        operations: instructions of the program by name, however often they run.
        warnings: codes of ptxas, such as `C7510`: products of matrices wait for each other.
    """

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    operations: Mapping[str, int]
    warnings: Sequence[str]


def find_cuda() -> Path | None:
    """The folder to put on `sys.path` so that jax's CUDA plugin and ptxas are found.

    `None` if they are among the installed packages. Else the folder that the environment variable
    `SLM_CUDA` names, by default `.cuda` of the current folder.

    Raises:
        FileNotFoundError: if they are in neither.
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is not None:
        installed = importlib.util.find_spec("nvidia.cu13")
        places = (installed and installed.submodule_search_locations) or []
        if any(_has_tools(Path(p)) for p in places):
            return None
    folder = Path(os.environ.get("SLM_CUDA", ".cuda")).absolute()
    if not (folder / "jax_cuda13_plugin").is_dir() or not _has_tools(folder / "nvidia" / "cu13"):
        raise FileNotFoundError(
            f"SLM_CUDA={folder} holds no compiler of GPU programs (jax-cuda13-plugin, ptxas, "
            "nvdisasm): run `make cuda`, or point SLM_CUDA to where it is installed"
        )
    return folder


def _has_tools(folder: Path) -> bool:
    return all((folder / "bin" / tool).is_file() for tool in ("ptxas", "nvdisasm"))


def tools() -> Path:
    """The folder of ptxas and nvdisasm."""
    folder = find_cuda()
    if folder is not None:
        return folder / "nvidia" / "cu13" / "bin"
    spec = importlib.util.find_spec("nvidia.cu13")
    assert spec is not None
    return next(
        Path(p) / "bin" for p in spec.submodule_search_locations or () if _has_tools(Path(p))
    )


def read_kernel(ptx: Path, resources: Path, target: str) -> Kernel:
    """Makes machine code of a kernel's PTX and counts what it consists of.

    Args:
        ptx: file NAME_NUMBER.ptx.
        resources: what Mosaic GPU says that the kernel takes.
        target: a key of `GPU_TARGETS`.

    Raises:
        ValueError: if ptxas refuses it.
    """
    folder, cubin = tools(), ptx.with_suffix(".cubin")
    command = [folder / "ptxas", "-v", f"-arch={GPU_TARGETS[target].architecture}", ptx]
    made = subprocess.run(
        [*map(str, command), "-o", str(cubin)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise ValueError(f"kernel={ptx.stem!r}: ptxas refuses it: {made.stderr[:300]}")
    sass = subprocess.run(
        [str(folder / "nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    return summarize(ptx.stem.rpartition("_")[0], made.stderr, sass, resources.read_text())


def summarize(name: str, log: str, sass: str, resources: str) -> Kernel:
    """A kernel from what ptxas, nvdisasm and Mosaic GPU wrote about it."""

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        if found is None:
            raise ValueError(f"kernel={name!r}: no {pattern!r} in: {text[:300]}")
        return int(found[1])

    # An address in a comment, a predicate perhaps, and the instruction.
    instruction = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9]*)"
    return Kernel(
        name=name,
        registers=number(r"Used (\d+) registers", log),
        spill_stores=number(r"(\d+) bytes spill stores", log),
        spill_loads=number(r"(\d+) bytes spill loads", log),
        shared=number(r"smem_scratch_bytes=(\d+)", resources),
        operations=dict(collections.Counter(re.findall(instruction, sass, re.M))),
        warnings=sorted(set(re.findall(r"\((C\d+)\)", log))),
    )
