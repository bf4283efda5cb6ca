"""Tokenise once: documents to flat token files on disk, checked and memory-mapped.

A cache folder is named after everything that defines its content (text, tokenizer, held-out
fraction) and holds, for `train` and `valid`: NAME.tokens, the ids of all documents one after the
other, every document followed by the end of text; NAME.starts, int64, where each document begins;
and meta.json with sizes and sha256 of all of it. A folder appears by one rename, complete or not
at all.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from slm_jax.data.sources import Source, Split, split_documents
from slm_jax.data.tokenizer import Tokenizer
from slm_jax.errors import UserError

_FORMAT = 1  # part of the key: raise it when what the files mean changes
_FLUSH_CHARS = 4_000_000  # text tokenised at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """A flat stream of tokens made of documents.

    Attributes:
      name: source and split, for messages.
      tokens: uint16 or uint32 [n_tokens]; every document ends with the end of text.
      starts: int64 [n_documents], ascending from 0: the index where each document begins.
      text_bytes: UTF-8 bytes of all texts.
      fingerprint: sha256 (hex) over tokens and starts.
    """

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    text_bytes: int
    fingerprint: str

    @property
    def n_targets(self) -> int:
        """Targets that count: all tokens but the first of each document, ends of text included."""
        return len(self.tokens) - len(self.starts)


def cache_root(cache_dir: str | None) -> Path:
    """`cache_dir`, else the environment's SLM_JAX_CACHE, else ~/.cache/slm_jax."""
    return Path(cache_dir or os.environ.get("SLM_JAX_CACHE") or "~/.cache/slm_jax").expanduser()


def token_streams(
    source: Source, tokenizer: Tokenizer, *, valid_fraction: float, cache_dir: str | None
) -> dict[Split, Stream]:
    """The tokens of a source, from the cache where it has them.

    A cache that fails its checks is made again, with a warning.

    Raises:
      UserError: the cache folder cannot be written, or whatever the source raises.
    """
    key = hashlib.sha256(
        json.dumps([_FORMAT, source.sha256(), tokenizer.fingerprint, valid_fraction]).encode()
    ).hexdigest()
    folder = cache_root(cache_dir) / "tokens" / key[:32]
    if folder.exists():
        with contextlib.suppress(_CorruptError):
            return _load(folder, source.name)
    with _lock(folder, cache_dir):  # one process tokenises, the others wait and read
        if folder.exists():
            try:
                return _load(folder, source.name)
            except _CorruptError as error:
                warnings.warn(
                    f"CORRUPT TOKEN CACHE {folder}: {error}. Making it again from "
                    f"{source.name!r}; if this comes back, the disk is failing.",
                    stacklevel=2,
                )
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        try:
            _write(partial, source, tokenizer, valid_fraction)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    try:
        return _load(folder, source.name)
    except _CorruptError as error:
        raise UserError(
            f"{folder}: {error}, and it was written just now: set cache_dir to another disk"
        ) from error


class _CorruptError(Exception):
    """What is wrong with a cache folder."""


@contextlib.contextmanager
def _lock(folder: Path, cache_dir: str | None) -> Iterator[None]:
    """Holds the right to write `folder`; a killed process gives it back."""
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(folder.with_name(folder.name + ".lock").open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"cache_dir={str(cache_root(cache_dir))!r} cannot be written "
                f"({error.strerror}): set cache_dir or SLM_JAX_CACHE to a folder that can"
            ) from error
        yield


def _write(folder: Path, source: Source, tokenizer: Tokenizer, valid_fraction: float) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    meta: dict[str, Any] = {"tokenizer": tokenizer.name, "dtype": dtype.name}
    with contextlib.ExitStack() as files:  # closed also where a source raises
        writers = {split: _Writer(folder, split, dtype, files) for split in get_args(Split)}
        for batch in _batches(split_documents(source, valid_fraction)):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (split, text), ids in zip(batch, encoded, strict=True):
                writers[split].add(np.append(ids, tokenizer.eos_id).astype(dtype), text)
        meta |= {split: writer.finish() for split, writer in writers.items()}
    meta["sha256"] = _meta_sha256(meta)
    with (folder / "meta.json").open("w") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _batches(documents: Iterator[tuple[Split, str]]) -> Iterator[list[tuple[Split, str]]]:
    batch: list[tuple[Split, str]] = []
    chars = 0
    for split, text in documents:
        batch.append((split, text))
        chars += len(text)
        if chars >= _FLUSH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class _Writer:
    """Writes the two files of a split and hashes them on the way."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, files: contextlib.ExitStack):
        self._starts_path = folder / f"{split}.starts"
        self._file = files.enter_context((folder / f"{split}.tokens").open("wb"))
        self._hash = hashlib.sha256()
        self._itemsize = dtype.itemsize
        self._starts = array.array("q")
        self._n_tokens = 0
        self._text_bytes = 0

    def add(self, ids: np.ndarray, text: str) -> None:
        """Appends one document, its end of text included."""
        data = ids.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._starts.append(self._n_tokens)
        self._n_tokens += len(ids)
        self._text_bytes += len(text.encode("utf-8"))

    def finish(self) -> dict[str, Any]:
        """Puts both files on disk; returns what meta.json says of them."""
        starts = self._starts.tobytes()
        with self._starts_path.open("wb") as starts_file:
            starts_file.write(starts)
            for file in (self._file, starts_file):
                file.flush()
                os.fsync(file.fileno())
        return {
            "n_tokens": self._n_tokens,
            "n_documents": len(self._starts),
            "text_bytes": self._text_bytes,
            "tokens_sha256": self._hash.hexdigest(),
            "starts_sha256": hashlib.sha256(starts).hexdigest(),
        }


def _load(folder: Path, name: str) -> dict[Split, Stream]:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        claimed = meta.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _CorruptError(f"meta.json cannot be read ({error!r})") from error
    if claimed != _meta_sha256(meta):
        raise _CorruptError("meta.json has another sha256 than it says")
    streams: dict[Split, Stream] = {}
    for split in get_args(Split):
        part = meta[split]
        tokens = _map(folder / f"{split}.tokens", meta["dtype"], part, "tokens")
        starts = _map(folder / f"{split}.starts", "int64", part, "starts")
        fingerprint = hashlib.sha256(
            f"{meta['dtype']} {part['tokens_sha256']} {part['starts_sha256']}".encode()
        ).hexdigest()
        streams[split] = Stream(f"{name} {split}", tokens, starts, part["text_bytes"], fingerprint)
    return streams


def _map(path: Path, dtype: str, part: dict[str, Any], kind: str) -> np.ndarray:
    length = part["n_tokens" if kind == "tokens" else "n_documents"]
    size = length * np.dtype(dtype).itemsize
    try:
        if path.stat().st_size != size:
            raise _CorruptError(f"{path.name} has {path.stat().st_size} bytes, not {size}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        mapped = np.memmap(path, dtype, "r")
    except OSError as error:
        raise _CorruptError(f"{path.name} cannot be read ({error})") from error
    if digest != part[f"{kind}_sha256"]:
        raise _CorruptError(f"{path.name} has another sha256 than meta.json says")
    return mapped.view(np.ndarray)  # the subclass makes every slice slower


def _meta_sha256(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
