"""`slm generate`: continues prompts with a trained model."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from slm_jax.cli.load import load
from slm_jax.cli.script import parse
from slm_jax.data import Tokenizer
from slm_jax.errors import UserError
from slm_jax.infer import Sampling, generate, stream

# What an unfinished character decodes to: at most three bytes, one replacement each at worst.
_UNFINISHED, _MOST_UNFINISHED = "\ufffd", 3
# A model of bytes can draw any control character; a terminal would obey it.
_CONTROLS = {i: _UNFINISHED for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}


@dataclass(frozen=True)
class Generate:
    """Continues texts with a trained model: one as it is drawn, several one after another."""

    model: tyro.conf.Positional[Path]
    """Folder of a training run, of `slm quantize`, or of a Hugging Face model with its
    tokenizer.json."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; give it several times for several texts."""
    max_new_tokens: int = 200
    """Most tokens to add."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keeps the k likeliest tokens."""
    top_p: float | None = None
    """Keeps the fewest tokens that together have at least this probability."""
    seed: int = 0
    """Source of the randomness."""
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


def command(args: Sequence[str]) -> None:
    """Loads the model and prints prompts and continuations."""
    config = parse(Generate, args=args, prog="slm generate")
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    model, tokenizer, prefix = load(config.model, ema=config.ema)
    if config.repeats is not None or config.tolerance is not None:
        model = model.at_depth(config.repeats, config.tolerance)
    prompts = [np.concatenate([prefix, tokenizer.encode(text)]) for text in config.prompt]
    limit, key = config.max_new_tokens, jax.random.key(config.seed)
    eos = tokenizer.eos_id
    if len(prompts) == 1:
        tokens = stream(
            model, prompts, max_new_tokens=limit, sampling=sampling, eos_id=eos, key=key
        )
        _write(text_pieces(tokenizer, prompts[0], (int(row[0]) for row in tokens)))
        return
    drawn = generate(model, prompts, max_new_tokens=limit, sampling=sampling, eos_id=eos, key=key)
    for i, (prompt, row) in enumerate(zip(prompts, drawn, strict=True)):
        print(f"{'' if i == 0 else chr(10)}[{i + 1}]")
        _write(text_pieces(tokenizer, prompt, row.tolist()))


def text_pieces(tokenizer: Tokenizer, prompt: np.ndarray, tokens: Iterable[int]) -> Iterator[str]:
    """The text of `prompt`, then of every token as soon as it is certain.

    The pieces add up to `tokenizer.decode` of everything: the bytes of an unfinished character are
    held back until it is complete or cannot be. An id that the tokenizer does not have, where the
    model's vocabulary is larger, shows as U+FFFD.

    Args:
        tokenizer: decodes.
        prompt: `[n]` token ids.
        tokens: what follows, one id at a time.
    """
    ids, shown = prompt.tolist(), 0
    text = tokenizer.decode(ids)
    yield text
    shown = len(text)
    for token in tokens:
        if token >= tokenizer.vocab_size:
            yield tokenizer.decode(ids)[shown:] + _UNFINISHED
            ids, shown = [], 0
            continue
        ids.append(token)
        text = tokenizer.decode(ids)
        tail = text[-_MOST_UNFINISHED:]
        certain = len(text) - (len(tail) - len(tail.rstrip(_UNFINISHED)))
        if certain > shown:
            yield text[shown:certain]
            shown = certain
    yield tokenizer.decode(ids)[shown:]


def _write(pieces: Iterable[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece.translate(_CONTROLS))
        sys.stdout.flush()
    sys.stdout.write("\n")
