"""Small language models in JAX: train them, compare their architectures, export them."""

__version__ = "0.1.0"
