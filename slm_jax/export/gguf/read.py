"""Reads the GGUF container (versions 2 and 3, little endian) through a memory map.

The format: magic, version, two counts, key-value pairs, the tensors' names, shapes, types and
places, then their data, each aligned. Every length is held against what is left of the file before
anything is made of it, so a broken or hostile file costs no memory and ends in one `UserError`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from slm_jax.errors import UserError
from slm_jax.export.gguf.blocks import ENCODINGS, Encoding, decode

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32
MAX_DIMS = 4
SCALARS: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))
} | {10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8")}
"""Numbers that metadata may hold, by the code of their type."""
BOOL, STRING, ARRAY = 7, 8, 9

# The fewest bytes that a key-value pair and a tensor's entry take.
_LEAST_PAIR, _LEAST_ENTRY = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, decoded when asked for.

    Attributes:
        shape: outermost dimension first (the file has them the other way round).
        encoding: of the data.
        raw: flat uint8, a view of the mapped file.
    """

    shape: tuple[int, ...]
    encoding: Encoding
    raw: np.ndarray

    def values(self, index: int | None = None) -> np.ndarray:
        """All numbers, or those of one entry of the first dimension, float32."""
        if index is None:
            return decode(self.encoding, self.raw).reshape(self.shape)
        step = self.encoding.size(self.shape[1:])
        return decode(self.encoding, self.raw[index * step : (index + 1) * step]).reshape(
            self.shape[1:]
        )


@dataclass(frozen=True)
class GGUF:
    """What a file holds.

    Attributes:
        path: of the file.
        metadata: by key: numpy scalars and arrays of the type in the file, `str` or `list[str]`.
        tensors: by name, in the order of the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: str | Path) -> GGUF:
    """Opens a file; tensors stay in it until their values are asked for.

    Raises:
        UserError: if it is no GGUF file, not whole, or uses a tensor type we do not read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a .gguf file")
    try:
        if path.stat().st_size < 24:
            raise UserError(f"{path} is no GGUF file (too short): give a .gguf file")
        return _Reader(path, np.memmap(path, np.uint8, "r")).file()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from error


class _Reader:
    """A position in the file; never passes its end."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self._path, self._data, self._at = path, data, 0

    def file(self) -> GGUF:
        """Reads everything but the tensors' data."""
        if self._take(4).tobytes() != MAGIC:
            raise UserError(f"{self._path} is no GGUF file (wrong magic): give a .gguf file")
        version = self._number(4)
        if version not in VERSIONS:
            swapped = version & 0xFFFF == 0
            reason = "big-endian" if swapped else f"version {version}"
            raise UserError(
                f"{self._path} is a {reason} GGUF file: take little-endian version 2 or 3"
            )
        n_tensors, n_pairs = self._number(10), self._number(10)
        self._expect(n_pairs * _LEAST_PAIR + n_tensors * _LEAST_ENTRY, "its counts")
        metadata: dict[str, Any] = {}
        for _ in range(n_pairs):
            key = self._string()
            if not key or key in metadata:
                self._broken(f"key {key[:60]!r} is empty or there twice")
            metadata[key] = self._value(self._number(4))
        entries = self._entries(n_tensors)
        return GGUF(self._path, metadata, self._place(entries, self._alignment(metadata)))

    def _entries(self, count: int) -> dict[str, tuple[tuple[int, ...], Encoding, int]]:
        """Shape, encoding and offset of every tensor."""
        entries: dict[str, tuple[tuple[int, ...], Encoding, int]] = {}
        for _ in range(count):
            name = self._string()
            if not name or name in entries:
                self._broken(f"tensor {name[:60]!r} is without a name or there twice")
            n_dims = self._number(4)
            if not 1 <= n_dims <= MAX_DIMS:
                self._broken(f"tensor {name!r} has {n_dims} dimensions")
            shape = tuple(self._number(10) for _ in range(n_dims))[::-1]
            code, offset = self._number(4), self._number(10)
            if code not in ENCODINGS:
                known = ", ".join(e.name for e in ENCODINGS.values())
                raise UserError(
                    f"{self._path}: {name} is of ggml type {code}: only {known} are read; "
                    "take a file of one of these types"
                )
            encoding = ENCODINGS[code]
            if min(shape) < 1 or shape[-1] % encoding.block:
                self._broken(f"tensor {name!r} of type {encoding.name} has the shape {shape}")
            entries[name] = (shape, encoding, offset)
        return entries

    def _place(
        self, entries: dict[str, tuple[tuple[int, ...], Encoding, int]], alignment: int
    ) -> dict[str, StoredTensor]:
        """The data of every tensor: one after the other, nothing shared, nothing beyond the end."""
        start = -(-self._at // alignment) * alignment
        tensors, end = {}, 0
        for name, (shape, encoding, offset) in entries.items():
            if offset != end:
                self._broken(f"tensor {name!r} lies at {offset} instead of {end}")
            size = encoding.size(shape)
            first = start + offset
            if first + size > len(self._data):
                self._broken(f"it ends within tensor {name!r}")
            tensors[name] = StoredTensor(shape, encoding, self._data[first : first + size])
            end = -(-(offset + size) // alignment) * alignment
        return tensors

    def _alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get(ALIGNMENT_KEY, np.uint32(ALIGNMENT))
        if not isinstance(value, np.uint32) or value == 0 or int(value) & (int(value) - 1):
            self._broken(f"{ALIGNMENT_KEY}={str(value)[:60]} is no power of two")
        return int(value)

    def _value(self, code: int) -> Any:
        if code == STRING:
            return self._string()
        if code in SCALARS:
            return self._array(code, 1)[0]
        if code != ARRAY:
            self._broken(f"metadata of type {code}")
        code, count = self._number(4), self._number(10)
        if code == STRING:
            self._expect(8 * count, "an array")
            return [self._string() for _ in range(count)]
        if code not in SCALARS:
            self._broken(f"an array of type {code}")
        return self._array(code, count)

    def _array(self, code: int, count: int) -> np.ndarray:
        raw = self._take(SCALARS[code].itemsize * count)
        if code == BOOL and raw.size and raw.max() > 1:
            self._broken("a truth value that is neither 0 nor 1")
        return np.frombuffer(raw.tobytes(), SCALARS[code])

    def _string(self) -> str:
        try:
            return self._take(self._number(10)).tobytes().decode("utf-8")
        except UnicodeDecodeError:
            self._broken("text that is not UTF-8")

    def _number(self, code: int) -> int:
        return int(self._array(code, 1)[0])

    def _take(self, n: int) -> np.ndarray:
        self._expect(n, "a length")
        self._at += n
        return self._data[self._at - n : self._at]

    def _expect(self, n: int, what: str) -> None:
        left = len(self._data) - self._at
        if n > left:
            self._broken(f"{what} in its header asks for {n} bytes where {left} are left")

    def _broken(self, what: str) -> NoReturn:
        raise UserError(f"{self._path} is not a whole GGUF file ({what}): copy it again")
