"""Decays of the scan's kernels: 2^(dt rate), and how a document's border makes them 0."""

import jax
import jax.numpy as jnp

from slm_kernels.base2 import LOG2E

# A reset is a step so long that every decay underflows to 0; rates between -_TINY and 0 decay by
# exactly 1 at any other step, so that raising them to -_TINY changes nothing else.
FOREVER, _TINY = 1e30, 1e-27


def log2_rates(a: jax.Array, *, resets: bool) -> jax.Array:
    """Rates `a`, of any shape, in powers of two; with `resets` none that a reset would not stop."""
    a2 = a * LOG2E
    return jnp.where((a2 > -_TINY) & (a2 <= 0), -_TINY, a2) if resets else a2
