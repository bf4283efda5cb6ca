"""Files and folders that appear whole or not at all, and whether a place is free for them."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from slm_jax.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file under another name in its folder, which is made; renamed when it is on the disk.

    What was at `path` is there until then, and stays if the block raises.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with building.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, with its parents; takes its name when the block is done.

    What was at `folder` is there until then, and stays if the block raises.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    building.mkdir()
    try:
        yield building
        if folder.exists():
            folder.rename(replaced)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def check_free(folder: Path, *, marker: str, what: str, overwrite: bool) -> None:
    """Refuses a folder that may not be written.

    Args:
        folder: free if it is missing or empty.
        marker: a file that every folder of this kind has.
        what: the kind, for the message: `a model`.
        overwrite: a folder of this kind is free too.

    Raises:
        UserError: if it is not.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"out={folder} is a file: choose another")
    if not any(folder.iterdir()):
        return
    if not (folder / marker).is_file():
        raise UserError(f"out={folder} holds other things than {what}: choose another")
    if not overwrite:
        raise UserError(f"out={folder} holds {what}: choose another or set overwrite=True")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: if it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the folder") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): copy it again") from error


def sha256(path: Path) -> str:
    """The hash of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
