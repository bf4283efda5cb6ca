"""Text to batches: tokenizers, sources, a token cache, windows, mixtures.

    corpus = open_data(DataConfig(source="tinyshakespeare", tokenizer="byte"))
    batches = train_batches(corpus, batch_size=32, seq_len=256, seed=0)
    batch = next(batches)  # tokens, targets, segments, positions, weights: [32, 256]

Read in this order: sources.py (files to documents), tokenizer.py, cache.py (documents to flat token
files), corpus.py (configuration), windows.py (tokens to rows), pipeline.py (rows to batches).
"""

from slm_jax.data.bigram import bigram_loss
from slm_jax.data.cache import Stream
from slm_jax.data.corpus import Corpus, DataConfig, mix, open_data
from slm_jax.data.pipeline import ValidBatches, train_batches, valid_batches
from slm_jax.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from slm_jax.data.windows import Batch, read_windows

__all__ = [
    "BPETokenizer",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "Stream",
    "Tokenizer",
    "ValidBatches",
    "bigram_loss",
    "load_tokenizer",
    "mix",
    "open_data",
    "read_windows",
    "train_batches",
    "train_bpe",
    "valid_batches",
]
