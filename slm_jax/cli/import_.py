"""`slm import`: a model of someone else's as a folder that our commands read."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from slm_jax.cli.export import folder_sizes, kinds, size_rows
from slm_jax.cli.load import end_ids, load
from slm_jax.cli.measure import read_texts, score_text
from slm_jax.cli.script import parse
from slm_jax.cli.show import console, count, facts, nbytes
from slm_jax.errors import UserError
from slm_jax.evaluate import Subject
from slm_jax.export.gguf import Sizes, load_gguf, load_gguf_tokenizer
from slm_jax.models.hf import HFTokenizer, load_hf, save_hf
from slm_jax.models.lm import LM


@dataclass(frozen=True)
class Import:
    """Reads a .gguf file or a Hugging Face folder, writes float32 safetensors."""

    file: tyro.conf.Positional[Path]
    """A .gguf file of llama.cpp, or the folder of a Hugging Face model."""
    out: tyro.conf.Positional[Path]
    """Folder to write, in Hugging Face's form; `slm generate` continues texts with it."""
    tokenizer: bool = True
    """Write the tokenizer too."""
    overwrite: bool = False
    """Replace a model in `out`."""
    text: str | None = None
    """Text to measure the loss on, as in `slm train --data.source`; needs the tokenizer."""
    text_tokens: int = 8192
    """Most tokens of it."""

    def __post_init__(self) -> None:
        if self.text is not None and not self.tokenizer:
            raise UserError(
                "text with tokenizer=False: a text cannot be read without: leave it out"
            )


def command(args: Sequence[str]) -> None:
    """Reads, writes and reports."""
    config = parse(Import, args=args, prog="slm import")
    texts = None if config.text is None else read_texts(config.text)
    start = time.perf_counter()
    model, tokenizer, eos_ids, sizes = _load(config)
    read = time.perf_counter()
    save_hf(model, config.out, tokenizer=tokenizer, eos_ids=eos_ids, overwrite=config.overwrite)
    written = folder_sizes(model, config.out)
    rows = {
        "file": f"{config.file}, {sizes.arch}, {kinds(sizes)}",
        **size_rows(sizes),
        "model": f"{count(sizes.parameters)} parameters",
        "tokenizer": "left out" if tokenizer is None else f"{tokenizer.vocab_size:,} tokens",
        "out": f"{config.out}, {nbytes(written.nbytes)} in float32",
        "time": f"{read - start:.1f} s to read, {time.perf_counter() - read:.1f} s to write",
    }
    if texts is not None:
        subject = Subject(*load(config.out))
        score = score_text(subject, texts, config.text_tokens)
        rows |= {
            "loss": f"{score.nats:.4f} nats a token on {score.tokens:,} tokens (perplexity "
            f"{score.perplexity:.3f})",
            "bits a byte": f"{score.bits_per_byte:.4f}",
        }
    console().print(facts(rows))


def _load(config: Import) -> tuple[LM, HFTokenizer | None, tuple[int, ...], Sizes]:
    """The model; its tokenizer and what ends a text, if they are wanted; sizes of the source."""
    if config.file.is_dir():
        if not config.tokenizer:
            model = load_hf(config.file)
            return model, None, (), folder_sizes(model, config.file)
        model, tokenizer, _ = load(config.file)
        sizes = folder_sizes(model, config.file)
        return model, tokenizer, end_ids(config.file, tokenizer), sizes
    model, sizes = load_gguf(config.file)
    if not config.tokenizer:
        return model, None, (), sizes
    return model, load_gguf_tokenizer(config.file, model.config.vocab_size), (), sizes
