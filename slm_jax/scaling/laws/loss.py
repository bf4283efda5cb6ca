"""Loss of a dense language model as a function of its parameters and training tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from slm_jax.scaling.laws.base import Columns, Law, Published

_EXPONENTS = tuple(float(x) for x in np.geomspace(0.05, 1.6, 16))
_N_D = {"N": "parameters", "D": "tokens", "E": "nats a token"}


@dataclass(frozen=True)
class Chinchilla(Law):
    """L(N, D) = E + A / N^alpha + B / D^beta (arXiv 2203.15556, equation 2)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    formula: ClassVar[str] = "L = E + A/N^alpha + B/D^beta"
    source: ClassVar[str] = "Hoffmann et al. 2022, arXiv 2203.15556, equation 2"
    units: ClassVar[Mapping[str, str]] = _N_D
    linear: ClassVar[tuple[str, ...]] = ("E", "A", "B")
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {"alpha": _EXPONENTS, "beta": _EXPONENTS}
    published: ClassVar[Mapping[str, Published]] = {
        "hoffmann": Published(
            {
                "E": math.exp(0.5267228),
                "A": math.exp(6.0073404),
                "B": math.exp(6.0179186),
                "alpha": 0.33917084,
                "beta": 0.2849083,
            },
            "arXiv 2203.15556, unrounded values in its TeX source",
        ),
        "hoffmann_rounded": Published(
            {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
            "arXiv 2203.15556, section D.3",
        ),
        "besiroglu": Published(
            {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
            "arXiv 2404.10102, table 1",
        ),
    }

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """1, N^-alpha, D^-beta."""
        n, d = columns["N"], columns["D"]
        return n**0.0 * d**0.0, n**-self.alpha, d**-self.beta

    def slopes(self, columns: Columns) -> dict[str, tuple[Any, ...]]:
        """In closed form, for the bootstrap's sake."""
        _, n, d = self.basis(columns)
        return {
            "alpha": (0.0, -np.log(columns["N"]) * n, 0.0),
            "beta": (0.0, 0.0, -np.log(columns["D"]) * d),
        }


@dataclass(frozen=True)
class ChinchillaTied(Law):
    """L(N, D) = E + A / N^alpha + B / D^alpha: Chinchilla with one exponent.

    Then N and D grow alike, N ~ D ~ C^0.5, whatever the other parameters.
    """

    E: float
    A: float
    B: float
    alpha: float

    formula: ClassVar[str] = "L = E + A/N^alpha + B/D^alpha"
    source: ClassVar[str] = "Muennighoff et al. 2023, arXiv 2305.16264, appendix A"
    units: ClassVar[Mapping[str, str]] = _N_D
    linear: ClassVar[tuple[str, ...]] = ("E", "A", "B")
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {"alpha": _EXPONENTS}
    published: ClassVar[Mapping[str, Published]] = {
        "c4": Published(
            {
                "E": math.exp(0.6254804),
                "A": math.exp(6.255414),
                "B": math.exp(7.3049974),
                "alpha": 0.3526596,
            },
            "huggingface/datablations, utils/parametric_fit.ipynb (C4)",
        )
    }

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """1, N^-alpha, D^-alpha."""
        n, d = columns["N"], columns["D"]
        return n**0.0 * d**0.0, n**-self.alpha, d**-self.alpha


@dataclass(frozen=True)
class Gadre(Law):
    """L(C, M) = E + (a M^eta + b M^-eta) C^-eta, of over-trained models.

    With C = 6 N D and M = D / N this is Chinchilla with both exponents 2 eta, A = a 6^-eta and
    B = b 6^-eta. The authors' code fits A N^-2eta + b 6^-eta (M N)^-2eta.
    """

    E: float
    a: float
    b: float
    eta: float

    formula: ClassVar[str] = "L = E + (a M^eta + b M^-eta) C^-eta"
    source: ClassVar[str] = "Gadre et al. 2024, arXiv 2403.08540, equation 4"
    inputs: ClassVar[tuple[str, ...]] = ("C", "M")
    units: ClassVar[Mapping[str, str]] = {
        "C": "FLOPs",
        "M": "tokens a parameter",
        "E": "nats a token",
    }
    linear: ClassVar[tuple[str, ...]] = ("E", "a", "b")
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "eta": tuple(x / 2 for x in _EXPONENTS),
    }
    published: ClassVar[Mapping[str, Published]] = {
        corpus: Published(
            {"E": e, "a": a * 6.0 ** (-power / 2), "b": b, "eta": -power / 2},
            f"mlfoundations/scaling, scaling law fitted on {corpus} by the authors' code",
        )
        for corpus, a, b, power, e in (
            ("c4", 113.693, 189.516, -0.242472, 1.508261),
            ("redpajama", 166.211, 366.687, -0.272851, 1.836648),
            ("refinedweb", 125.096, 246.207, -0.254395, 1.734462),
        )
    }

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """1, M^eta C^-eta, M^-eta C^-eta."""
        c, m = columns["C"], columns["M"]
        return c**0.0 * m**0.0, (m / c) ** self.eta, (m * c) ** -self.eta


@dataclass(frozen=True)
class Envelope(Law):
    """L(C) = E + A / C^alpha: the loss of the best model of each budget."""

    E: float
    A: float
    alpha: float

    formula: ClassVar[str] = "L = E + A/C^alpha"
    source: ClassVar[str] = "Henighan et al. 2020, arXiv 2010.14701, equation 1.1"
    inputs: ClassVar[tuple[str, ...]] = ("C",)
    units: ClassVar[Mapping[str, str]] = {"C": "FLOPs", "E": "nats a token"}
    linear: ClassVar[tuple[str, ...]] = ("E", "A")
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {"alpha": _EXPONENTS}

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """1, C^-alpha."""
        return columns["C"] ** 0.0, columns["C"] ** -self.alpha
