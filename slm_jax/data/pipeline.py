"""Batches: a grain pipeline for training, one pass over the held-out text.

Which window of which stream is row r of step s is a pure function of (seed, s, r), so neither the
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
    rows: np.ndarray | None = None,
    read_threads: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless shuffled training batches.

    An epoch of a stream is n_tokens // seq_len windows that do not overlap, in an order of its own
    and shifted by an offset of its own, so that no token is always first in its window. A mixture
    interleaves its sources evenly (their shares are exact to 1 % of each); every source repeats at
    its own pace.

    Args:
      corpus: what to draw from.
      batch_size: rows of the global batch.
      seq_len: inputs a row.
      seed: decides orders and offsets.
      rows: int [n], the rows of each global batch to read, for a process that needs no others
        (`parallel.local_rows`); all by default.
      read_threads: threads that read ahead; 0 reads in the caller. They do not change the batches.

    Returns:
      Iterator over batches of [n, seq_len] (`windows.read_windows`). Its `get_state()` is JSON,
      `{"next_index": step}`, the same on every process; `set_state` goes to any step.

    Raises:
      UserError: batch_size below 1, a row that is not in the batch, a stream shorter than one
        window.
    """
    rows = check_rows(batch_size, rows)
    _check_seq_len(seq_len)
    for stream in corpus.train:
        n_tokens = len(stream.tokens)
        if n_tokens <= seq_len:
            raise UserError(
                f"seq_len={seq_len}: a window needs {seq_len + 1} tokens and {stream.name} has "
                f"{n_tokens}: choose seq_len <= {n_tokens - 1} or give more text"
            )
    windows = [
        _Windows(which, len(s.tokens), seq_len, seed) for which, s in enumerate(corpus.train)
    ]
    batches = grain.MapDataset.source(_Steps(windows, corpus.weights, batch_size, rows)).map(
        functools.partial(_read, corpus.train, seq_len)
    )
    options = grain.ReadOptions(read_threads, max(_READ_AHEAD, read_threads) * (read_threads > 0))
    return iter(batches.to_iter_dataset(options))


def check_rows(batch_size: int, rows: np.ndarray | None) -> np.ndarray:
    """The rows of a global batch to read, int64; all of them for `None`.

    Raises:
      UserError: batch_size below 1, or a row that is not in the batch.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: choose at least 1")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    if not len(rows) or rows.min() < 0 or rows.max() >= batch_size:
        raise UserError(f"rows={rows.tolist()}: choose some of the {batch_size} rows of a batch")
    return rows


@dataclasses.dataclass(frozen=True)
class ValidBatches:
    """One pass over held-out streams in order (`valid_batches`); can be iterated again.

    Attributes:
      streams: what to read.
      batch_size: rows a batch.
      seq_len: inputs a row.
      rows: int64 [n_rows, 3]: stream, index of the first input, inputs before padding.
      local: int64 [n]: which rows of each batch to read.
    """

    streams: tuple[Stream, ...]
    batch_size: int
    seq_len: int
    rows: np.ndarray
    local: np.ndarray

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for i in range(0, len(self.rows), self.batch_size):
            rows = self.rows[i : i + self.batch_size]
            missing = self.batch_size - len(rows)
            padded = np.pad(rows, ((0, missing), (0, 0)))
            yield _read(self.streams, self.seq_len, padded[self.local])


def valid_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    seq_len: int,
    max_tokens: int | None = None,
    rows: np.ndarray | None = None,
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
      rows: int [n], the rows of each batch to read, as in `train_batches`.

    Raises:
      UserError: a size below 1, or a row that is not in the batch.
    """
    _check_seq_len(seq_len)
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens}: choose at least 1")
    local = check_rows(batch_size, rows)
    windows = []
    for which, stream in enumerate(corpus.valid):
        n_targets = len(stream.tokens) - 1
        wanted = n_targets if max_tokens is None else min(n_targets, max_tokens)
        n_windows, n_read = -(-n_targets // seq_len), -(-wanted // seq_len)
        first = np.arange(n_read, dtype=np.int64) * n_windows // max(n_read, 1) * seq_len
        lengths = np.minimum(n_targets - first, seq_len)
        lengths = np.diff(np.minimum(np.cumsum(lengths), wanted), prepend=0)
        windows.append(np.stack([np.full_like(first, which), first, lengths], axis=1))
    return ValidBatches(corpus.valid, batch_size, seq_len, np.concatenate(windows), local)


class _Windows:
    """The endless sequence of the windows of one stream."""

    def __init__(self, which: int, n_tokens: int, seq_len: int, seed: int):
        self._which = which
        self._n_tokens = n_tokens
        self._seq_len = seq_len
        self._seed = seed

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Windows `index`, int64 [n]: int64 [n, 3] of stream, first input, inputs."""
        n_windows = self._n_tokens // self._seq_len
        epochs, places = np.divmod(index, n_windows)
        first = np.empty_like(index)
        for epoch in np.unique(epochs):
            order, offset = _epoch_numbers(self._seed, self._which, int(epoch))
            mine = epochs == epoch
            # The stream is a circle for `read_windows`: a shifted grid fits as well as an
            # unshifted. `offset` may be any 64-bit number.
            shift = offset % self._n_tokens
            window = _shuffled(places[mine], n_windows, order)
            first[mine] = (window * self._seq_len + shift) % self._n_tokens
        which, length = (np.full_like(index, value) for value in (self._which, self._seq_len))
        return np.stack([which, first, length], axis=1)

    def __repr__(self) -> str:  # grain shows it in its messages
        return f"_Windows({self._which}, {self._n_tokens}, {self._seq_len}, {self._seed})"


@functools.lru_cache(maxsize=256)
def _epoch_numbers(seed: int, which: int, epoch: int) -> tuple[int, int]:
    """Seed of the order (uint32) and offset of the windows (any size) in an epoch of a stream."""
    digest = hashlib.sha256(f"{seed} {which} {epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:12], "big")


def _shuffled(places: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Where a permutation of [0, n) that `seed` (uint32) decides takes `places`, int64."""
    if n < _SMALL:
        return _small_order(n, seed)[places]
    shuffle = grain.experimental.index_shuffle
    moved = [shuffle(place, max_index=n - 1, seed=seed, rounds=4) for place in places.tolist()]
    return np.array(moved, np.int64)


@functools.lru_cache(maxsize=64)
def _small_order(n: int, seed: int) -> np.ndarray:
    order = sorted(range(n), key=lambda i: hashlib.sha256(f"{seed} {i}".encode()).digest())
    return np.array(order, np.int64)


class _Steps:
    """Source of what this process reads, step by step: int64 [n, 3] as `_Windows` gives them.

    A whole step at a time: row by row, Python would cost more than reading.
    """

    def __init__(
        self,
        windows: Sequence[_Windows],
        weights: Sequence[float],
        batch_size: int,
        rows: np.ndarray,
    ):
        self._windows = windows
        self._batch_size = batch_size
        self._rows = rows
        # As whole numbers, of which the smallest is 100.
        self._shares = [int(weight * 100 / min(weights)) for weight in weights]

    def __len__(self) -> int:
        return _ENDLESS // self._batch_size

    def __getitem__(self, step: int) -> np.ndarray:
        index = int(step) * self._batch_size + self._rows
        out = np.empty((len(index), 3), np.int64)
        for windows, (places, numbers) in zip(
            self._windows, _interleaved(index, self._shares), strict=True
        ):
            out[places] = windows(numbers)
        return out

    def __repr__(self) -> str:  # grain shows it in its messages
        return f"_Steps({self._windows}, {self._batch_size}, {self._rows})"


def _interleaved(
    index: np.ndarray, shares: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Deals the rows of a mixture to its streams evenly, in exact shares.

    Of the first k rows the first stream has k less floor(k x the others' part); the other streams
    divide theirs in the same way. It repeats after sum(shares) rows.

    Args:
      index: int64 [n], rows of the mixture.
      shares: of each stream.

    Yields:
      For each stream: which of `index` are its own, and which of its rows they are.
    """
    left = sum(shares)
    rounds, row = np.divmod(index, left)
    places = np.arange(len(index))
    for share in shares:
        others, others_next = row * (left - share) // left, (row + 1) * (left - share) // left
        mine = others == others_next
        yield places[mine], rounds[mine] * share + (row - others)[mine]
        places, rounds, row = places[~mine], rounds[~mine], others[~mine]
        left -= share


def _read(streams: Sequence[Stream], seq_len: int, rows: np.ndarray) -> Batch:
    """Reads rows int64 [B, 3] of (stream, first input, inputs before padding) as a batch."""
    which, first, lengths = rows.T
    padding = None if (lengths == seq_len).all() else lengths
    return read_windows(streams, which, first, seq_len, padding)


def _check_seq_len(seq_len: int) -> None:
    if seq_len < 1:
        raise UserError(f"seq_len={seq_len}: choose at least 1")
