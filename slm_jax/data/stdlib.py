"""Python's standard library as a corpus: real text on every machine, with no download.

About 1,700 files and 30 MB for CPython 3.12 with its tests, which some distributions leave out. Its
content is that of one Python version: runs record a fingerprint of the tokens, and one resumed
with another Python is refused. Licence: the Python Software Foundation's (`license()`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from slm_jax.data.sources import Document
from slm_jax.errors import UserError

NAME = "python-stdlib"
"""What `DataConfig.source` calls it."""

_LONGEST = 300_000  # bytes of a file; a few tables are longer
_FOREIGN = {"site-packages", "dist-packages", "__pycache__"}  # not of the standard library
_GENERATED = "_sysconfigdata"  # written when Python was built: differs by machine


@dataclasses.dataclass(frozen=True)
class StdlibSource:
    """The .py files below a folder, one document each, in a fixed random order.

    The order is that of a hash of the relative paths, so that a part of the text from its start is
    a fair sample of it. Files longer than 300,000 bytes are cut; files that are not UTF-8 (tests of
    the decoder) and empty ones are left out.

    Attributes:
      folder: the standard library.
      name: for messages.
    """

    folder: Path
    name: str = NAME

    def sha256(self) -> str:
        """Hash of the documents in order, each with its length."""
        total = hashlib.sha256()
        for document in self.documents():
            data = document.text.encode("utf-8")
            total.update(len(data).to_bytes(8, "big") + data)
        return total.hexdigest()

    def documents(self) -> Iterator[Document]:
        """One document a file."""
        for path in self._paths():
            try:
                text = _text(path.read_bytes())
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be read ({error.strerror}): check the file"
                ) from error
            if text:
                yield Document(text)

    def _paths(self) -> list[Path]:
        found = {}
        for path in self.folder.rglob("*.py"):
            relative = path.relative_to(self.folder)
            if _FOREIGN.isdisjoint(relative.parts) and not path.name.startswith(_GENERATED):
                digest = hashlib.sha256(relative.as_posix().encode("utf-8", "surrogateescape"))
                found[digest.hexdigest()] = path
        return [found[key] for key in sorted(found)]


def stdlib_source() -> StdlibSource:
    """The source made of the standard library of the Python that runs.

    Raises:
      UserError: it is not there as files (in a zip archive, or frozen).
    """
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "os.py").exists():
        raise UserError(
            f"source={NAME!r}: {folder} holds no .py files: use a Python installed as files, or "
            "give a source of your own"
        )
    return StdlibSource(folder)


def _text(data: bytes) -> str:
    """UTF-8 text of at most `_LONGEST` bytes, cut before a character; empty if it is not UTF-8."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    if len(data) <= _LONGEST:
        return text
    return data[:_LONGEST].decode("utf-8", errors="ignore")
