import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from slm_jax.data import Corpus, train_batches, valid_batches
from slm_jax.errors import UserError
from tests.data.batches import assert_same, take

MakeCorpus = Callable[..., Corpus]
LENGTHS = [7, 1, 30, 2, 60, 15, 1, 1, 44]  # 161 tokens
SIZES = {"batch_size": 4, "seq_len": 8, "seed": 3}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("mixed", [False, True])
def test_global_batch_is_the_same_on_any_number_of_processes(
    make_corpus: MakeCorpus, count: int, mixed: bool
) -> None:
    corpus = make_corpus(LENGTHS, [90, 10], weights=(0.7, 0.3)) if mixed else make_corpus(LENGTHS)
    whole = take(train_batches(corpus, **SIZES), 12)
    parts = [
        take(train_batches(corpus, **SIZES, rows=rows), 12)
        for rows in np.split(np.arange(4), count)
    ]
    joined = [
        {name: np.concatenate([part[step][name] for part in parts]) for name in whole[0]}
        for step in range(12)
    ]
    assert whole[0]["tokens"].shape == (4, 8)
    assert_same(joined, whole)


@pytest.mark.parametrize("threads", [0, 1, 4, 16])
def test_threads_do_not_change_batches(make_corpus: MakeCorpus, threads: int) -> None:
    corpus = make_corpus(LENGTHS)
    want = take(train_batches(corpus, **SIZES), 30)
    assert_same(take(train_batches(corpus, **SIZES, read_threads=threads), 30), want)


@pytest.mark.parametrize("mixed", [False, True])
def test_saved_state_goes_on_exactly(make_corpus: MakeCorpus, mixed: bool) -> None:
    corpus = make_corpus(LENGTHS, [90, 10], weights=(0.7, 0.3)) if mixed else make_corpus(LENGTHS)
    batches = train_batches(corpus, **SIZES)
    take(batches, 17)  # in the middle of an epoch, rows read ahead
    state = json.loads(json.dumps(batches.get_state()))
    assert state == {"next_index": 17}
    want = take(batches, 9)
    fresh = train_batches(corpus, **SIZES)
    fresh.set_state(state)
    assert_same(take(fresh, 9), want)
    batches.set_state(state)  # back, in the same iterator
    assert_same(take(batches, 9), want)
    other = train_batches(corpus, **SIZES, rows=np.array([2, 3]), read_threads=4)
    other.set_state(state)  # another number of processes and threads
    assert_same(take(other, 9), [{k: v[2:] for k, v in batch.items()} for batch in want])


def test_an_epoch_covers_the_stream_and_epochs_differ(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus(LENGTHS)
    n_tokens, seq_len = 161, 8
    n_windows = n_tokens // seq_len
    rows = take(train_batches(corpus, batch_size=n_windows, seq_len=seq_len, seed=0), 6)
    firsts = []
    for batch in rows:
        targets = batch["targets"].ravel()
        assert len(set(targets.tolist())) == n_windows * seq_len  # a token's id is its place
        firsts.append(batch["tokens"][:, 0].tolist())
    assert len({tuple(order) for order in firsts}) == 6
    assert len({frozenset(order) for order in firsts}) > 1  # the grid moves too
    steps = np.diff(sorted(firsts[0]))
    assert set(steps.tolist()) <= {8, 9}  # one gap of 161 % 8 tokens
    assert firsts[0] != sorted(firsts[0])


def test_an_epoch_is_whole_over_restarts_with_other_numbers_of_processes(
    make_corpus: MakeCorpus,
) -> None:
    corpus = make_corpus(LENGTHS)  # 20 windows of 8 tokens: five steps
    read: list[list[int]] = []
    state = {"next_index": 0}
    for count, steps in ((2, 2), (4, 1), (1, 2)):
        for rows in np.split(np.arange(4), count):
            batches = train_batches(corpus, **SIZES, rows=rows)
            batches.set_state(state)
            read += [batch["targets"].ravel().tolist() for batch in take(batches, steps)]
        state = batches.get_state()
    targets = [target for part in read for target in part]
    assert len(targets) == len(set(targets)) == 20 * 8  # a token's id is its place
    whole = take(train_batches(corpus, **SIZES), 5)
    assert set(targets) == set(np.concatenate([b["targets"] for b in whole]).ravel().tolist())


def test_seed_decides_the_order(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus(LENGTHS)
    one, same, other = (
        take(train_batches(corpus, batch_size=4, seq_len=8, seed=seed), 3) for seed in (3, 3, 4)
    )
    assert_same(one, same)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(one, other, strict=True))


def test_an_epoch_of_many_windows_is_whole_too(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus([10_001])
    epochs = take(train_batches(corpus, batch_size=5_000, seq_len=2, seed=0), 2)
    for batch in epochs:
        assert len(set(batch["targets"].ravel().tolist())) == 10_000
    first, second = (batch["tokens"][:, 0] for batch in epochs)
    assert (first != second).mean() > 0.99
    assert abs(np.corrcoef(first, np.arange(5_000))[0, 1]) < 0.1  # not in order


def test_mixture_keeps_its_shares_and_each_source_its_order(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus([50], [900], [300, 100], weights=(0.5, 0.2, 0.3))
    told_apart = tuple(
        dataclasses.replace(stream, tokens=stream.tokens + np.uint16(2000 * which))
        for which, stream in enumerate(corpus.train)
    )
    corpus = dataclasses.replace(corpus, train=told_apart)
    rows = np.concatenate([batch["tokens"] for batch in take(train_batches(corpus, **SIZES), 500)])
    source = rows[:, 0] // 2000
    np.testing.assert_array_equal(rows // 2000, np.broadcast_to(source[:, None], rows.shape))
    for part in (source, source[:200], source[-200:]):  # evenly, not only in the long run
        shares = np.bincount(part, minlength=3) / len(part)
        np.testing.assert_allclose(shares, corpus.weights, atol=0.01)
    alone = take(train_batches(make_corpus([50]), **SIZES), 300)
    alone_rows = np.concatenate([batch["tokens"] for batch in alone])
    first = rows[source == 0]
    np.testing.assert_array_equal(first, alone_rows[: len(first)])


def test_valid_has_every_target_once(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus(LENGTHS)
    batches = valid_batches(corpus, batch_size=4, seq_len=8)
    got = list(batches)
    assert len(got) == len(batches) == 5  # 20 rows of 8 for 160 targets
    real = np.concatenate([b["segments"] for b in got]) > 0
    targets = np.concatenate([b["targets"] for b in got])[real]
    np.testing.assert_array_equal(targets, np.arange(1, 161))
    weights = np.concatenate([b["weights"] for b in got])
    assert weights.sum() == corpus.valid[0].n_targets == 161 - len(LENGTHS)
    first_of_document = np.isin(targets, corpus.valid[0].starts)
    np.testing.assert_array_equal(weights[real] == 0, first_of_document)
    assert_same(list(batches), got)  # can be read again


@pytest.mark.parametrize("seq_len", [1, 7, 160, 161, 500])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_valid_pads_what_is_left(make_corpus: MakeCorpus, seq_len: int, batch_size: int) -> None:
    corpus = make_corpus(LENGTHS, [2], [1])
    got = list(valid_batches(corpus, batch_size=batch_size, seq_len=seq_len))
    for batch in got:
        assert all(array.shape == (batch_size, seq_len) for array in batch.values())
        padding = batch["segments"] == 0
        for name in ("weights", "positions"):
            assert not batch[name][padding].any()
    real = np.concatenate([b["segments"] for b in got]) > 0
    targets = np.concatenate([b["targets"] for b in got])[real]
    np.testing.assert_array_equal(targets, [*range(1, 161), 1])  # a stream of 1 token has none
    assert sum(b["weights"].sum() for b in got) == 161 - len(LENGTHS) + 1


def test_valid_reads_max_tokens_spread_over_each_stream(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus(LENGTHS, [50])  # 161 tokens in 20 windows of 8, 50 in 7
    got = list(valid_batches(corpus, batch_size=2, seq_len=8, max_tokens=21))
    real = np.concatenate([b["segments"] for b in got]) > 0
    targets = np.concatenate([b["targets"] for b in got])[real]
    windows = [(0, 8), (6, 8), (13, 5), (0, 8), (2, 8), (4, 5)]  # which, targets read
    want = [8 * w + 1 + i for w, n in windows for i in range(n)]
    np.testing.assert_array_equal(targets, want)
    for enough in (160, 1000):  # of the first stream: all of both
        some = valid_batches(corpus, batch_size=2, seq_len=8, max_tokens=enough)
        assert_same(list(some), list(valid_batches(corpus, batch_size=2, seq_len=8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: choose at least 1"),
        ({"rows": [3, 4]}, r"rows=\[3, 4\]: choose some of the 4 rows of a batch"),
        ({"rows": []}, r"rows=\[\]: choose some of the 4 rows"),
        ({"seq_len": 0}, "seq_len=0: choose at least 1"),
        ({"seq_len": 161}, r"a window needs 162 tokens .* has 161: choose seq_len <= 160"),
    ],
)
def test_training_errors(make_corpus: MakeCorpus, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_batches(make_corpus(LENGTHS), **(SIZES | change))


def test_longest_possible_window(make_corpus: MakeCorpus) -> None:
    batch = next(train_batches(make_corpus(LENGTHS), batch_size=2, seq_len=160, seed=0))
    assert batch["tokens"].shape == (2, 160)


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"seq_len": 0}, {"max_tokens": 0}])
def test_valid_errors(make_corpus: MakeCorpus, change: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(change))}=0: choose at least 1"):
        valid_batches(make_corpus(LENGTHS), **({"batch_size": 2, "seq_len": 8} | change))
