"""Tokenizers: bytes, and byte-pair encoding through the `tokenizers` library.

A tokenizer never puts an end of text into what it encodes, not even where the text spells the name
of one: only `slm_jax.data.cache` ends documents, so a text cannot forge a document boundary.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from slm_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# What well-known tokenizers call the token that ends a document, most specific first.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def name(self) -> str:
        """Short name for logs."""

    @property
    def vocab_size(self) -> int:
        """Number of ids: every id is in [0, vocab_size)."""

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what defines the tokenizer: equal fingerprints give equal ids."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 [n], without an end of text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` [n]; ends of text are left out, broken UTF-8 becomes U+FFFD."""

    def to_json(self) -> str:
        """The text of a tokenizer.json that gives the same ids, for the `tokenizers` library."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as ids 0..255 and 256 for the end of text."""

    name: str = dataclasses.field(default="byte", init=False)
    vocab_size: int = dataclasses.field(default=257, init=False)
    eos_id: int = dataclasses.field(default=256, init=False)

    @property
    def fingerprint(self) -> str:
        """sha256 of the definition above."""
        return hashlib.sha256(b"slm_jax byte tokenizer: ids 0-255 bytes, 256 end").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Bytes of `text` as int32 [n_bytes]; UserError if it has no UTF-8 form."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` [n]; 256 is left out, broken UTF-8 becomes U+FFFD."""
        ids = _checked_ids(ids, self.vocab_size)
        return ids[ids != self.eos_id].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """A byte-level BPE without merges: every byte is a token."""
        # GPT-2's names of the bytes: printable ones are themselves, the rest follow from U+0100.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [byte for byte in range(256) if byte not in printable]
        names = {chr(byte): byte for byte in printable}
        names |= {chr(256 + i): byte for i, byte in enumerate(rest)}
        vocab = names | {END_OF_TEXT: self.eos_id}
        inner = _byte_level(tokenizers.models.BPE(vocab, []))
        inner.add_special_tokens([END_OF_TEXT])
        return inner.to_str()


class BPETokenizer:
    """A `tokenizers.Tokenizer` with a known end of text."""

    def __init__(self, inner: tokenizers.Tokenizer, *, name: str, fingerprint: str):
        """Takes over `inner`; UserError if none of its tokens is a known end of text."""
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True  # "<|endoftext|>" in a text is text (module docstring)
        vocab = inner.get_vocab(with_added_tokens=True)
        eos = next((vocab[end] for end in _END_NAMES if end in vocab), None)
        if eos is None:
            raise UserError(f"{name}: no end-of-text token: add one of {', '.join(_END_NAMES)}")
        self._inner = inner
        self.name = name
        self.fingerprint = fingerprint
        self.eos_id = int(eos)
        self.vocab_size = max(vocab.values()) + 1  # ids may have gaps

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 [n]; UserError if it has no UTF-8 form."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text, on all cores."""
        for text in texts:
            _utf8(text)
        out = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in out]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` [n]; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        ids = _checked_ids(ids, self.vocab_size)
        return self._inner.decode(ids.tolist(), skip_special_tokens=True)

    def to_json(self) -> str:
        """As the `tokenizers` library writes it."""
        return self._inner.to_str()


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
      spec: "byte"; "gpt2:DIR", a folder with GPT-2's encoder.json and vocab.bpe (each plain or
        .gz, with or without the prefix "gpt2_"); or the path of a tokenizer.json.

    Raises:
      UserError: unknown spec, missing or broken file, no end-of-text token.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec.startswith("gpt2:"):
        return _load_gpt2(Path(spec.removeprefix("gpt2:")).expanduser())
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(
            f'tokenizer={spec!r}: not "byte", not "gpt2:DIR" and no such tokenizer.json: '
            "check the path"
        )
    definition = _read_json(path)
    try:
        inner = tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json ({_one_line(error)})") from error
    # How long or padded a text may be does not define the tokenizer: both are switched off.
    definition = {k: v for k, v in definition.items() if k not in ("truncation", "padding")}
    return BPETokenizer(inner, name=path.name, fingerprint=_sha256_json(definition))


def train_bpe(texts: Iterable[str], vocab_size: int, out: str | Path) -> BPETokenizer:
    """Trains a byte-level BPE tokenizer with GPT-2's pre-tokenizer and writes it.

    Args:
      texts: the training documents; read once.
      vocab_size: ids in all: end of text (id 0), 256 bytes, then merges. At least 257.
      out: the tokenizer.json to write.

    Returns:
      The tokenizer read back from `out`.

    Raises:
      UserError: `vocab_size` below 257, or more than the texts have merges for.
    """
    if vocab_size < 257:
        raise UserError(
            f"vocab_size={vocab_size} has no room for 256 bytes and the end of text: "
            "choose at least 257"
        )
    inner = _byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    if inner.get_vocab_size() != vocab_size:
        raise UserError(
            f"vocab_size={vocab_size}: the texts have merges for only "
            f"{inner.get_vocab_size()}: choose that or give more text"
        )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(inner.to_str(), encoding="utf-8")
    temporary.replace(out)
    tokenizer = load_tokenizer(str(out))
    assert isinstance(tokenizer, BPETokenizer)
    return tokenizer


def _byte_level(model: Any) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return inner


def _load_gpt2(folder: Path) -> BPETokenizer:
    vocab_path, merges_path = _find(folder, "encoder.json"), _find(folder, "vocab.bpe")
    vocab = _read_json(vocab_path)
    lines = _read_bytes(merges_path).decode("utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if END_OF_TEXT not in vocab:
        raise UserError(f"{vocab_path}: no {END_OF_TEXT}: take GPT-2's own encoder.json")
    try:
        merges = [(left, right) for left, right in pairs]
        inner = _byte_level(tokenizers.models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{merges_path}: does not fit {vocab_path.name} ({_one_line(error)}): "
            "take both files from one place"
        ) from error
    inner.add_special_tokens([END_OF_TEXT])
    fingerprint = _sha256_json({"kind": "gpt2", "vocab": vocab, "merges": merges})
    return BPETokenizer(inner, name="gpt2", fingerprint=fingerprint)


def _find(folder: Path, name: str) -> Path:
    for candidate in (name, f"{name}.gz", f"gpt2_{name}", f"gpt2_{name}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise UserError(
        f"tokenizer=gpt2:{folder}: no {name} or {name}.gz in that folder: "
        "put GPT-2's encoder.json and vocab.bpe there"
    )


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}): copy it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read_bytes(path))
    except ValueError as error:  # UserError is one too: it keeps its own text
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not JSON ({_one_line(error)}): copy it again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a JSON {type(data).__name__}, not an object")
    return data


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text has no UTF-8 form at character {error.start} (a lone surrogate): remove it"
        ) from error


def _checked_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    array = np.asarray(ids, np.int64)
    if array.size and not (array.min() >= 0 and array.max() < vocab_size):
        bad = array[(array < 0) | (array >= vocab_size)][0]
        raise UserError(f"token id {bad} is not in [0, {vocab_size}): another tokenizer made it")
    return array


def _one_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
