"""Smaller models: the same pytree with other `Linear`s, and how to choose their codes.

    model = quantise(model, parse_spec("w8a8"))  # rounds to nearest; no data needed
    model = quantise_gptq(model, batches, parse_spec("w4g32"))

Read in this order: spec.py (formats), codes.py (numbers to codes), linear.py (drop-ins),
quantise.py (whole models), calibrate.py (what enters each layer), gptq.py, fold.py,
smoothquant.py, awq.py, io.py.
"""

from slm_jax.compress.awq import activation_aware
from slm_jax.compress.calibrate import layer_errors
from slm_jax.compress.gptq import quantise_gptq
from slm_jax.compress.quantise import Size, quantise, size
from slm_jax.compress.smoothquant import smoothed
from slm_jax.compress.spec import QuantSpec, parse_spec

__all__ = [
    "QuantSpec",
    "Size",
    "activation_aware",
    "layer_errors",
    "parse_spec",
    "quantise",
    "quantise_gptq",
    "size",
    "smoothed",
]
