"""Files of questions to scores."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.evaluate import Item, Subject, read_items, score_items
from slm_jax.evaluate.questions import generate_until, joint, pair_span
from tests.evaluate.tiny import EOS, of_pair, subject, table

CHOICES = ["a dog", "cats", "x"]


def write(path: Path, records: list[dict], *, packed: bool = False) -> Path:
    data = "".join(json.dumps(r) + "\n" for r in records).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    return path


def ids(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize(
    ("record", "want"),
    [
        (
            {"query": "Q", "choices": ["a", "b"], "gold": 1, "subject": "s"},
            Item("choice", ("Q",), ("a", "b"), 1, "s"),
        ),
        (
            {"context_options": ["A b", "A c"], "continuation": "runs.", "gold": 0},
            Item("choice", ("A b", "A c"), ("runs.",), 0),
        ),
        (
            {"sentence_good": "I am.", "sentence_bad": "I is.", "UID": "verb", "pairID": "1"},
            Item("choice", ("",), ("I am.", "I is."), 0, "verb"),
        ),
        (
            {"context": "to be or", "continuation": "not"},
            Item("continuation", ("to be or",), ("not",)),
        ),
        (
            {"context": "Who?", "answer": "Me", "aliases": ["I"]},
            Item("generation", ("Who?",), ("Me", "I")),
        ),
        (
            {"input": "1+1", "target": "2", "task": "sums"},
            Item("generation", ("1+1",), ("2",), 0, "sums"),
        ),
    ],
)
def test_forms_are_read(tmp_path: Path, record: dict, want: Item) -> None:
    assert read_items(write(tmp_path / "x.jsonl.gz", [record], packed=True)) == [want]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "x.jsonl:2: invalid JSON"),
        ("[1]", "x.jsonl:2: a JSON list"),
        ('{"prompt": "a", "code": "b"}', "x.jsonl:2: fields prompt, code are no known form"),
        ('{"query": "a", "choices": ["b"], "gold": 1}', "x.jsonl:2: gold=1 is none of 1"),
        ('{"query": "a", "choices": ["b", 3], "gold": 0}', "x.jsonl:2: contexts and cont"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "x.jsonl:2: an option is empty"),
        ('{"query": "a", "choices": 7, "gold": 0}', "x.jsonl:2: a field has the wrong type"),
        ('{"query": "a", "choices": [], "gold": 0}', "x.jsonl:2: contexts and cont"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"context": "a", "continuation": "b"}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        read_items(path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.jsonl.gz", [{"context": "a", "continuation": "b"}], packed=True)
    whole.write_bytes(whole.read_bytes()[:-3])
    with pytest.raises(UserError, match="corrupt gzip"):
        read_items(whole)
    with pytest.raises(UserError, match="cannot be read"):
        read_items(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no question"):
        read_items(write(tmp_path / "empty.jsonl", []))


def test_choices_are_scored_as_the_harness_defines_it() -> None:
    items = [
        Item("choice", (f"Question {i}: ",), tuple(CHOICES), i % 3, f"g{i % 2}") for i in range(6)
    ]
    found = score_items(subject(), items, batch_tokens=64)
    acc, norm = [], []
    for item in items:
        context = ids(item.contexts[0].rstrip())
        scores = np.array([of_pair(context, ids(" " + choice)) for choice in CHOICES])
        acc.append(scores.argmax() == item.gold)
        norm.append((scores / [len(c) for c in CHOICES]).argmax() == item.gold)
    assert found.metrics == {"acc": np.mean(acc), "acc_norm": np.mean(norm)}
    assert found.stderr["acc"] == pytest.approx(np.std(acc, ddof=1) / np.sqrt(6))
    assert found.groups["g0"]["acc"] == np.mean(acc[::2])
    assert found.questions == 6


def test_length_decides_between_acc_and_acc_norm() -> None:
    """Options of equal text but for their length: the sum likes the short, the mean the long."""
    item = Item("choice", ("go",), ("a", "a" * 12), 1)
    short, long = (of_pair(ids("go"), ids(" " + c)) for c in item.continuations)
    assert short > long
    assert short < long / 12
    assert score_items(subject(), [item]).metrics == {"acc": 0.0, "acc_norm": 1.0}


def test_context_options_are_compared_by_the_shared_end() -> None:
    contexts = ("the cat", "a dog that was big")
    scores = [of_pair(ids(c), ids(" ran.")) for c in contexts]
    for gold in (0, 1):
        found = score_items(subject(), [Item("choice", contexts, ("ran.",), gold)])
        assert found.metrics["acc"] == float(np.argmax(scores) == gold)


def test_sentences_are_scored_from_an_end_of_text_on() -> None:
    scores = [of_pair([EOS], ids(s)) for s in ("I am.", "I is.")]
    found = score_items(subject(), [Item("choice", ("",), ("I am.", "I is."))])
    assert found.metrics["acc"] == float(scores[0] > scores[1])


def test_continuations_are_right_if_greedy() -> None:
    # A context after which the model would write a letter, and one after which another one.
    after = {c: int(table(ids(c))[-1].argmax()) for c in "abcdefghijklmnopqrstuvwxyz"}
    context, best = next((c, chr(i)) for c, i in after.items() if chr(i).isalnum() and i < 128)
    other = "!" if best != "!" else "?"
    for text, right in ((best, 1.0), (other, 0.0)):
        item = Item("continuation", (context,), (text,))
        found = score_items(subject(), [item], delimiter="")
        assert found.metrics["acc"] == right
        assert found.metrics["nats"] == pytest.approx(-of_pair(ids(context), ids(text)), rel=1e-5)


def test_white_space_goes_to_the_continuation() -> None:
    plain = subject()
    assert joint("a", "b", " ") == " "
    assert joint("a ", "b", " ") == joint("a", " b", " ") == joint("", "b", " ") == ""
    before, after = plain.encode_pair("a \n", "b")
    assert (before.tolist(), after.tolist()) == (ids("a"), ids(" \nb"))
    before, after = plain.encode_pair(" ", "b")
    assert (before.tolist(), after.tolist()) == ([EOS], ids(" b"))
    prefixed = Subject(plain.model, plain.tokenizer, np.array([7, 8], np.int32))
    assert prefixed.encode_pair("a", "b")[0].tolist() == [7, 8, *ids("a")]
    assert prefixed.encode_pair("", "b")[0].tolist() == [7, 8]


def test_what_is_too_long_loses_its_beginning() -> None:
    span = pair_span(subject(), "a" * 300, " end")
    assert len(span.tokens) == subject().model.config.max_seq_len + 1
    assert span.tokens[span.first :].tolist() == ids(" end")


def test_shots_stand_before_every_question() -> None:
    items = [Item("choice", (f"Q{i}:",), ("yes", "no"), i % 2) for i in range(3)]
    found = score_items(subject(), items, shots=1)
    assert found.questions == 2
    right = []
    for item in items[1:]:
        context = ids("Q0: yes\n\n" + item.contexts[0])
        scores = [of_pair(context, ids(" " + c)) for c in item.continuations]
        right.append(int(np.argmax(scores)) == item.gold)
    assert found.metrics["acc"] == np.mean(right)
    with pytest.raises(UserError, match="more questions than shots"):
        score_items(subject(), items, shots=3)


def test_answers_are_what_the_model_writes_up_to_a_stop() -> None:
    prompts = ["tell me", "and then"]
    texts = generate_until(subject(), prompts, max_new_tokens=6)
    for prompt, text in zip(prompts, texts, strict=True):
        row = ids(prompt)
        for _ in range(6):
            row.append(int(table(row)[-1].argmax()))
            if row[-1] == EOS:
                break
        assert text == subject().tokenizer.decode(row[len(prompt) :])
    stop = texts[0][2:4]
    cut = generate_until(subject(), prompts, max_new_tokens=6, stop=[stop])
    assert cut[0] == texts[0][: texts[0].index(stop)]

    right = Item("generation", (prompts[0],), ("?", texts[0].strip()))
    found = score_items(
        subject(), [right, Item("generation", (prompts[1],), ("wrong",))],
        max_new_tokens=6, stop=(), delimiter="",
    )  # fmt: skip
    assert found.metrics == {"exact_match": 0.5}
    with pytest.raises(UserError, match="leaves no room"):
        generate_until(subject(), prompts, max_new_tokens=256)
