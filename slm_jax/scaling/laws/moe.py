"""Laws of routed models: how the number of experts enters the loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from slm_jax.scaling.laws.base import Columns, Law, Published

_PAPER = "table of arXiv 2202.01169, recalled and not read again"


def saturating_experts(experts: Any, start: Any, largest: Any) -> Any:
    """The number of experts as it counts: `start` at one expert, at most `largest`.

    1 / E^ = 1 / (E - 1 + 1 / (1 / start - 1 / largest)) + 1 / largest. With an infinite `largest`
    this is E - 1 + start. Clark et al. 2022, arXiv 2202.01169.
    """
    first = 1 / (1 / start - 1 / largest)
    return 1 / (1 / (experts - 1 + first) + 1 / largest)


@dataclass(frozen=True)
class Routing(Law):
    """Loss of a routed model from its dense size N and its number of experts.

    N counts what one token passes through, as if there were one expert; the loss is of the
    paper's 130 B tokens, so that D is no input.
    """

    a: float
    b: float
    c: float
    d: float
    E_start: float
    E_max: float

    formula: ClassVar[str] = (
        "log10 L = a log10 N + b log10 E^ + c log10 N log10 E^ + d, "
        "1/E^ = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max"
    )
    source: ClassVar[str] = "Clark et al. 2022, arXiv 2202.01169, with the saturating experts"
    inputs: ClassVar[tuple[str, ...]] = ("N", "experts")
    units: ClassVar[Mapping[str, str]] = {
        "N": "parameters of the dense model",
        "experts": "experts a layer",
        "E_start": "experts",
        "E_max": "experts",
    }
    positive: ClassVar[tuple[str, ...]] = ("E_start", "E_max")
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "a": (-0.08,),
        "b": (-0.12,),
        "c": (0.01,),
        "d": (1.1,),
        "E_start": (1.5, 4.0),
        "E_max": (100.0, 500.0),
    }
    published: ClassVar[Mapping[str, Published]] = {
        name: Published(
            dict(zip(("a", "b", "c", "d", "E_start", "E_max"), values, strict=True)), _PAPER
        )
        for name, values in {
            "s-base": (-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
            "rl-r": (-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
            "hash": (-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
        }.items()
    }

    def __call__(self, **columns: Any) -> Any:
        """The loss, nats a token."""
        n = np.log10(columns["N"])
        e = np.log10(saturating_experts(columns["experts"], self.E_start, self.E_max))
        return 10.0 ** (self.a * n + self.b * e + self.c * n * e + self.d)

    def effective_parameters(self, N: Any, experts: Any) -> Any:
        """Size of the dense model (one expert) of the same loss.

        Args:
            N: parameters of the dense model.
            experts: experts a layer.
        """
        e = np.log10(saturating_experts(experts, self.E_start, self.E_max))
        one = np.log10(self.E_start)
        slope = self.a + self.c * one
        power = (self.a + self.c * e) / slope
        return N**power * 10.0 ** (self.b * (e - one) / slope)

    @property
    def cutoff(self) -> float:
        """Dense size at which experts stop helping: 10^(-b/c) parameters."""
        return float(10.0 ** (-self.b / self.c))


@dataclass(frozen=True)
class JointMoE(Law):
    """Loss of a routed model from active parameters, tokens and experts.

    The exponents of N and D, alpha and beta (negative here), shift with the number of experts.
    The form alone: its constants could not be read from the paper.
    """

    c: float
    a: float
    b: float
    alpha: float
    beta: float
    gamma: float
    delta: float
    zeta: float
    omega: float
    E_start: float
    E_max: float

    formula: ClassVar[str] = (
        "L = a E^^delta N^(alpha + gamma ln E^) + b E^^omega D^(beta + zeta ln E^) + c, "
        "1/E^ = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max"
    )
    source: ClassVar[str] = "Ludziejewski et al. 2025, arXiv 2502.05172"
    inputs: ClassVar[tuple[str, ...]] = ("N", "D", "experts")
    units: ClassVar[Mapping[str, str]] = {
        "N": "active parameters",
        "D": "tokens",
        "experts": "experts a layer",
        "c": "nats a token",
        "E_start": "experts",
        "E_max": "experts",
    }
    linear: ClassVar[tuple[str, ...]] = ("c", "a", "b")
    positive: ClassVar[tuple[str, ...]] = ("c", "a", "b", "E_start", "E_max")
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "alpha": (-0.35, -0.15),
        "beta": (-0.35, -0.15),
        "gamma": (0.0,),
        "delta": (-0.1,),
        "zeta": (0.0,),
        "omega": (0.1,),
        "E_start": (2.0,),
        "E_max": (200.0,),
    }

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """1, the term of N, the term of D."""
        n, d = columns["N"], columns["D"]
        e = saturating_experts(columns["experts"], self.E_start, self.E_max)
        log = np.log(e)
        size = e**self.delta * n ** (self.alpha + self.gamma * log)
        data = e**self.omega * d ** (self.beta + self.zeta * log)
        return n**0.0 * d**0.0 * e**0.0, size, data


@dataclass(frozen=True)
class FineGrainedMoE(Law):
    """Loss of a routed model whose experts are cut into G smaller ones each.

    The form alone: its constants could not be read from the paper. They hold for one number of
    experts (64 there).
    """

    c: float
    g: float
    a: float
    b: float
    gamma: float
    alpha: float
    beta: float

    formula: ClassVar[str] = "L = c + (g/G^gamma + a)/N^alpha + b/D^beta"
    source: ClassVar[str] = "Krajewski et al. 2024, arXiv 2402.07871"
    inputs: ClassVar[tuple[str, ...]] = ("N", "D", "granularity")
    units: ClassVar[Mapping[str, str]] = {
        "N": "parameters without embeddings, all experts",
        "D": "tokens",
        "granularity": "parts G of an expert",
        "c": "nats a token",
    }
    linear: ClassVar[tuple[str, ...]] = ("c", "g", "a", "b")
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "gamma": (0.3, 0.6, 1.2),
        "alpha": (0.1, 0.2, 0.4),
        "beta": (0.1, 0.2, 0.4),
    }

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """1, G^-gamma N^-alpha, N^-alpha, D^-beta."""
        g, n, d = columns["granularity"], columns["N"], columns["D"]
        size = n**-self.alpha
        return g**0.0 * n**0.0 * d**0.0, g**-self.gamma * size, size, d**-self.beta
