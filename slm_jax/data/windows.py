"""Windows of a token stream as training rows, for a whole batch at once."""

from __future__ import annotations

import numpy as np

from slm_jax.data.cache import Stream

# tokens, targets, segments, positions: int32 [B, S]; weights: float32 [B, S].
Batch = dict[str, np.ndarray]


def read_windows(
    stream: Stream, first: np.ndarray, seq_len: int, lengths: np.ndarray | None = None
) -> Batch:
    """Rows of `seq_len` inputs and targets that begin anywhere in a stream.

    The stream is a circle: after its last token comes its first, as the next document. A row is
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
      stream: at least one token.
      first: int [B], the index of each row's first input, in [0, n_tokens).
      seq_len: inputs a row.
      lengths: int [B] in [0, seq_len], inputs of each row before padding; None: no padding.

    Returns:
      Batch of [B, seq_len]; padding has the end of text as token and target.
    """
    n_tokens, n_documents = len(stream.tokens), len(stream.starts)
    first = np.asarray(first, np.int64)
    tokens = np.empty((len(first), seq_len), np.int32)
    targets = np.empty_like(tokens)
    for i, begin in enumerate(first.tolist()):
        part = stream.tokens[begin : begin + seq_len + 1]
        if len(part) <= seq_len:
            around = np.arange(begin, begin + seq_len + 1)
            part = np.take(stream.tokens, around, mode="wrap")
        tokens[i], targets[i] = part[:-1], part[1:]

    # Document starts in (first, first + seq_len], counted along the unrolled circle: the k-th
    # start lies at starts[k % n_documents] + n_tokens * (k // n_documents).
    turns, end = np.divmod(first + seq_len, n_tokens)
    low = np.searchsorted(stream.starts, first, "right")
    high = np.searchsorted(stream.starts, end, "right") + n_documents * turns
    counts = high - low
    row = np.repeat(np.arange(len(first)), counts)
    k = np.arange(len(row)) + np.repeat(low - (np.cumsum(counts) - counts), counts)
    turn, document = np.divmod(k, n_documents)
    # Each as an index into the flat batch: a document starts there, after its row's first input.
    new = row * seq_len + stream.starts[document] + n_tokens * turn - first[row]
    inside = new < (row + 1) * seq_len  # else it is the row's last target, no input

    # Every row and every document in it is a run of the flat batch.
    rows = np.arange(len(first)) * seq_len
    runs = np.sort(np.concatenate([rows, new[inside]]))
    sizes = np.diff(runs, append=tokens.size)
    number = np.arange(len(runs)) - np.searchsorted(runs, runs // seq_len * seq_len) + 1
    segments = np.repeat(number.astype(np.int32), sizes)
    positions = np.arange(tokens.size, dtype=np.int32)
    positions -= np.repeat(runs.astype(np.int32), sizes)
    weights = np.ones(tokens.size, np.float32)
    weights[new - 1] = 0
    batch = {
        "tokens": tokens,
        "targets": targets,
        "segments": segments.reshape(tokens.shape),
        "positions": positions.reshape(tokens.shape),
        "weights": weights.reshape(tokens.shape),
    }
    if lengths is not None:
        padding = np.arange(seq_len) >= np.asarray(lengths)[:, None]
        end_of_text = int(stream.tokens[-1])  # every document ends with it
        for name, array in batch.items():
            array[padding] = end_of_text if name in ("tokens", "targets") else 0
    return batch
