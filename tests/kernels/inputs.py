"""Random arguments of the operations."""

import numpy as np


def scan_inputs(
    batch: int, length: int, width: int, n: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Of `selective_scan`, float32: steps between 0.001 and 1, an initial state."""
    rng = np.random.default_rng(seed)
    arrays = dict(
        u=rng.normal(size=(batch, length, width)),
        dt=np.exp(rng.uniform(np.log(1e-3), np.log(1.0), (batch, length, width))),
        a=-np.exp(rng.normal(size=(width, n))),
        b=rng.normal(size=(batch, length, n)),
        c=rng.normal(size=(batch, length, n)),
        d=rng.normal(size=width),
        initial_state=rng.normal(size=(batch, width, n)),
    )
    return {name: x.astype(np.float32) for name, x in arrays.items()}
