"""Block sizes of the TPU kernels: what a search found best, in `block_sizes.toml`.

    python -m slm_kernels.profile attention --target v5e --shape S=2048,D=64 --block-sizes search

compiles every candidate that the case declares for a TPU that is not there, has libtpu simulate
it and writes the fastest here. A kernel asks `lookup` for its sizes; where the table has none for
its TPU, dtype and shape, the rule in the kernel's code holds.

A shape is known by its class: each of the sizes that a kernel asks with, rounded up to a power of
two. An entry says besides which use of the kernel was simulated, its cycles, and with what libtpu.
"""

import contextlib
import functools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slm_kernels.aot.targets import TARGETS
from slm_kernels.dispatch import device_kind

TABLE = Path(__file__).with_suffix(".toml")
_HEAD = "# Written by `python -m slm_kernels.profile KERNEL --block-sizes search`.\n"

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Key:
    """What a kernel is asked to do, as far as its block sizes depend on it.

    Attributes:
        kernel: name of the Pallas kernel, which says its direction too.
        dtype: of its main input.
        shape: class of each size.
    """

    kernel: str
    dtype: str
    shape: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes:
        key: what it is for.
        target: a key of `TARGETS`.
        blocks: the sizes.
        of: the case and shape that were simulated, `"attention B=1,S=2048"`.
        cycles: of the kernel there.
        libtpu: version of the compiler and its simulator.
    """

    key: Key
    target: str
    blocks: Sizes
    of: str
    cycles: int
    libtpu: str


_tried: ContextVar[Mapping[str, Sizes] | None] = ContextVar("slm_kernels_tried", default=None)
_asked: ContextVar[list[Key] | None] = ContextVar("slm_kernels_asked", default=None)


def lookup(kernel: str, dtype: Any, **shape: int) -> dict[str, int]:
    """The sizes to take instead of a kernel's own rule, by name; none where nothing is known.

    Args:
        kernel: name of the Pallas kernel.
        dtype: of its main input.
        **shape: what the best sizes depend on.
    """
    key = Key(
        kernel,
        np.dtype(dtype).name,
        tuple((name, 1 << (size - 1).bit_length()) for name, size in shape.items()),
    )
    keys, tried = _asked.get(), _tried.get() or {}
    if keys is not None:
        keys.append(key)
    if kernel in tried:
        return dict(tried[kernel])
    return dict(_by_key().get((device_kind(), key), {}))


@contextlib.contextmanager
def trying(sizes: Mapping[str, Sizes]) -> Iterator[None]:
    """Kernels traced inside take these sizes, by kernel, whatever the table says."""
    token = _tried.set(sizes)
    try:
        yield
    finally:
        _tried.reset(token)


@contextlib.contextmanager
def asked() -> Iterator[list[Key]]:
    """Collects what the kernels that are traced inside ask for."""
    keys: list[Key] = []
    token = _asked.set(keys)
    try:
        yield keys
    finally:
        _asked.reset(token)


def read(path: Path = TABLE) -> list[Entry]:
    """The entries of a table."""
    entries = []
    for kernel, lines in tomllib.loads(path.read_text()).items():
        for line in lines:
            key = Key(kernel, line.pop("dtype"), tuple(line.pop("shape").items()))
            entries.append(Entry(key, **line))
    return entries


def write(entries: Sequence[Entry], path: Path = TABLE) -> None:
    """Writes a table: a line an entry, sorted; of entries for the same, the last."""
    latest = {(e.key.kernel, e.target, e.key.dtype, e.key.shape): e for e in entries}
    text = _HEAD
    for kernel in sorted({e.key.kernel for e in entries}):
        lines = [_line(latest[at]) for at in sorted(latest) if at[0] == kernel]
        text += "\n".join([f"\n{kernel} = [", *(f"  {line}," for line in lines), "]\n"])
    path.write_text(text)
    _by_key.cache_clear()


def _line(e: Entry) -> str:
    def table(sizes: Mapping[str, int]) -> str:
        return "{ " + ", ".join(f"{name} = {size}" for name, size in sizes.items()) + " }"

    return (
        f'{{ target = "{e.target}", dtype = "{e.key.dtype}", shape = {table(dict(e.key.shape))}, '
        f'blocks = {table(e.blocks)}, of = "{e.of}", cycles = {e.cycles}, libtpu = "{e.libtpu}" }}'
    )


@functools.cache
def _by_key() -> Mapping[tuple[str, Key], Sizes]:
    return {(TARGETS[e.target].kind, e.key): e.blocks for e in read()}
