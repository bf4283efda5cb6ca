"""Batches: a grain pipeline for training, one pass over the held-out text.

Which row of which stream is row r of step s is a pure function of (seed, s, r), so neither the
number of processes nor of threads changes the global batch, and a run resumes at any step without
reading what came before.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from slm_jax.data.cache import Stream
from slm_jax.data.corpus import Corpus
from slm_jax.data.windows import Batch, read_windows
from slm_jax.errors import UserError

_ENDLESS = 1 << 48  # rows of a stream that repeats for ever
_READ_AHEAD = 8  # batches
_SMALL = 4096  # windows; grain's index_shuffle takes 3 us above, but 2 ms for a handful


def train_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    read_threads: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless shuffled training batches.

    An epoch of a stream is n_tokens // seq_len windows that do not overlap, in an order of its own
    and shifted by an offset of its own, so that no token is always first in its window. A mixture
    interleaves its sources evenly (`grain.MapDataset.mix`, whose shares are exact to 1 % of each);
    every source repeats at its own pace.

    Args:
      corpus: what to draw from.
      batch_size: rows of the global batch.
      seq_len: inputs a row.
      seed: decides orders and offsets.
      process_index: this process; it gets rows [k * b, (k + 1) * b) of each global batch,
        b = batch_size / process_count.
      process_count: how many processes share the global batch.
      read_threads: threads that read ahead; 0 reads in the caller. They do not change the batches.

    Returns:
      Iterator over batches of [batch_size / process_count, seq_len] (`windows.read_windows`). Its
      `get_state()` is JSON, `{"next_index": step}`, the same on every process; `set_state` goes to
      any step.

    Raises:
      UserError: batch_size not a multiple of process_count, a stream shorter than one window.
    """
    check_share(batch_size, process_index, process_count)
    _check_seq_len(seq_len)
    for stream in corpus.train:
        n_tokens = len(stream.tokens)
        if n_tokens <= seq_len:
            raise UserError(
                f"seq_len={seq_len}: a window needs {seq_len + 1} tokens and {stream.name} has "
                f"{n_tokens}: choose seq_len <= {n_tokens - 1} or give more text"
            )
    rows = [
        grain.MapDataset.source(_Rows(which, len(stream.tokens), seq_len, seed))
        for which, stream in enumerate(corpus.train)
    ]
    mixed = rows[0] if len(rows) == 1 else grain.MapDataset.mix(rows, corpus.weights)
    local = _ProcessRows(mixed, batch_size, process_index, process_count)
    batches = (
        grain.MapDataset.source(local)
        .batch(batch_size // process_count)
        .map(functools.partial(_read, corpus.train, seq_len))
    )
    options = grain.ReadOptions(read_threads, max(_READ_AHEAD, read_threads) * (read_threads > 0))
    return iter(batches.to_iter_dataset(options))


def check_share(batch_size: int, process_index: int, process_count: int) -> None:
    """Refuses a global batch that the processes cannot share evenly.

    Raises:
      UserError: batch_size not a positive multiple of process_count, or no such process.
    """
    if process_count < 1 or batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size} is not a positive multiple of process_count={process_count}: "
            f"choose a multiple of {max(1, process_count)}"
        )
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index={process_index} is not in [0, {process_count})")


@dataclasses.dataclass(frozen=True)
class ValidBatches:
    """One pass over held-out streams in order (`valid_batches`); can be iterated again.

    Attributes:
      streams: what to read.
      batch_size: rows a batch.
      seq_len: inputs a row.
      rows: int64 [n_rows, 3]: stream, index of the first input, inputs before padding.
    """

    streams: tuple[Stream, ...]
    batch_size: int
    seq_len: int
    rows: np.ndarray

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for i in range(0, len(self.rows), self.batch_size):
            rows = self.rows[i : i + self.batch_size]
            missing = self.batch_size - len(rows)
            yield _read(self.streams, self.seq_len, np.pad(rows, ((0, missing), (0, 0))))


def valid_batches(
    corpus: Corpus, *, batch_size: int, seq_len: int, max_tokens: int | None = None
) -> ValidBatches:
    """The held-out text once, in order, in windows that do not overlap.

    Every token of a stream but its first is a target exactly once; of those, `weights` counts the
    ones in the document of their input (`windows.read_windows`). The last row of a stream and the
    last batch are padded.

    Args:
      corpus: its `valid` streams, one after the other.
      batch_size: rows a batch.
      seq_len: inputs a row.
      max_tokens: read only so many targets of each stream, in windows spread evenly over it: its
        start may be one long document that is like no other.

    Raises:
      UserError: a size below 1.
    """
    _check_seq_len(seq_len)
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: choose at least 1")
    rows = []
    for which, stream in enumerate(corpus.valid):
        n_targets = len(stream.tokens) - 1
        wanted = n_targets if max_tokens is None else min(n_targets, max_tokens)
        n_windows, n_read = -(-n_targets // seq_len), -(-wanted // seq_len)
        first = np.arange(n_read, dtype=np.int64) * n_windows // max(n_read, 1) * seq_len
        lengths = np.minimum(n_targets - first, seq_len)
        lengths = np.diff(np.minimum(np.cumsum(lengths), wanted), prepend=0)
        rows.append(np.stack([np.full_like(first, which), first, lengths], axis=1))
    return ValidBatches(corpus.valid, batch_size, seq_len, np.concatenate(rows))


class _Rows:
    """Endless source of the windows of one stream: int64 [3] of stream, first input, inputs."""

    def __init__(self, which: int, n_tokens: int, seq_len: int, seed: int):
        self._which = which
        self._n_tokens = n_tokens
        self._seq_len = seq_len
        self._seed = seed
        self._n_windows = n_tokens // seq_len

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, row = divmod(int(index), self._n_windows)
        order, offset = _epoch_numbers(self._seed, self._which, epoch)
        row = _shuffled(row, self._n_windows, order)
        # The stream is a circle for `read_windows`: a shifted grid fits as well as an unshifted.
        first = (row * self._seq_len + offset) % self._n_tokens
        return np.array([self._which, first, self._seq_len], np.int64)

    def __repr__(self) -> str:  # grain shows it in its messages
        return f"_Rows({self._which}, {self._n_tokens}, {self._seq_len}, {self._seed})"


@functools.lru_cache(maxsize=256)
def _epoch_numbers(seed: int, which: int, epoch: int) -> tuple[int, int]:
    """Seed of the order (uint32) and offset of the windows (any size) in an epoch of a stream."""
    digest = hashlib.sha256(f"{seed} {which} {epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:12], "big")


def _shuffled(row: int, n: int, seed: int) -> int:
    """Where a permutation of [0, n) that `seed` (uint32) decides takes `row`."""
    if n < _SMALL:
        return _small_order(n, seed)[row]
    shuffled: int = grain.experimental.index_shuffle(row, max_index=n - 1, seed=seed, rounds=4)
    return shuffled


@functools.lru_cache(maxsize=64)
def _small_order(n: int, seed: int) -> list[int]:
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{seed} {i}".encode()).digest())


class _ProcessRows:
    """The rows of one process: a contiguous part of each global batch of `rows`."""

    def __init__(self, rows: grain.MapDataset, batch_size: int, index: int, count: int):
        self._rows = rows
        self._batch_size = batch_size
        self._local = batch_size // count
        self._first = self._local * index

    def __len__(self) -> int:
        return len(self._rows) // self._batch_size * self._local

    def __getitem__(self, index: int) -> np.ndarray:
        step, row = divmod(int(index), self._local)
        return self._rows[step * self._batch_size + self._first + row]

    def __repr__(self) -> str:  # grain shows it in its messages
        return f"_ProcessRows({self._rows!r}, {self._batch_size}, {self._first}, {self._local})"


def _read(streams: Sequence[Stream], seq_len: int, rows: np.ndarray) -> Batch:
    """Reads rows int64 [B, 3] of (stream, first input, inputs before padding) as a batch."""
    which, first, lengths = rows.T
    padding = None if (lengths == seq_len).all() else lengths
    if (which == which[0]).all():
        return read_windows(streams[which[0]], first, seq_len, padding)
    batch: Batch = {}
    for stream in np.unique(which):
        mine = which == stream
        part = read_windows(
            streams[stream], first[mine], seq_len, None if padding is None else padding[mine]
        )
        for name, array in part.items():
            whole = batch.setdefault(name, np.empty((len(rows), seq_len), array.dtype))
            whole[mine] = array
    return batch


def _check_seq_len(seq_len: int) -> None:
    if seq_len < 1:
        raise UserError(f"seq_len={seq_len}: choose at least 1")
