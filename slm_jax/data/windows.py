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

    Cost: a gather of B * (seq_len + 1) tokens and two searches in the document starts a row.

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
    at = np.arange(seq_len + 1, dtype=np.int64)
    index = first[:, None] + at
    if first.size and index[:, -1].max() >= n_tokens:
        index %= n_tokens
    tokens = stream.tokens[index].astype(np.int32)

    # Document starts in (first, first + seq_len], counted along the unrolled circle: the k-th
    # start lies at starts[k % n_documents] + n_tokens * (k // n_documents).
    turns, end = np.divmod(first + seq_len, n_tokens)
    low = np.searchsorted(stream.starts, first, "right")
    high = np.searchsorted(stream.starts, end, "right") + n_documents * turns
    counts = high - low
    row = np.repeat(np.arange(len(first)), counts)
    k = np.arange(len(row)) + np.repeat(low - (np.cumsum(counts) - counts), counts)
    turn, document = np.divmod(k, n_documents)
    new = np.zeros(tokens.shape, bool)  # True where a document starts after the row's first token
    new[row, stream.starts[document] + n_tokens * turn - first[row]] = True

    at = at[:seq_len].astype(np.int32)
    segments = np.cumsum(new[:, :seq_len], axis=1, dtype=np.int32) + np.int32(1)
    positions = at - np.maximum.accumulate(np.where(new[:, :seq_len], at, np.int32(0)), axis=1)
    batch = {
        "tokens": tokens[:, :seq_len].copy(),
        "targets": tokens[:, 1:].copy(),
        "segments": segments,
        "positions": positions,
        "weights": (~new[:, 1:]).astype(np.float32),
    }
    if lengths is not None:
        padding = at >= np.asarray(lengths)[:, None]
        end_of_text = int(stream.tokens[-1])  # every document ends with it
        for name, array in batch.items():
            array[padding] = end_of_text if name in ("tokens", "targets") else 0
    return batch
