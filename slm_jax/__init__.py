"""Small language models in JAX: train, compare architectures, fit scaling laws, compress, export."""

__version__ = "0.1.0"
