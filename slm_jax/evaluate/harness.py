"""Our models in lm-evaluation-harness, which is installed apart: `pip install lm_eval`.

    import lm_eval
    from slm_jax.evaluate.harness import HarnessModel

    lm_eval.simple_evaluate(HarnessModel(subject), tasks=["my_task"], task_manager=...)

The harness fetches the data of its own tasks; tasks with local data name a file (`dataset_path:
json`, `dataset_kwargs: {data_files: {test: FILE}}`).
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from lm_eval.api.model import LM  # type: ignore[import-not-found, unused-ignore]

from slm_jax.errors import UserError
from slm_jax.evaluate.likelihood import Span, likelihoods
from slm_jax.evaluate.perplexity import windows
from slm_jax.evaluate.questions import generate_until, pair_span
from slm_jax.evaluate.subject import Subject

_MAX_NEW_TOKENS = 256


class HarnessModel(LM):  # type: ignore[misc, unused-ignore]
    """What the harness asks of a model, answered by one of ours.

    Contexts that are too long lose their beginning. Rolling likelihoods see each token once, after
    at most `max_seq_len` others, the first after the model's prefix or an end of text, as the
    harness's own models do.
    """

    def __init__(self, subject: Subject, *, batch_tokens: int = 4096) -> None:
        """Takes a model.

        Args:
            subject: the model.
            batch_tokens: see `likelihoods`.
        """
        super().__init__()
        self.subject = subject
        self.batch_tokens = batch_tokens

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Log p of each continuation after its context, and whether it is the greedy one."""
        spans = [pair_span(self.subject, *request.args) for request in requests]
        scores = likelihoods(self.subject.model, spans, batch_tokens=self.batch_tokens)
        return [(-score.nats, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log p of each text as a whole."""
        spans, owners = [], []
        window = self.subject.model.config.max_seq_len
        for i, request in enumerate(requests):
            (text,) = request.args
            ids = np.concatenate([self.subject.start, self.subject.tokenizer.encode(text)])
            if len(ids) > len(self.subject.start):
                of_text = list(windows(ids, window, window))
                # A prefix of several tokens is seen, not scored.
                of_text[0] = Span(of_text[0].tokens, len(self.subject.start))
                spans += of_text
                owners += [i] * len(of_text)
        out = [0.0] * len(requests)
        scores = likelihoods(self.subject.model, spans, batch_tokens=self.batch_tokens)
        for i, score in zip(owners, scores, strict=True):
            out[i] -= score.nats
        return out

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """The greedy continuation of each context, up to a stop text."""
        settings = [_settings(request.args[1]) for request in requests]
        out: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda i: settings[i])
        for (most, stop), group in groupby(order, key=lambda i: settings[i]):
            chosen = list(group)
            texts = generate_until(
                self.subject,
                [requests[i].args[0] for i in chosen],
                max_new_tokens=most,
                stop=stop,
                batch_tokens=self.batch_tokens,
            )
            out.update(zip(chosen, texts, strict=True))
        return [out[i] for i in range(len(requests))]


def _settings(given: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Most new tokens, and stop texts, of a request's `generation_kwargs`."""
    if given.get("do_sample") or given.get("temperature", 0.0) not in (0, 0.0, None):
        raise UserError(f"generation_kwargs={given}: answers are greedy: set do_sample to false")
    until = given.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    return int(given.get("max_gen_toks", _MAX_NEW_TOKENS)), stop
