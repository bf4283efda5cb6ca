"""Writes the GGUF container (version 3), tensor by tensor, and never a half file."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from slm_jax.errors import UserError
from slm_jax.export.gguf.blocks import Encoding, encode
from slm_jax.export.gguf.read import ALIGNMENT, ARRAY, MAGIC, SCALARS, STRING
from slm_jax.models.files import whole_file

_CODES = {dtype: code for code, dtype in SCALARS.items()}
# Values encoded at a time: the copies that quantisation makes stay small beside the model.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written.

    Attributes:
        shape: outermost dimension first; the last one is a multiple of the encoding's block.
        encoding: of the data.
        parts: float32 arrays that make up the tensor one after the other, made when they are
            written.
    """

    shape: tuple[int, ...]
    encoding: Encoding
    parts: Callable[[], Iterable[np.ndarray]]


def write_gguf(
    path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, PlannedTensor]
) -> None:
    """Writes a file, which appears whole or not at all and replaces what was there.

    Args:
        path: of the file; its folder is made.
        metadata: `str`, `list[str]`, numpy scalars and 1-D arrays; their dtype is the file's type.
        tensors: by name, in the order they are to be written.

    Raises:
        UserError: if the file cannot be written, or numbers do not fit their encoding.
    """
    path = Path(path)
    try:
        with whole_file(path) as file:
            file.write(_header(metadata, tensors))
            _pad(file)
            for name, tensor in tensors.items():
                _write_tensor(file, name, tensor)
                _pad(file)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another") from error


def _header(metadata: Mapping[str, Any], tensors: Mapping[str, PlannedTensor]) -> bytes:
    out = bytearray(MAGIC)
    out += np.uint32(3).tobytes()
    out += np.array([len(tensors), len(metadata)], "<u8").tobytes()
    for key, value in metadata.items():
        out += _string(key) + _value(value)
    offset = 0
    for name, tensor in tensors.items():
        out += _string(name)
        out += np.uint32(len(tensor.shape)).tobytes()
        out += np.array(tensor.shape[::-1], "<u8").tobytes()
        out += np.uint32(tensor.encoding.code).tobytes()
        out += np.uint64(offset).tobytes()
        offset += -(-tensor.encoding.size(tensor.shape) // ALIGNMENT) * ALIGNMENT
    return bytes(out)


def _value(value: Any) -> bytes:
    """Type and content of a metadata value."""
    if isinstance(value, str):
        return _code(STRING) + _string(value)
    if isinstance(value, list):
        count = np.uint64(len(value)).tobytes()
        return _code(ARRAY) + _code(STRING) + count + b"".join(_string(text) for text in value)
    assert isinstance(value, np.generic | np.ndarray), f"metadata has no type: {value!r}"
    data = value.astype(value.dtype.newbyteorder("<"))
    code = _code(_CODES[data.dtype])
    if isinstance(value, np.generic):
        return code + data.tobytes()
    return _code(ARRAY) + code + np.uint64(value.size).tobytes() + data.tobytes()


def _code(code: int) -> bytes:
    return code.to_bytes(4, "little")


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return len(data).to_bytes(8, "little") + data


def _write_tensor(file: BinaryIO, name: str, tensor: PlannedTensor) -> None:
    step = max(1, _CHUNK // tensor.shape[-1])
    written = 0
    for part in tensor.parts():
        rows = np.asarray(part, np.float32).reshape(-1, tensor.shape[-1])
        for at in range(0, len(rows), step):
            written += file.write(encode(tensor.encoding, rows[at : at + step], name).data)
    assert written == tensor.encoding.size(tensor.shape), name


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
