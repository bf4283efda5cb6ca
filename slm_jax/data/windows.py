"""Windows of a token stream as training rows, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slm_jax.data.cache import Stream

# tokens, targets, segments, positions: int32 [B, S]; weights: float32 [B, S].
Batch = dict[str, np.ndarray]


def read_windows(
    streams: Sequence[Stream],
    which: np.ndarray,
    first: np.ndarray,
    seq_len: int,
    lengths: np.ndarray | None = None,
) -> Batch:
    """Rows of `seq_len` inputs and targets that begin anywhere in some streams.

    A stream is a circle: after its last token comes its first, as the next document. A row is
    cut from it without regard for documents, so a row may begin inside one. In a row

      tokens     the inputs, stream[first : first + seq_len];
      targets    the token after each input;
      segments   1, 2, ... for the documents of the row in order, 0 for padding;
      positions  0, 1, ... from the start of each document, or of the row if that comes later;
      weights    1 where the target belongs to the document of its input (the end of text that
                 closes a document belongs to it), else 0: nothing foretells a next document.

    Cost: a copy of the tokens, two fills of whole arrays, and two searches in the document starts a
    row: 5 ns a token in rows of 1024 on one core.

    Args:
      streams: at least one token each; those of one tokenizer.
      which: int [B], the index of each row's stream.
      first: int [B], the index of each row's first input, in [0, n_tokens) of its stream.
      seq_len: inputs a row.
      lengths: int [B] in [0, seq_len], inputs of each row before padding; None: no padding.

    Returns:
      Batch of [B, seq_len]; padding has the end of text as token and target.
    """
    which, first = np.asarray(which, np.int64), np.asarray(first, np.int64)
    tokens = np.empty((len(first), seq_len), np.int32)
    targets = np.empty_like(tokens)
    for i, (stream, begin) in enumerate(zip(which.tolist(), first.tolist(), strict=True)):
        source = streams[stream].tokens
        part = source[begin : begin + seq_len + 1]
        if len(part) <= seq_len:
            part = np.take(source, np.arange(begin, begin + seq_len + 1), mode="wrap")
        tokens[i], targets[i] = part[:-1], part[1:]

    # Every row and every document in it is a run of the flat batch.
    rows = np.arange(len(first)) * seq_len
    runs, unforetold = [rows], []
    for stream in np.unique(which):
        mine = np.flatnonzero(which == stream)
        row, ahead = _document_starts(streams[stream], first[mine], seq_len)
        begins = rows[mine][row] + ahead
        runs.append(begins[ahead < seq_len])  # the others are their row's last target, no input
        unforetold.append(begins - 1)
    run = np.sort(np.concatenate(runs))
    sizes = np.diff(run, append=tokens.size)
    number = np.arange(len(run)) - np.searchsorted(run, run // seq_len * seq_len) + 1
    segments = np.repeat(number.astype(np.int32), sizes)
    positions = np.arange(tokens.size, dtype=np.int32)
    positions -= np.repeat(run.astype(np.int32), sizes)
    weights = np.ones(tokens.size, np.float32)
    weights[np.concatenate(unforetold)] = 0
    batch = {
        "tokens": tokens,
        "targets": targets,
        "segments": segments.reshape(tokens.shape),
        "positions": positions.reshape(tokens.shape),
        "weights": weights.reshape(tokens.shape),
    }
    if lengths is not None:
        padding = np.arange(seq_len) >= np.asarray(lengths)[:, None]
        end_of_text = int(streams[0].tokens[-1])  # every document ends with it
        for name, array in batch.items():
            array[padding] = end_of_text if name in ("tokens", "targets") else 0
    return batch


def _document_starts(
    stream: Stream, first: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Documents that start in (first, first + seq_len] of any row, along the unrolled circle.

    Returns:
      int64 [n] each: the row, and how many tokens after its first input.
    """
    n_tokens, n_documents = len(stream.tokens), len(stream.starts)
    # The k-th start of the circle is at starts[k % n_documents] + n_tokens * (k // n_documents).
    turns, end = np.divmod(first + seq_len, n_tokens)
    low = np.searchsorted(stream.starts, first, "right")
    high = np.searchsorted(stream.starts, end, "right") + n_documents * turns
    counts = high - low
    row = np.repeat(np.arange(len(first)), counts)
    k = np.arange(len(row)) + np.repeat(low - (np.cumsum(counts) - counts), counts)
    turn, document = np.divmod(k, n_documents)
    return row, stream.starts[document] + n_tokens * turn - first[row]
