"""Kernels of small language models: attention, selective scans, grouped matrix products.

Each operation is a function with an `implementation=` argument: `"reference"` is the plain
specification, `"xla"` the form that XLA compiles well; `None` picks the best one available.
"""

__version__ = "0.1.0"
