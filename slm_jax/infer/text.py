"""Text from tokens as they come: whole characters only, and none of a stop string."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

# What an unfinished character decodes to: at most three bytes, one replacement each at worst.
_UNFINISHED, _MOST_UNFINISHED = "\ufffd", 3


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` [n]."""


class RowText:
    """The text of one row: its prompt, and what follows as soon as it is certain.

    The pieces add up to `tokenizer.decode` of everything: the bytes of an unfinished character are
    held back until it is complete or cannot be, and so is what may be the beginning of a stop
    string. The text ends before the first of them that the continuation spells, in however many
    tokens. An id that the tokenizer does not have, where the model's vocabulary is larger, shows as
    U+FFFD.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Decoder, prompt: np.ndarray, stop: Sequence[str] = ()) -> None:
        """Begins with the prompt, `[n]` token ids."""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = prompt.tolist()
        self._before = ""  # text of what is no longer in `_ids`
        self._text = tokenizer.decode(self._ids)
        self._begin = self._certain = len(self._text)
        self._taken = 0

    def push(self, token: int) -> bool:
        """Takes the next token; whether the row has stopped, with this one or before."""
        if self.stopped:
            return True
        if token < self._tokenizer.vocab_size:
            self._ids.append(token)
            self._text = self._before + self._tokenizer.decode(self._ids)
            tail = self._text[-_MOST_UNFINISHED:]
            self._settle(len(self._text) - (len(tail) - len(tail.rstrip(_UNFINISHED))))
        else:
            self._before = self._text = self._text + _UNFINISHED
            self._ids = []
            self._settle(len(self._text))
        return self.stopped

    def end(self) -> None:
        """No token will follow: what was held back is certain now."""
        if not self.stopped:
            self._settle(len(self._text))
            self._certain = self._certain if self.stopped else len(self._text)

    def take(self) -> str:
        """The text that has become certain since the last call, at first with the prompt's."""
        piece = self._text[self._taken : self._certain]
        self._taken = max(self._taken, self._certain)
        return piece

    def _settle(self, certain: int) -> None:
        """Makes the text certain up to here, or to where a stop string is or may be."""
        found = [self._text.find(stop, self._begin, certain) for stop in self._stop]
        if any(at >= 0 for at in found):
            self._certain, self.stopped = min(at for at in found if at >= 0), True
            return
        new = self._text[self._begin : certain]
        held = [n for stop in self._stop for n in range(1, len(stop)) if new.endswith(stop[:n])]
        self._certain = max(self._certain, certain - max(held, default=0))
