"""Texts to nats: batching, windows, bits a byte."""

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.evaluate import Span, Subject, likelihoods, perplexity
from slm_jax.evaluate.perplexity import windows
from tests.evaluate.tiny import log_p, subject, table

TEXT = "It was the best of times, it was the worst of times: naïve."


def test_batches_of_any_lengths_give_the_plain_numbers() -> None:
    draw = np.random.RandomState(0).randint
    rows = [draw(0, 256, n).tolist() for n in (2, 33, 34, 5, 33, 40)]
    spans = [Span(np.array(row), max(1, len(row) // 2)) for row in rows]
    found = likelihoods(subject().model, spans, batch_tokens=64)  # two short rows, one long
    for row, span, score in zip(rows, spans, found, strict=True):
        want = log_p(row)[span.first - 1 :]
        assert score.tokens == len(want)
        assert score.nats == pytest.approx(-want.sum(), rel=1e-5)


def test_greedy_is_what_the_model_would_write() -> None:
    model, start = subject().model, [77, 3]
    row = list(start)
    for _ in range(4):
        row.append(int(table(row)[-1].argmax()))
    other = [*row[:-1], (row[-1] + 1) % 256]
    found = likelihoods(model, [Span(np.array(row), 2), Span(np.array(other), 2)])
    assert [score.greedy for score in found] == [True, False]


@pytest.mark.parametrize(("window", "stride"), [(7, 7), (7, 3), (7, 1), (40, 9), (12, 12)])
def test_windows_score_every_token_once_with_enough_before_it(window: int, stride: int) -> None:
    tokens = np.arange(25)
    seen = []
    for span in windows(tokens, window, stride):
        assert len(span.tokens) <= window + 1
        scored = span.tokens[span.first :]
        np.testing.assert_array_equal(span.tokens, np.arange(span.tokens[0], scored[-1] + 1))
        for token in scored:  # tokens are their own places
            assert token - span.tokens[0] >= min(token, window - stride + 1)
        seen += scored.tolist()
    assert seen == list(range(1, 25))


def test_perplexity_is_the_mean_over_the_text() -> None:
    ids = list(TEXT.encode())
    score = perplexity(subject(), [TEXT], window=200)
    assert score.tokens == len(ids) - 1
    assert score.nats == pytest.approx(-log_p(ids).mean(), rel=1e-5)
    assert score.perplexity == pytest.approx(np.exp(score.nats))
    bits = -log_p(ids).sum() / np.log(2) / len(ids)
    assert score.bits_per_byte == pytest.approx(bits, rel=1e-5)

    narrow = perplexity(subject(), [TEXT], window=16, stride=4)
    want = [log_p(list(s.tokens))[s.first - 1 :] for s in windows(np.array(ids), 16, 4)]
    assert narrow.nats == pytest.approx(-np.concatenate(want).mean(), rel=1e-5)


def test_texts_are_apart_and_the_budget_ends_them() -> None:
    one, two = TEXT[:20], TEXT[20:]
    both = perplexity(subject(), [one, "", two], window=200)
    alone = [perplexity(subject(), [text], window=200) for text in (one, two)]
    assert both.tokens == sum(s.tokens for s in alone)
    assert both.bytes == len(TEXT.encode())
    assert both.nats * both.tokens == pytest.approx(sum(s.nats * s.tokens for s in alone), rel=1e-6)
    cut = perplexity(subject(), [one, two], window=200, max_tokens=10)
    assert (cut.tokens, cut.bytes) == (10, 11)
    assert cut.nats == pytest.approx(-log_p(list(one.encode())[:11]).mean(), rel=1e-5)


def test_a_prefix_is_seen_and_the_first_token_scored() -> None:
    plain = subject()
    with_prefix = Subject(plain.model, plain.tokenizer, np.array([9], np.int32))
    score = perplexity(with_prefix, [TEXT], window=200)
    assert score.tokens == len(TEXT.encode())
    assert score.nats == pytest.approx(-log_p([9, *TEXT.encode()]).mean(), rel=1e-5)


def test_mistakes_are_named() -> None:
    for changes, message in (
        ({"stride": 9, "window": 8}, "stride=9, window=8"),
        ({"stride": 0}, "stride=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ):
        with pytest.raises(UserError, match=message):
            perplexity(subject(), [TEXT], **changes)
    with pytest.raises(UserError, match="nothing to score"):
        perplexity(subject(), ["", "a"])
    with pytest.raises(UserError, match="first=0"):
        likelihoods(subject().model, [Span(np.array([1, 2]), 0)])
    with pytest.raises(UserError, match="outside vocab_size=257"):
        likelihoods(subject().model, [Span(np.array([1, 257]), 1)])
