"""GGUF, the file format of llama.cpp: models written for it, and models read from it."""

from slm_jax.export.gguf.model import Dtype, Sizes, load_gguf, load_gguf_tokenizer, save_gguf

__all__ = ["Dtype", "Sizes", "load_gguf", "load_gguf_tokenizer", "save_gguf"]
