"""Text generation: batched prefill, cached decoding, sampling."""

from slm_jax.infer.generate import generate, stream
from slm_jax.infer.sampling import Sampling

__all__ = ["Sampling", "generate", "stream"]
