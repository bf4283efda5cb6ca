"""Smaller models: the same pytree with other `Linear`s, and how to choose their codes.

    model = quantise(model, parse_spec("w8a8"))  # rounds to nearest; no data needed
    model = quantise_gptq(model, batches, parse_spec("w4g32"))
    model = prune(model, batches, parse_sparsity("0.5"), method="wanda")

Read in this order: spec.py (formats), codes.py (numbers to codes), linear.py (drop-ins),
quantise.py (whole models), calibrate.py (what enters each layer), obs.py (the solver of gptq.py and
SparseGPT), gptq.py, fold.py, smoothquant.py, awq.py, prune.py (zeros), structured.py (whole units),
sparse.py (zeros in a file), io.py; lsq.py and qat.py (training for fewer bits).
"""

from slm_jax.compress.awq import activation_aware
from slm_jax.compress.calibrate import layer_errors
from slm_jax.compress.gptq import quantise_gptq
from slm_jax.compress.prune import Sparsity, parse_sparsity, prune
from slm_jax.compress.quantise import Size, quantise, size
from slm_jax.compress.smoothquant import smoothed
from slm_jax.compress.spec import QuantSpec, parse_spec
from slm_jax.compress.structured import prune_units

__all__ = [
    "QuantSpec",
    "Size",
    "Sparsity",
    "activation_aware",
    "layer_errors",
    "parse_sparsity",
    "parse_spec",
    "prune",
    "prune_units",
    "quantise",
    "quantise_gptq",
    "size",
    "smoothed",
]
