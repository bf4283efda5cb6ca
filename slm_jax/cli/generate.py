"""`slm generate`: continues prompts with a trained model."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from slm_jax.cli.load import end_ids, load
from slm_jax.cli.script import parse
from slm_jax.errors import UserError
from slm_jax.infer import EarlyExit, RowText, Sampling, speculate, stream, unrolled
from slm_jax.models.lm import LM

# A model of bytes can draw any control character; a terminal would obey it.
_CONTROLS = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}


@dataclass(frozen=True)
class Generate:
    """Continues texts with a trained model: one as it is drawn, several one after another."""

    model: tyro.conf.Positional[Path]
    """Folder of a training run, of `slm quantize`, or of a Hugging Face model with its
    tokenizer.json."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; give it several times for several texts."""
    max_new_tokens: int = 200
    """Most tokens to add to each."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keeps the k likeliest tokens."""
    top_p: float | None = None
    """Keeps the fewest tokens that together have at least this probability."""
    min_p: float | None = None
    """Keeps tokens at least this times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, makes tokens that the text has less likely: divides their positive logits."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Ends a text before this string; give it several times for several strings. The model's own
    ends of text always count."""
    seed: int = 0
    """Source of the randomness; text i, from 0, is that of --seed SEED+i alone."""
    slots: int | None = None
    """Texts continued at a time: the next begins where one has ended. By default all."""
    cache: Literal["float32", "bfloat16", "int8"] | None = None
    """Type of the keys and values kept; by default the model's. int8 has a scale a token and
    head."""
    chunk: int = 512
    """Tokens of a prompt read at a time: bounds the memory that a long one takes."""
    draft: Path | None = None
    """Folder of a smaller model of the same tokenizer that drafts tokens (speculative decoding):
    the same distribution, fewer passes of the model."""
    draft_tokens: int = 4
    """Tokens drafted for each pass of the model."""
    exit_threshold: float | None = None
    """A token leaves out the layers above as soon as the likeliest next token leads the second by
    this much in probability; above 1 none does."""
    unroll: bool = False
    """Give each layer arrays of its own: a CPU is about twice as fast, once it has compiled for
    longer."""
    ema: bool = False
    """Use the average of the weights that the run kept."""
    repeats: int | None = None
    """Runs of the layers that a model with recursion repeats; default as in evaluation."""
    tolerance: float | None = None
    """With recursion: a token takes no more runs when one changes its state by less than this
    share, at most `repeats`."""

    def __post_init__(self) -> None:
        if not self.prompt or "" in self.prompt:
            raise UserError(f'prompt={self.prompt!r}: give a text to continue: --prompt "Once"')
        if "" in self.stop:
            raise UserError(f"stop={self.stop!r}: an empty text stops before it begins")
        for name in ("slots", "exit_threshold"):
            value = getattr(self, name)
            if self.draft is not None and value is not None:
                raise UserError(f"{name}={value} with a draft, which has none: leave one out")
        if self.unroll and self.exit_threshold is not None:
            raise UserError(
                f"unroll=True with exit_threshold={self.exit_threshold}: a token leaves a stack of "
                "layers early: leave one out"
            )


def command(args: Sequence[str]) -> None:
    """Loads the model, prints prompts and continuations, and to stderr how fast they came."""
    config = parse(Generate, args=args, prog="slm generate")
    sampling = Sampling(
        config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty
    )
    model, tokenizer, prefix = load(config.model, ema=config.ema)
    if config.repeats is not None or config.tolerance is not None:
        model = model.at_depth(config.repeats, config.tolerance)
    if config.unroll:
        model = unrolled(model)
    prompts = [np.concatenate([prefix, tokenizer.encode(text)]) for text in config.prompt]
    texts = [RowText(tokenizer, prompt, config.stop) for prompt in prompts]
    speed = _Speed()
    steps = _steps(
        model,
        config,
        speed,
        prompts=prompts,
        max_new_tokens=config.max_new_tokens,
        key=jax.vmap(jax.random.key)(config.seed + np.arange(len(prompts))),
        sampling=sampling,
        eos_id=end_ids(config.model, tokenizer),
        stop=lambda row, token: texts[row].push(token),
        cache_dtype=config.cache,
        chunk=config.chunk,
    )
    alone = len(prompts) == 1
    for n_tokens in steps:
        speed.add(n_tokens)
        if alone:
            _write(texts[0].take())
    for i, text in enumerate(texts):
        text.end()
        if not alone:
            _write(f"{'' if i == 0 else chr(10)}[{i + 1}]\n")
        _write(text.take() + "\n")
    print(speed.line(), file=sys.stderr)


def _steps(model: LM, config: Generate, speed: "_Speed", **options: Any) -> Iterator[int]:
    """Runs the model; how many tokens every step gave."""
    if config.draft is None:
        if config.exit_threshold is not None:
            speed.exits = EarlyExit(config.exit_threshold)
        for step in stream(model, slots=config.slots, early_exit=speed.exits, **options):
            yield int(np.sum(step >= 0))
        return
    draft, _, _ = load(config.draft)
    for turn in speculate(model, draft, n_draft=config.draft_tokens, **options):
        speed.drafted += turn.drafted
        speed.accepted += turn.accepted
        yield int(np.sum(turn.tokens >= 0))


class _Speed:
    """How fast tokens come."""

    def __init__(self) -> None:
        self.drafted = self.accepted = 0
        self.exits: EarlyExit | None = None
        self._first = self._rest = 0
        self._start = self._last = time.perf_counter()
        self._begun: float | None = None

    def add(self, n_tokens: int) -> None:
        """Counts the tokens of a step that has just come."""
        self._last = time.perf_counter()
        if self._begun is None:
            self._begun, self._first = self._last, n_tokens
        else:
            self._rest += n_tokens

    def line(self) -> str:
        """In words; programs are compiled before the first step comes."""
        assert self._begun is not None
        line = (
            f"{self._first + self._rest} tokens, the first after {self._begun - self._start:.1f} s"
        )
        if self._rest:
            line += f", then {self._rest / (self._last - self._begun):.1f} tokens/s"
        if self.drafted:
            line += f"; {self.accepted / self.drafted:.0%} of {self.drafted} drafted tokens stayed"
        if self.exits is not None and self.exits.tokens:
            line += f"; {self.exits.layers / self.exits.tokens:.1f} layers a token"
        return line


def _write(text: str) -> None:
    sys.stdout.write(text.translate(_CONTROLS))
    sys.stdout.flush()
