"""What a language model is worth: perplexity, multiple choice, generated answers.

    scores = perplexity(model, tokenizer, ["a text", "another"], window=512, stride=256)
    items = read_items(Path("arc_easy.jsonl.gz"))
    scores = score_items(Subject(model, tokenizer), items)

Read in this order: likelihood.py (tokens to nats), perplexity.py (texts), items.py (files of
questions), questions.py (their scores), report.py. harness.py lets lm-evaluation-harness, which is
not installed with this project, run our models.
"""

from slm_jax.evaluate.items import Item, read_items
from slm_jax.evaluate.likelihood import Likelihood, Span, likelihoods
from slm_jax.evaluate.perplexity import TextScore, perplexity
from slm_jax.evaluate.questions import TaskScore, score_items
from slm_jax.evaluate.report import write_report
from slm_jax.evaluate.subject import Subject

__all__ = [
    "Item",
    "Likelihood",
    "Span",
    "Subject",
    "TaskScore",
    "TextScore",
    "likelihoods",
    "perplexity",
    "read_items",
    "score_items",
    "write_report",
]
