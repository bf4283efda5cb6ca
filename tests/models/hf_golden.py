"""What the parity tests share: golden cases as models, and how near logits must be.

Few programs are compiled, and without LLVM's optimisations, which cost more than they save here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import load_file

from slm_jax.models.hf import load_hf
from slm_jax.models.lm import LM
from tests.golden.cases import VARIANTS

GOLDEN = Path(__file__).parent.parent / "golden"

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Case(NamedTuple):
    """The two models of one golden case and their golden tensors, by variant."""

    name: str
    models: dict[str, LM]
    golden: dict[str, dict[str, np.ndarray]]


@contextmanager
def opened(name: str) -> Iterator[Case]:
    """The case, while products are computed in full float32."""
    folders = {variant: GOLDEN / f"{name}-{variant}" for variant in VARIANTS}
    with jax.default_matmul_precision("highest"):
        yield Case(
            name,
            {variant: load_hf(folder) for variant, folder in folders.items()},
            {v: load_file(folder / "golden.safetensors") for v, folder in folders.items()},
        )


@quick_jit
def full(model: LM, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """Logits of one pass without a cache."""
    return model(tokens, segments=segments)[0]


def assert_close(have: Any, want: np.ndarray) -> None:
    """Max-abs at most 1e-4 and at most 1e-5 of the largest logit wanted."""
    error = np.abs(np.asarray(have) - want).max()
    assert error <= min(1e-4, 1e-5 * np.abs(want).max())
