"""The model that is evaluated, with its tokenizer."""

from dataclasses import dataclass, field

import numpy as np

from slm_jax.data import Tokenizer
from slm_jax.models.lm import LM


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and how it reads text.

    Attributes:
        model: the language model.
        tokenizer: that it was trained with.
        prefix: token ids that it expects before every text, `[n]` int32.
    """

    model: LM
    tokenizer: Tokenizer
    prefix: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def start(self) -> np.ndarray:
        """Ids before a text whose first token is to be scored: the prefix, or an end of text."""
        return self.prefix if len(self.prefix) else np.array([self.tokenizer.eos_id], np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text that a model is to go on from, the prefix first; never empty."""
        ids = self.tokenizer.encode(text) if text else np.zeros(0, np.int32)
        return np.concatenate([self.prefix if len(ids) else self.start, ids])

    def encode_pair(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a context and of what follows it, split where lm-evaluation-harness splits them.

        Both are encoded together, and the context alone says how many ids are its own. Spaces at
        its end go to the continuation: tokenizers put a space before a word.
        """
        bare = context.rstrip()
        context, continuation = bare, context[len(bare) :] + continuation
        if not context:
            return self.start, self.tokenizer.encode(continuation)
        whole = self.tokenizer.encode(context + continuation)
        n = len(self.tokenizer.encode(context))
        return np.concatenate([self.prefix, whole[:n]]), whole[n:]
