from collections.abc import Sequence

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slm_jax.data import Stream, read_windows


def stream_of(lengths: Sequence[int]) -> Stream:
    tokens = np.random.default_rng(sum(lengths)).integers(0, 1000, sum(lengths)).astype(np.uint16)
    tokens[-1] = 7  # the end of text, of all streams
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    return Stream("made", tokens, starts, 1, "")


def slow_row(stream: Stream, first: int, seq_len: int, length: int) -> list[tuple[int, ...]]:
    """(token, target, segment, position, weight) of every input, one at a time."""
    n = len(stream.tokens)
    starts = set(stream.starts.tolist())
    row = []
    segment, position = 1, 0
    for j in range(seq_len):
        if j > 0:
            begins = (first + j) % n in starts
            segment, position = (segment + 1, 0) if begins else (segment, position + 1)
        target_begins = (first + j + 1) % n in starts
        token, target = int(stream.tokens[(first + j) % n]), int(stream.tokens[(first + j + 1) % n])
        if j < length:
            row.append((token, target, segment, position, int(not target_begins)))
        else:
            row.append((int(stream.tokens[-1]), int(stream.tokens[-1]), 0, 0, 0))
    return row


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    rows=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 30)), min_size=1, max_size=5),
    seq_len=st.integers(1, 30),
    padded=st.booleans(),
)
@example(lengths=[1], rows=[(0, 3)], seq_len=5, padded=False)  # all around, many times
@example(lengths=[1, 1, 1], rows=[(2, 4), (0, 0)], seq_len=4, padded=True)
@example(lengths=[40], rows=[(39, 7), (5, 7)], seq_len=7, padded=False)  # one long document
def test_against_a_slow_reader(
    lengths: list[int], rows: list[tuple[int, int]], seq_len: int, padded: bool
) -> None:
    streams = [stream_of(lengths), stream_of(lengths[::-1])]
    which = np.array([(row[0] + row[1]) % 2 for row in rows])
    first = np.array([row[0] % sum(lengths) for row in rows])
    length = np.array([min(row[1], seq_len) if padded else seq_len for row in rows])
    batch = read_windows(streams, which, first, seq_len, length if padded else None)
    names = ("tokens", "targets", "segments", "positions", "weights")
    for b in range(len(rows)):
        got = list(zip(*(batch[name][b].tolist() for name in names), strict=True))
        assert got == slow_row(streams[which[b]], int(first[b]), seq_len, int(length[b]))
    assert {name: array.dtype.name for name, array in batch.items()} == {
        **dict.fromkeys(names[:-1], "int32"),
        "weights": "float32",
    }


def test_one_row_by_hand() -> None:
    # Documents "ab.", "c.", "def." with "." the end of text, read from "b".
    tokens = np.frombuffer(b"ab.c.def.", np.uint8).astype(np.uint16)
    stream = Stream("made", tokens, np.array([0, 3, 5]), 6, "")
    batch = read_windows([stream], np.array([0]), np.array([1]), 6)
    assert bytes(batch["tokens"][0].tolist()) == b"b.c.de"
    assert bytes(batch["targets"][0].tolist()) == b".c.def"
    assert batch["segments"][0].tolist() == [1, 1, 2, 2, 3, 3]
    assert batch["positions"][0].tolist() == [0, 1, 0, 1, 0, 1]
    assert batch["weights"][0].tolist() == [1, 0, 1, 0, 1, 1]
