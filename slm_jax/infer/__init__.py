"""Text generation: chunked prefill, cached decoding, sampling, drafts.

Read in this order: sampling.py (logits to tokens), step.py (what runs on the device), generate.py
(batches and slots), speculative.py (a small model drafts), text.py (tokens to text as they come);
unrolled.py makes a model that decodes faster on a CPU.
"""

from slm_jax.infer.generate import EarlyExit, generate, stream
from slm_jax.infer.sampling import Sampling
from slm_jax.infer.speculative import Round, speculate
from slm_jax.infer.text import RowText
from slm_jax.infer.unrolled import unrolled

__all__ = [
    "EarlyExit",
    "Round",
    "RowText",
    "Sampling",
    "generate",
    "speculate",
    "stream",
    "unrolled",
]
