"""Exponentials as powers of two, which is what the chips compute."""

import math

LOG2E = math.log2(math.e)
"""exp(x) = 2^(x LOG2E)."""
