"""Files of questions, a JSON object a line, in the forms that public collections have."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slm_jax.errors import UserError

Kind = Literal["choice", "continuation", "generation"]


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        kind: choice: which continuation is likeliest. continuation: is the one continuation what
            the model would write. generation: is what it writes one of the continuations.
        contexts: one for all, or one a continuation.
        continuations: the options or answers.
        gold: index of the right option; 0 where there are none.
        group: part of the collection that it belongs to, or empty.
    """

    kind: Kind
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int = 0
    group: str = ""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """A context and a continuation for each option."""
        n = max(len(self.contexts), len(self.continuations))
        contexts = self.contexts * (n // len(self.contexts))
        return list(zip(contexts, self.continuations * (n // len(self.continuations)), strict=True))

    @property
    def answered(self) -> tuple[str, str]:
        """Context and right continuation."""
        return self.pairs[self.gold]


def _choice(r: dict[str, Any]) -> Item:
    return Item("choice", (r["query"],), tuple(r["choices"]), r["gold"])


def _context_options(r: dict[str, Any]) -> Item:
    return Item("choice", tuple(r["context_options"]), (r["continuation"],), r["gold"])


def _minimal_pair(r: dict[str, Any]) -> Item:
    return Item("choice", ("",), (r["sentence_good"], r["sentence_bad"]))


def _continuation(r: dict[str, Any]) -> Item:
    return Item("continuation", (r["context"],), (r["continuation"],))


def _answer(r: dict[str, Any]) -> Item:
    return Item("generation", (r["context"],), (r["answer"], *r.get("aliases", ())))


def _target(r: dict[str, Any]) -> Item:
    return Item("generation", (r["input"],), (r["target"],))


# Fields that tell a form, and its reader. Sources: MosaicML's llm-foundry (the first four), BLiMP
# (arXiv 1912.00582), BIG-Bench Hard (arXiv 2210.09261).
FORMS: dict[tuple[str, ...], Callable[[dict[str, Any]], Item]] = {
    ("query", "choices", "gold"): _choice,
    ("context_options", "continuation", "gold"): _context_options,
    ("context", "continuation"): _continuation,
    ("context", "answer"): _answer,
    ("sentence_good", "sentence_bad"): _minimal_pair,
    ("input", "target"): _target,
}
# Fields that name a part of a collection: MMLU's, BIG-Bench Hard's, BLiMP's.
_GROUPS = ("subject", "task", "UID")


def read_items(path: str | Path) -> list[Item]:
    """Reads a .jsonl or .jsonl.gz file whose lines have one of `FORMS`.

    Raises:
        UserError: if the file cannot be read, or a line is no such object; names the line.
    """
    items = [_item(line, f"{path}:{n}") for n, line in _lines(Path(path)) if line.strip()]
    if not items:
        raise UserError(f"task={path} holds no question: give a file with a JSON object a line")
    return items


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from enumerate(file, 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: corrupt gzip ({error}): copy it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the path") from error


def _item(line: bytes, where: str) -> Item:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: invalid JSON ({error}): mend or remove the line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, not an object with fields")
    for fields, read in FORMS.items():
        if set(fields) <= set(record):
            item = _checked(read, record, where)
            group = next((str(record[name]) for name in _GROUPS if name in record), "")
            return Item(item.kind, item.contexts, item.continuations, item.gold, group)
    forms = "; ".join(", ".join(fields) for fields in FORMS)
    raise UserError(f"{where}: fields {', '.join(record)} are no known form: give one of {forms}")


def _checked(read: Callable[[dict[str, Any]], Item], record: dict[str, Any], where: str) -> Item:
    try:
        item = read(record)
    except TypeError as error:
        raise UserError(f"{where}: a field has the wrong type ({error}): mend the line") from error
    texts = (*item.contexts, *item.continuations)
    if not all(isinstance(text, str) for text in texts) or not item.continuations:
        raise UserError(f"{where}: contexts and continuations must be texts: mend the line")
    if item.kind == "choice" and "" in item.continuations:
        raise UserError(f"{where}: an option is empty: mend the line")
    options = len(item.pairs)
    if not isinstance(item.gold, int) or not 0 <= item.gold < options:
        raise UserError(f"{where}: gold={item.gold!r} is none of {options} options: mend the line")
    return item
