"""Laws of smaller models made from larger ones: fewer bits, or a teacher."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from slm_jax.scaling.laws.base import Columns, Law

_EXPONENTS = (0.15, 0.3, 0.5, 0.8)


@dataclass(frozen=True)
class Precision(Law):
    """Loss of a model trained with weights of P bits: it counts as a smaller one.

    The form alone: constants hold for one training recipe and number format.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float

    formula: ClassVar[str] = "L = E + A/(N (1 - exp(-P/gamma)))^alpha + B/D^beta"
    source: ClassVar[str] = "Kumar et al. 2024, arXiv 2411.04330"
    inputs: ClassVar[tuple[str, ...]] = ("N", "D", "bits")
    units: ClassVar[Mapping[str, str]] = {
        "N": "parameters",
        "D": "tokens",
        "bits": "bits P of a weight",
        "E": "nats a token",
        "gamma": "bits",
    }
    linear: ClassVar[tuple[str, ...]] = ("E", "A", "B")
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "alpha": _EXPONENTS,
        "beta": _EXPONENTS,
        "gamma": (1.0, 2.5, 5.0),
    }

    def effective_parameters(self, N: Any, bits: Any) -> Any:
        """Parameters of the model of infinite precision with the same loss at every D."""
        return N * (1 - np.exp(-bits / self.gamma))

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """1, N_eff^-alpha, D^-beta."""
        n, d = columns["N"], columns["D"]
        size = self.effective_parameters(n, columns["bits"]) ** -self.alpha
        return size**0.0 * d**0.0, size, d**-self.beta


@dataclass(frozen=True)
class Supervised(Law):
    """Chinchilla's law with a power over the sum: what `Distillation` compares a student with.

    gamma = 1 is Chinchilla's law.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float

    formula: ClassVar[str] = "L = E + (A/N^alpha + B/D^beta)^gamma"
    source: ClassVar[str] = "Busbridge et al. 2025, arXiv 2502.08606"
    units: ClassVar[Mapping[str, str]] = {"N": "parameters", "D": "tokens", "E": "nats a token"}
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "E": (1.0, 2.0),
        "A": (400.0, 4000.0),
        "B": (400.0, 20000.0),
        "alpha": (0.3, 0.45),
        "beta": (0.3, 0.45),
        "gamma": (0.5, 1.0),
    }

    def __call__(self, **columns: Any) -> Any:
        """The loss, nats a token."""
        inside = self.A * columns["N"] ** -self.alpha + self.B * columns["D"] ** -self.beta
        return self.E + inside**self.gamma


@dataclass(frozen=True)
class Distillation(Law):
    """Loss of a student of N parameters on D tokens of a teacher's distribution.

    Too good a teacher hurts: the middle factor tends to one for a teacher much better than
    the student would be alone, while L_T^-c0 grows. The form alone: the paper's constants could
    not be read again, so none are given.
    """

    c0: float
    c1: float
    d1: float
    f1: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float

    formula: ClassVar[str] = (
        "L = L_T + L_T^-c0 (1 + (L_T/(L_S d1))^(1/f1))^(-c1 f1) (A/N^alpha + B/D^beta)^gamma"
    )
    source: ClassVar[str] = "Busbridge et al. 2025, arXiv 2502.08606"
    inputs: ClassVar[tuple[str, ...]] = ("N", "D", "teacher_loss", "supervised_loss")
    units: ClassVar[Mapping[str, str]] = {
        "N": "parameters of the student",
        "D": "tokens of distillation",
        "teacher_loss": "L_T, nats a token",
        "supervised_loss": "L_S, nats a token: of the student trained without a teacher (a fit of "
        "Supervised or Chinchilla gives it)",
    }
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "c0": (1.0, 2.5),
        "c1": (2.0, 100.0),
        "d1": (1.2,),
        "f1": (0.1,),
        "A": (2000.0,),
        "B": (2000.0, 20000.0),
        "alpha": (0.35,),
        "beta": (0.35, 0.6),
        "gamma": (0.75,),
    }

    def __call__(self, **columns: Any) -> Any:
        """The student's loss, nats a token."""
        teacher, alone = columns["teacher_loss"], columns["supervised_loss"]
        ratio = teacher / (alone * self.d1)
        # log(1 + ratio^(1/f1)) without overflow: 1/f1 is large.
        log_sum = _log1p_exp(np.log(ratio) / self.f1)
        size = self.A * columns["N"] ** -self.alpha + self.B * columns["D"] ** -self.beta
        middle = np.exp(-self.c1 * self.f1 * log_sum)
        return teacher + teacher**-self.c0 * middle * size**self.gamma


def _log1p_exp(x: Any) -> Any:
    """log(1 + e^x) for real or complex x."""
    large = np.real(x) > 0
    small = np.where(large, -x, x)
    return np.where(large, x, 0.0) + np.log1p(np.exp(small))
