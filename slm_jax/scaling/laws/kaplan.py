"""The first scaling laws of language models: power laws without an irreducible loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from slm_jax.scaling.laws.base import Law, Published

PF_DAY = 1e15 * 24 * 3600  # FLOPs
_SOURCE = "Kaplan et al. 2020, arXiv 2001.08361"
_SCALES = tuple(float(x) for x in np.geomspace(1e6, 1e18, 13))
_POWERS = tuple(float(x) for x in np.geomspace(0.02, 1.0, 9))


@dataclass(frozen=True)
class KaplanN(Law):
    """L(N) = (N_c / N)^alpha of models trained to convergence on plenty of data.

    N counts parameters without embeddings.
    """

    N_c: float
    alpha: float

    formula: ClassVar[str] = "L = (N_c/N)^alpha"
    source: ClassVar[str] = f"{_SOURCE}, equation 1.1"
    inputs: ClassVar[tuple[str, ...]] = ("N",)
    units: ClassVar[Mapping[str, str]] = {
        "N": "parameters without embeddings",
        "N_c": "parameters without embeddings",
    }
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {"N_c": _SCALES, "alpha": _POWERS}
    published: ClassVar[Mapping[str, Published]] = {
        "kaplan": Published({"N_c": 8.8e13, "alpha": 0.076}, f"{_SOURCE}, equation 1.1")
    }

    def __call__(self, **columns: Any) -> Any:
        """Nats a token."""
        return (self.N_c / columns["N"]) ** self.alpha


@dataclass(frozen=True)
class KaplanD(Law):
    """L(D) = (D_c / D)^alpha of large models stopped early on D tokens."""

    D_c: float
    alpha: float

    formula: ClassVar[str] = "L = (D_c/D)^alpha"
    source: ClassVar[str] = f"{_SOURCE}, equation 1.2"
    inputs: ClassVar[tuple[str, ...]] = ("D",)
    units: ClassVar[Mapping[str, str]] = {"D": "tokens", "D_c": "tokens"}
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {"D_c": _SCALES, "alpha": _POWERS}
    published: ClassVar[Mapping[str, Published]] = {
        "kaplan": Published({"D_c": 5.4e13, "alpha": 0.095}, f"{_SOURCE}, equation 1.2")
    }

    def __call__(self, **columns: Any) -> Any:
        """Nats a token."""
        return (self.D_c / columns["D"]) ** self.alpha


@dataclass(frozen=True)
class KaplanC(Law):
    """L(C_min) = (C_c / C_min)^alpha of the best model, at a batch far below the critical one."""

    C_c: float
    alpha: float

    formula: ClassVar[str] = "L = (C_c/C)^alpha"
    source: ClassVar[str] = f"{_SOURCE}, equation 1.3"
    inputs: ClassVar[tuple[str, ...]] = ("C",)
    units: ClassVar[Mapping[str, str]] = {"C": "FLOPs", "C_c": "FLOPs"}
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "C_c": tuple(float(x) for x in np.geomspace(1e12, 1e36, 13)),
        "alpha": _POWERS,
    }
    published: ClassVar[Mapping[str, Published]] = {
        "kaplan": Published({"C_c": 3.1e8 * PF_DAY, "alpha": 0.050}, f"{_SOURCE}, equation 1.3")
    }

    def __call__(self, **columns: Any) -> Any:
        """Nats a token."""
        return (self.C_c / columns["C"]) ** self.alpha


@dataclass(frozen=True)
class KaplanJoint(Law):
    """L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D, with early stopping."""

    N_c: float
    D_c: float
    alpha_N: float
    alpha_D: float

    formula: ClassVar[str] = "L = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D"
    source: ClassVar[str] = f"{_SOURCE}, equation 1.5"
    units: ClassVar[Mapping[str, str]] = {
        "N": "parameters without embeddings",
        "N_c": "parameters without embeddings",
        "D": "tokens",
        "D_c": "tokens",
    }
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "N_c": _SCALES[1::2],
        "D_c": _SCALES[1::2],
        "alpha_N": _POWERS[::2],
        "alpha_D": _POWERS[::2],
    }
    published: ClassVar[Mapping[str, Published]] = {
        "kaplan": Published(
            {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
            f"{_SOURCE}, table 2",
        )
    }

    def __call__(self, **columns: Any) -> Any:
        """Nats a token."""
        n = (self.N_c / columns["N"]) ** (self.alpha_N / self.alpha_D)
        return (n + self.D_c / columns["D"]) ** self.alpha_D
