"""From a configuration to a corpus: tokenised training and held-out streams."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence

from slm_jax.data.cache import Stream, token_streams
from slm_jax.data.sources import open_source
from slm_jax.data.tokenizer import Tokenizer, load_tokenizer
from slm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    source: str = "tinyshakespeare"
    """Bundled corpus (tinyshakespeare), python-stdlib (the .py files of Python itself), a .txt,
    .txt.gz, .jsonl or .jsonl.gz file, a folder of them, or tfds:NAME."""
    mixture: tuple[tuple[str, float], ...] = ()
    """Sources with weights (shares of the training rows) in place of the one source."""
    text_field: str = "text"
    """Field that holds the text of JSON lines and of TFDS examples."""
    tokenizer: str = "byte"
    """byte, gpt2:DIR (encoder.json and vocab.bpe in DIR) or the path of a tokenizer.json."""
    valid_fraction: float = 0.1
    """Share of the documents to hold out; of the bytes, if there is one document."""
    cache_dir: str | None = None
    """Where tokens are kept; default: SLM_JAX_CACHE or ~/.cache/slm_jax."""


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised text of one source, or of several in given shares.

    Attributes:
      name: the sources, for logs.
      tokenizer: what made the tokens.
      train: one stream a source.
      valid: the held-out stream of each source.
      weights: share of the training rows that comes from each source; sums to 1.
    """

    name: str
    tokenizer: Tokenizer
    train: tuple[Stream, ...]
    valid: tuple[Stream, ...]
    weights: tuple[float, ...]

    @property
    def n_train_tokens(self) -> int:
        """Tokens of all training streams, ends of text included."""
        return sum(len(stream.tokens) for stream in self.train)

    @property
    def n_valid_tokens(self) -> int:
        """Tokens of all held-out streams, ends of text included."""
        return sum(len(stream.tokens) for stream in self.valid)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the held-out text a target that counts.

        A document of n tokens and its end of text has n targets: the first token has nothing
        before it, the end of text is predicted instead. So this is bytes over tokens without ends
        of text (1 for bytes), and mean loss a target / bytes_per_token is the loss a byte.
        """
        return sum(s.text_bytes for s in self.valid) / sum(s.n_targets for s in self.valid)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of tokenizer, tokens and weights: equal values give equal batches."""
        parts = [
            self.tokenizer.fingerprint,
            [[stream.fingerprint for stream in streams] for streams in (self.train, self.valid)],
            self.weights,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_data(cfg: DataConfig) -> Corpus:
    """Opens what `cfg` names; tokenises it unless the cache has it.

    Raises:
      UserError: unknown or broken source or tokenizer, empty text, bad fraction or weights.
    """
    if not 0 < cfg.valid_fraction < 1:
        raise UserError(f"valid_fraction={cfg.valid_fraction}: choose a share between 0 and 1")
    if not cfg.mixture:
        return _open_one(cfg, cfg.source, load_tokenizer(cfg.tokenizer))
    if cfg.source != DataConfig.source:
        raise UserError(
            f"source={cfg.source!r} and a mixture are both given: put the source into the mixture"
        )
    names = [name for name, _ in cfg.mixture]
    weights = _shares([weight for _, weight in cfg.mixture], names)
    tokenizer = load_tokenizer(cfg.tokenizer)
    return _joined([_open_one(cfg, name, tokenizer) for name in names], weights)


def mix(corpora: Sequence[Corpus], weights: Sequence[float]) -> Corpus:
    """One corpus whose training rows come from `corpora` in the shares `weights`.

    The held-out streams stay whole and follow one another.

    Args:
      corpora: at least one, of one tokenizer; a mixture among them keeps its inner shares.
      weights: one positive number a corpus; only their ratios count.

    Raises:
      UserError: bad weights, or tokenizers that differ.
    """
    names = [corpus.name for corpus in corpora]
    if len({corpus.tokenizer.fingerprint for corpus in corpora}) > 1:
        raise UserError(f"mixture of {', '.join(names)}: their tokenizers differ: use one for all")
    return _joined(corpora, _shares(weights, names))


def _open_one(cfg: DataConfig, source: str, tokenizer: Tokenizer) -> Corpus:
    streams = token_streams(
        open_source(source, cfg.text_field),
        tokenizer,
        valid_fraction=cfg.valid_fraction,
        cache_dir=cfg.cache_dir,
    )
    return Corpus(source, tokenizer, (streams["train"],), (streams["valid"],), (1.0,))


def _joined(corpora: Sequence[Corpus], shares: Sequence[float]) -> Corpus:
    return Corpus(
        name=" + ".join(f"{s:g} {c.name}" for c, s in zip(corpora, shares, strict=True)),
        tokenizer=corpora[0].tokenizer,
        train=tuple(stream for corpus in corpora for stream in corpus.train),
        valid=tuple(stream for corpus in corpora for stream in corpus.valid),
        weights=tuple(
            s * inner for c, s in zip(corpora, shares, strict=True) for inner in c.weights
        ),
    )


def _shares(weights: Sequence[float], names: Sequence[str]) -> list[float]:
    shown = ", ".join(f"{n}={w}" for n, w in zip(names, weights, strict=False))
    if not names or len(names) != len(weights):
        raise UserError(f"mixture has {len(names)} sources and {len(weights)} weights: give pairs")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"mixture weights {shown}: each must be a positive number")
    if len(set(names)) != len(names):
        raise UserError(f"mixture {shown}: a source occurs twice: add up its weights")
    return [weight / sum(weights) for weight in weights]
