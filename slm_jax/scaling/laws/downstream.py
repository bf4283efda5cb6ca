"""From loss to accuracy on a task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from slm_jax.scaling.laws.base import Columns, Law, Published


@dataclass(frozen=True)
class SigmoidAccuracy(Law):
    """Accuracy on a task as a falling sigmoid of the loss on its answers.

    `floor` is the accuracy of a model that knows nothing, `top` of one whose loss is far below
    `middle`; the paper writes b = top, a = floor - top, k = steepness, L0 = middle. A free `top`
    can pass 1: then fit again with it fixed at 1.
    """

    floor: float
    top: float
    middle: float
    steepness: float

    formula: ClassVar[str] = "accuracy = floor + (top - floor) / (1 + exp(steepness (L - middle)))"
    source: ClassVar[str] = "Bhagia et al. 2024, arXiv 2412.04403"
    inputs: ClassVar[tuple[str, ...]] = ("task_loss",)
    units: ClassVar[Mapping[str, str]] = {
        "task_loss": "bits a byte of the right answer",
        "middle": "bits a byte",
        "steepness": "1 / (bits a byte)",
    }
    linear: ClassVar[tuple[str, ...]] = ("floor", "top")
    positive: ClassVar[tuple[str, ...]] = ("floor", "top", "steepness")
    target: ClassVar[str] = "accuracy"
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "middle": (0.4, 0.6, 0.8, 1.0, 1.2),
        "steepness": (2.0, 4.0, 8.0, 16.0),
    }

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """1 minus the sigmoid, the sigmoid."""
        # (1 - tanh(x / 2)) / 2 is 1 / (1 + e^x) and does not overflow.
        half = np.tanh(self.steepness * (columns["task_loss"] - self.middle) / 2) / 2
        return 0.5 + half, 0.5 - half


@dataclass(frozen=True)
class ExponentialError(Law):
    """Error rate, averaged over tasks, from the loss on text."""

    epsilon: float
    k: float
    gamma: float

    formula: ClassVar[str] = "error = epsilon - k exp(-gamma L)"
    source: ClassVar[str] = "Gadre et al. 2024, arXiv 2403.08540"
    inputs: ClassVar[tuple[str, ...]] = ("loss",)
    units: ClassVar[Mapping[str, str]] = {"loss": "nats a token", "gamma": "1 / (nats a token)"}
    linear: ClassVar[tuple[str, ...]] = ("epsilon", "k")
    target: ClassVar[str] = "error"
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {"gamma": (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)}
    published: ClassVar[Mapping[str, Published]] = {
        corpus: Published(
            {"k": k, "gamma": gamma, "epsilon": epsilon},
            "mlfoundations/scaling, 17 tasks, fitted with its code",
        )
        for corpus, (k, gamma, epsilon) in {
            "c4": (2.0789, 0.7561, 0.8497),
            "redpajama": (2.2065, 0.7146, 0.8570),
            "refinedweb": (2.2148, 0.7070, 0.8653),
        }.items()
    }

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """1, -exp(-gamma L)."""
        fall = np.exp(-self.gamma * columns["loss"])
        return fall**0.0, -fall
