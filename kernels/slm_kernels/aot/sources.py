"""What decides how a kernel compiles, as a hash: results are kept until it changes."""

import hashlib
from pathlib import Path

import jax

from slm_kernels.aot.targets import libtpu_version

_PACKAGE = Path(__file__).parents[1]


def fingerprint(target: str) -> str:
    """Of the kernels' sources and block sizes, jax, libtpu and the chip.

    Raises:
        FileNotFoundError: if libtpu is not installed.
    """
    digest = hashlib.sha256(f"{target} {jax.__version__} {libtpu_version()}".encode())
    for source in sorted(p for p in _PACKAGE.rglob("*") if p.suffix in (".py", ".toml")):
        digest.update(source.relative_to(_PACKAGE).as_posix().encode() + b"\0")
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]
