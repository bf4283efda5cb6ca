"""Where text comes from: files to documents, and which documents are held out."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, Protocol, cast

import numpy as np

from slm_jax.errors import UserError

Split = Literal["train", "valid"]
BUNDLED = {"tinyshakespeare": Path(__file__).parent / "corpora" / "tinyshakespeare.txt.gz"}
_KINDS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. `split` is set where the source itself says what is held out."""

    text: str
    split: Split | None = None


class Source(Protocol):
    """Documents in a fixed order, readable more than once."""

    @property
    def name(self) -> str:
        """What the user called it."""

    def sha256(self) -> str:
        """sha256 (hex) over the content: equal values give equal documents."""

    def documents(self) -> Iterator[Document]:
        """The documents in order; UserError names the file and line of what is broken."""


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Text files (one document a file) and JSON-lines files (one document a line).

    Attributes:
      name: what the user called it.
      paths: the files, in order.
      text_field: the field of a JSON line that holds its text.
    """

    name: str
    paths: tuple[Path, ...]
    text_field: str

    def sha256(self) -> str:
        """Hash of how each file is read and of its bytes, in order."""
        total = hashlib.sha256(self.text_field.encode())
        for path in self.paths:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"\n{_kind(path)} {digest}".encode())
        return total.hexdigest()

    def documents(self) -> Iterator[Document]:
        """One document a text file, one a JSON line."""
        for path in self.paths:
            if _kind(path).startswith(".jsonl"):
                yield from self._json_lines(path)
            else:
                data = b"".join(_chunks(path))
                yield Document(_decoded(data, str(path)))

    def _json_lines(self, path: Path) -> Iterator[Document]:
        for number, line in enumerate(_chunks(path), 1):
            if line.strip():
                yield Document(self._text(line, f"{path}:{number}"))

    def _text(self, line: bytes, where: str) -> str:
        text = _decoded(line, where)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: invalid JSON ({error}): mend or remove the line") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON {type(record).__name__}, not an object with fields")
        return checked_text(record, self.text_field, where)


def open_source(source: str, text_field: str) -> Source:
    """The source that `source` names.

    Args:
      source: a bundled corpus ("tinyshakespeare"), "python-stdlib" (stdlib.py), the path of a
        .txt, .txt.gz, .jsonl or .jsonl.gz file, a folder of them (all below it, sorted by path), or
        "tfds:NAME" (tfds.py).
      text_field: the field that holds the text of JSON lines and of TFDS examples.

    Raises:
      UserError: there is no such thing.
    """
    if source.startswith("tfds:"):
        from slm_jax.data.tfds import TfdsSource  # seconds to import: only for who uses it

        return TfdsSource(source.removeprefix("tfds:"), text_field)
    if source == "python-stdlib":
        from slm_jax.data.stdlib import stdlib_source  # it needs `Document` of this file

        return stdlib_source()
    if source in BUNDLED:
        return FileSource(source, (BUNDLED[source],), text_field)
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in _KINDS)
        if not found:
            raise UserError(f"source={source!r}: no {', '.join(_KINDS)} file in that folder")
        return FileSource(source, tuple(found), text_field)
    if not path.exists():
        raise UserError(
            f"source={source!r}: no such file or folder (looked at {path.absolute()}) and not a "
            f'bundled corpus: check the path, or use "tfds:NAME", "python-stdlib" or '
            f"{', '.join(BUNDLED)}"
        )
    if _kind(path) not in _KINDS:
        raise UserError(f"source={source!r}: unknown kind of file: use {', '.join(_KINDS)}")
    return FileSource(source, (path,), text_field)


def split_documents(source: Source, valid_fraction: float) -> Iterator[tuple[Split, str]]:
    """Yields (split, text) of every document that is not empty.

    A split of the source's own is kept. Else documents are ranked by a hash of their text and the
    lowest `valid_fraction` of them is held out, at least one and never all: the choice depends on
    neither the order nor the names of the files, and a text that occurs twice is on one side only.
    A single document is cut at byte `int(n_bytes * (1 - valid_fraction))`, moved back to the
    start of a character.

    Raises:
      UserError: no text, nothing left on one side, or whatever the source raises.
    """
    # An 8-byte hash a document; reading twice is far cheaper than tokenising.
    hashes = np.fromiter((_hash64(d.text) for d in source.documents() if d.text), np.uint64)
    first = next((d for d in source.documents() if d.text), None)
    if first is None:
        raise UserError(f"source={source.name!r}: the corpus is empty: it has no text")
    if first.split is not None:
        for document in source.documents():
            if document.text:
                yield cast(Split, document.split), document.text
        return
    if len(hashes) == 1:
        yield from _cut(first.text, valid_fraction, source.name)
        return
    n_valid = min(max(1, round(valid_fraction * len(hashes))), len(hashes) - 1)
    last_valid = np.sort(hashes)[n_valid - 1]
    if (hashes <= last_valid).all():
        raise UserError(
            f"source={source.name!r}: too few different texts among its {len(hashes)} documents to "
            f"hold out valid_fraction={valid_fraction}: remove the copies or give more documents"
        )
    for document in source.documents():
        if document.text:
            yield ("valid" if _hash64(document.text) <= last_valid else "train"), document.text


def checked_text(record: dict[str, Any], field: str, where: str) -> str:
    """`record[field]` as text; UserError if it is not there, not text or has no UTF-8 form."""
    if field not in record:
        fields = ", ".join(sorted(record)) or "none"
        raise UserError(f"{where}: no field text_field={field!r}: its fields are {fields}")
    text = record[field]
    if isinstance(text, bytes):
        return _decoded(text, where)
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is a {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {field!r} has a lone surrogate at character {error.start}: remove it"
        ) from error
    return text


def _kind(path: Path) -> str:
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def _chunks(path: Path) -> Iterator[bytes]:
    """Lines of a plain or gzip file, with their line ends."""
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: corrupt gzip ({error}): copy it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the file") from error


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}: convert it to UTF-8") from error


def _hash64(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _cut(text: str, valid_fraction: float, name: str) -> Iterator[tuple[Split, str]]:
    data = text.encode("utf-8")
    cut = int(len(data) * (1 - valid_fraction))
    while cut > 0 and cut < len(data) and data[cut] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    if cut in (0, len(data)):
        raise UserError(
            f"source={name!r}: its one document of {len(data)} bytes leaves nothing on one side "
            f"of valid_fraction={valid_fraction}: give more text"
        )
    yield "train", data[:cut].decode("utf-8")
    yield "valid", data[cut:].decode("utf-8")
