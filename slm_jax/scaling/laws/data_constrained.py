"""Loss when the tokens run out and are repeated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from slm_jax.scaling.laws.base import Law, Published

_SOURCE = "Muennighoff et al. 2023, arXiv 2305.16264"
_REPOSITORY = "huggingface/datablations, utils/parametric_fit.ipynb (C4)"


def effective(unique: Any, repeats: Any, constant: Any) -> Any:
    """Unique tokens (or parameters) worth as much as `unique` ones used 1 + `repeats` times.

    `unique + unique * constant * (1 - exp(-repeats / constant))`, equation 5 of the paper.
    """
    return unique * (1 - constant * np.expm1(-repeats / constant))


@dataclass(frozen=True)
class DataConstrained(Law):
    """Chinchilla in effective parameters and tokens: repeats and excess size are worth less.

    U is the number of unique tokens. U_N, the size that U tokens support, is the smaller of N and
    the compute-optimal size for U. Beyond, R_D and R_N say after how many repeats value is lost.
    With E, A, B, alpha and beta fixed at values from unrepeated runs, two parameters are fitted:
    that is how the authors did it. R_D is weakly determined by their runs (47 has a lower
    objective than the published 15): report its interval.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    R_D: float
    R_N: float

    formula: ClassVar[str] = (
        "L = E + A/N'^alpha + B/D'^beta, X' = U_X + U_X R_X (1 - exp(-(X/U_X - 1)/R_X))"
    )
    source: ClassVar[str] = f"{_SOURCE}, equations 4 to 6"
    inputs: ClassVar[tuple[str, ...]] = ("N", "D", "U")
    units: ClassVar[Mapping[str, str]] = {
        "N": "parameters",
        "D": "tokens, repeats counted",
        "U": "unique tokens",
        "E": "nats a token",
        "R_D": "repeats",
        "R_N": "repeats",
    }
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "E": (0.5, 1.0, 1.8),
        "A": (1e1, 1e2, 1e3, 1e4),
        "B": (1e1, 1e2, 1e3, 1e4),
        "alpha": (0.2, 0.35, 0.5),
        "beta": (0.2, 0.35, 0.5),
        "R_D": (3.0, 15.0, 75.0),
        "R_N": (1.0, 5.0, 25.0),
    }
    published: ClassVar[Mapping[str, Published]] = {
        "c4": Published(
            {
                "E": math.exp(0.6254804),
                "A": math.exp(6.255414),
                "B": math.exp(7.3049974),
                "alpha": 0.3526596,
                "beta": 0.3526596,
                "R_D": 15.387756,
                "R_N": 5.309743,
            },
            _REPOSITORY,
        )
    }

    def __call__(self, **columns: Any) -> Any:
        """Nats a token for N parameters, D tokens of which U are unique."""
        n, d = columns["N"], columns["D"]
        unique_d = np.minimum(columns["U"], d)
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        optimal_n = (unique_d * g) ** (self.beta / self.alpha) * g
        unique_n = np.minimum(n, optimal_n)
        n = effective(unique_n, n / unique_n - 1, self.R_N)
        d = effective(unique_d, d / unique_d - 1, self.R_D)
        return self.E + self.A / n**self.alpha + self.B / d**self.beta
