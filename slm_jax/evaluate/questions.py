"""Scores of questions: multiple choice, continuations, generated answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from slm_jax.errors import UserError
from slm_jax.evaluate.items import Item
from slm_jax.evaluate.likelihood import Span, likelihoods
from slm_jax.evaluate.subject import Subject
from slm_jax.infer import RowText, Sampling, generate

_BETWEEN_SHOTS = "\n\n"


@dataclass(frozen=True)
class TaskScore:
    """Share of questions answered right.

    Attributes:
        metrics: by name, from 0 to 1. choice: `acc`, by the sum of log p over an option, and
            `acc_norm`, by that sum over the option's characters. continuation: `acc`, the model
            would write it greedily, and `nats`, the mean of -log p a token. generation:
            `exact_match`.
        stderr: standard error of those that are means over questions.
        groups: by part of the collection, its metrics.
        questions: how many.
    """

    metrics: dict[str, float]
    stderr: dict[str, float]
    groups: dict[str, dict[str, float]]
    questions: int


def score_items(
    subject: Subject,
    items: Sequence[Item],
    *,
    delimiter: str = " ",
    shots: int = 0,
    limit: int | None = None,
    max_new_tokens: int = 32,
    stop: Sequence[str] = ("\n",),
    batch_tokens: int = 4096,
) -> TaskScore:
    """Answers questions of one kind.

    Args:
        subject: the model.
        items: of one kind.
        delimiter: between context and continuation, unless one of them brings white space there.
        shots: so many questions from the beginning stand before every other with their answers, and
            are not asked.
        limit: asks so many of the rest.
        max_new_tokens: most tokens of a generated answer.
        stop: texts that end one.
        batch_tokens: see `likelihoods`.

    Raises:
        UserError: if nothing is left to ask, or kinds are mixed.
    """
    kinds = {item.kind for item in items}
    asked = list(items[shots:] if limit is None else items[shots : shots + limit])
    if len(kinds) > 1 or shots < 0 or not asked:
        raise UserError(
            f"{len(items)} questions of kinds {', '.join(sorted(kinds))} with shots={shots}: give "
            "one kind, and more questions than shots"
        )
    before = "".join(
        context + joint(context, answer, delimiter) + answer + _BETWEEN_SHOTS
        for context, answer in (item.answered for item in items[:shots])
    )
    asked = [replace(i, contexts=tuple(before + c for c in i.contexts)) for i in asked]
    if asked[0].kind == "generation":
        rows = _exact_matches(subject, asked, delimiter, max_new_tokens, stop, batch_tokens)
    else:
        rows = _likeliest(subject, asked, delimiter, batch_tokens)
    return _summary(asked, rows)


def joint(context: str, continuation: str, delimiter: str) -> str:
    """What stands between the two: nothing where there is white space or no context."""
    bare = not context or context[-1:].isspace() or continuation[:1].isspace()
    return "" if bare else delimiter


def pair_span(subject: Subject, context: str, continuation: str) -> Span:
    """A continuation to be scored after its context, whose beginning goes if it is too long."""
    before, after = subject.encode_pair(context, continuation)
    if not len(after):
        raise UserError(f"continuation={continuation!r} has no tokens after its context")
    most = subject.model.config.max_seq_len + 1
    tokens = np.concatenate([before, after])[-most:]
    return Span(tokens, max(1, len(tokens) - len(after)))


def _likeliest(
    subject: Subject, items: Sequence[Item], delimiter: str, batch_tokens: int
) -> list[dict[str, float]]:
    pairs = [[(c, joint(c, a, delimiter) + a) for c, a in item.pairs] for item in items]
    spans = [pair_span(subject, *pair) for of_item in pairs for pair in of_item]
    scores = iter(likelihoods(subject.model, spans, batch_tokens=batch_tokens))
    rows = []
    for item in items:
        found = [next(scores) for _ in item.pairs]
        if item.kind == "continuation":
            rows.append({"acc": found[0].greedy, "nats": found[0].nats / found[0].tokens})
            continue
        nats = np.array([score.nats for score in found])
        characters = np.array([len(option) for _, option in item.pairs])
        best, best_norm = int(nats.argmin()), int((nats / characters).argmin())
        rows.append({"acc": best == item.gold, "acc_norm": best_norm == item.gold})
    return rows


def _exact_matches(
    subject: Subject,
    items: Sequence[Item],
    delimiter: str,
    max_new_tokens: int,
    stop: Sequence[str],
    batch_tokens: int,
) -> list[dict[str, float]]:
    prompts = []
    for item in items:
        (context,) = item.contexts
        # The space before an answer belongs to its first token.
        prompts.append((context + joint(context, "x", delimiter)).rstrip(" "))
    texts = generate_until(
        subject, prompts, max_new_tokens=max_new_tokens, stop=stop, batch_tokens=batch_tokens
    )
    return [
        {"exact_match": text.strip() in {answer.strip() for answer in item.continuations}}
        for item, text in zip(items, texts, strict=True)
    ]


def generate_until(
    subject: Subject,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_tokens: int = 4096,
) -> list[str]:
    """Continues every prompt greedily until one of the texts in `stop`, which is left out.

    A prompt that leaves no room for `max_new_tokens` within the model's `max_seq_len` loses its
    beginning.
    """
    room = subject.model.config.max_seq_len - max_new_tokens
    if room < 1:
        raise UserError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in max_seq_len="
            f"{subject.model.config.max_seq_len}: choose fewer"
        )
    rows = [subject.encode(prompt)[-room:] for prompt in prompts]
    texts = [RowText(subject.tokenizer, row, stop) for row in rows]
    longest = max(map(len, rows)) + max_new_tokens
    generate(
        subject.model,
        rows,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=0.0),
        eos_id=subject.tokenizer.eos_id,
        key=jax.random.key(0),
        stop=lambda row, token: texts[row].push(token),
        slots=max(1, batch_tokens // longest),
    )
    return [_continuation(subject, row, text) for row, text in zip(rows, texts, strict=True)]


def _continuation(subject: Subject, row: np.ndarray, text: RowText) -> str:
    text.end()
    return text.take()[len(subject.tokenizer.decode(row)) :]


def _summary(items: Sequence[Item], rows: list[dict[str, float]]) -> TaskScore:
    def means(chosen: list[dict[str, float]]) -> dict[str, float]:
        return {name: float(np.mean([row[name] for row in chosen])) for name in chosen[0]}

    groups: dict[str, list[dict[str, float]]] = {}
    for item, row in zip(items, rows, strict=True):
        groups.setdefault(item.group, []).append(row)
    n = len(rows)
    spread = {name: float(np.std([float(row[name]) for row in rows])) for name in rows[0]}
    return TaskScore(
        means(rows),
        {name: s / math.sqrt(n - 1) for name, s in spread.items()} if n > 1 else {},
        {name: means(group) for name, group in groups.items()} if len(groups) > 1 else {},
        n,
    )
