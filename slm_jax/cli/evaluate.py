"""`slm evaluate`: a trained model's perplexity on texts and its score on questions."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from slm_jax.cli.load import load
from slm_jax.cli.measure import read_texts
from slm_jax.cli.script import parse
from slm_jax.cli.show import console, count, facts
from slm_jax.compress import size
from slm_jax.errors import UserError
from slm_jax.evaluate import (
    Subject,
    TaskScore,
    TextScore,
    perplexity,
    read_items,
    score_items,
    write_report,
)


@dataclass(frozen=True)
class Evaluate:
    """Measures a trained model on texts and questions; writes one report, JSON and Markdown."""

    model: tyro.conf.Positional[Path]
    """Folder of a training run, of `slm quantize`, or of a Hugging Face model with its
    tokenizer.json."""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to measure perplexity and bits a byte on, as in `slm train --data.source`, but all of
    it; give it several times for several."""
    task: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """File of questions, .jsonl or .jsonl.gz: multiple choice (query, choices, gold), Winograd
    (context_options, continuation, gold), minimal pairs (sentence_good, sentence_bad), LAMBADA
    (context, continuation), open answers (context, answer or input, target)."""
    out: Path | None = None
    """Folder of evaluation.json and evaluation.md; default runs/evaluation/MODEL."""
    window: int | None = None
    """Tokens that a prediction sees at most; default the model's length."""
    stride: int | None = None
    """Tokens that a window scores; default all. Less shows each token more of the text before."""
    max_tokens: int | None = None
    """Tokens of each text to score; default all."""
    limit: int | None = None
    """Questions of each file to ask; default all."""
    shots: int = 0
    """Questions from the beginning of a file to put before every other, with their answers."""
    delimiter: str = " "
    """Between a context and what follows, where neither has white space there; \\n is a new line
    ("\\nAnswer: " for bare questions)."""
    max_new_tokens: int = 32
    """Most tokens of an open answer, which a new line ends."""
    ema: bool = False
    """Use the average of the weights that the run kept."""

    def __post_init__(self) -> None:
        if not self.text and not self.task:
            raise UserError("text=(), task=(): nothing to measure: give --text FILE or --task FILE")
        names = [_name(path) for path in self.task]
        if len(set(names)) < len(names):
            raise UserError(f"task={', '.join(names)}: two files of one name: rename one")
        for name in ("max_tokens", "limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")


def command(args: Sequence[str]) -> None:
    """Measures, writes the report and prints it."""
    config = parse(Evaluate, args=args, prog="slm evaluate")
    texts = {source: read_texts(source) for source in config.text}
    tasks = {_name(path): read_items(path) for path in config.task}
    subject = Subject(*load(config.model, ema=config.ema))
    start = time.perf_counter()
    text_scores = {
        source: perplexity(
            subject, found, window=config.window, stride=config.stride, max_tokens=config.max_tokens
        )
        for source, found in texts.items()
    }
    task_scores = {
        name: score_items(
            subject,
            items,
            delimiter=config.delimiter.replace("\\n", "\n"),
            shots=config.shots,
            limit=config.limit,
            max_new_tokens=config.max_new_tokens,
        )
        for name, items in tasks.items()
    }
    weighs = size(subject.model)
    about = {
        "model": str(config.model),
        "parameters": weighs.parameters,
        "bits per weight": round(weighs.bits_per_weight, 3),
        "shots": config.shots,
        "delimiter": config.delimiter,
        "seconds": round(time.perf_counter() - start, 1),
    }
    out = config.out or Path("runs") / "evaluation" / config.model.absolute().name
    write_report(out, about=about, texts=text_scores, tasks=task_scores)
    _print(config, about, text_scores, task_scores, out)


def _print(
    config: Evaluate,
    about: dict[str, object],
    texts: dict[str, TextScore],
    tasks: dict[str, TaskScore],
    out: Path,
) -> None:
    parameters = count(float(str(about["parameters"])))
    bits = about["bits per weight"]
    rows = {"model": f"{config.model}, {parameters} parameters, {bits} bits each"}
    for name, text in texts.items():
        rows[name] = (
            f"perplexity {text.perplexity:.3f}, {text.nats:.4f} nats a token, "
            f"{text.bits_per_byte:.4f} bits a byte, {text.tokens:,} tokens"
        )
    for name, task in tasks.items():
        found = [
            f"{metric} {value:.3f}"
            + (f" ± {task.stderr[metric]:.3f}" if metric in task.stderr else "")
            for metric, value in task.metrics.items()
        ]
        rows[name] = f"{', '.join(found)}, {task.questions:,} questions"
    rows["time"], rows["out"] = f"{about['seconds']} s", str(out)
    console().print(facts(rows))


def _name(path: Path) -> str:
    """`arc_easy.dev` of `arc_easy.dev.jsonl.gz`."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")
