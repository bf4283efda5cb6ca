"""How to train: learning rate and batch by size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from slm_jax.scaling.laws.base import Columns, Law, Published

_SLOPES = (-0.7, -0.3, 0.3, 0.7)


@dataclass(frozen=True)
class StepLawLearningRate(Law):
    """Peak learning rate of AdamW from parameters and tokens."""

    coefficient: float
    power_N: float
    power_D: float

    formula: ClassVar[str] = "learning rate = coefficient N^power_N D^power_D"
    source: ClassVar[str] = "Li et al. 2025 (Step Law), arXiv 2503.04715"
    units: ClassVar[Mapping[str, str]] = {"N": "parameters without embeddings", "D": "tokens"}
    linear: ClassVar[tuple[str, ...]] = ("coefficient",)
    positive: ClassVar[tuple[str, ...]] = ("coefficient",)
    target: ClassVar[str] = "learning_rate"
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {"power_N": _SLOPES, "power_D": _SLOPES}
    published: ClassVar[Mapping[str, Published]] = {
        "step_law": Published(
            {"coefficient": 1.79, "power_N": -0.713, "power_D": 0.307}, "arXiv 2503.04715"
        )
    }

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """N^power_N D^power_D."""
        return (columns["N"] ** self.power_N * columns["D"] ** self.power_D,)


@dataclass(frozen=True)
class StepLawBatch(Law):
    """Batch of AdamW, in tokens, from the tokens of the whole run."""

    coefficient: float
    power: float

    formula: ClassVar[str] = "batch tokens = coefficient D^power"
    source: ClassVar[str] = "Li et al. 2025 (Step Law), arXiv 2503.04715"
    inputs: ClassVar[tuple[str, ...]] = ("D",)
    units: ClassVar[Mapping[str, str]] = {"D": "tokens"}
    linear: ClassVar[tuple[str, ...]] = ("coefficient",)
    target: ClassVar[str] = "batch_tokens"
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {"power": (0.2, 0.5, 0.9)}
    published: ClassVar[Mapping[str, Published]] = {
        "step_law": Published({"coefficient": 0.58, "power": 0.571}, "arXiv 2503.04715")
    }

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """D^power."""
        return (columns["D"] ** self.power,)


_DEEPSEEK = "arXiv 2401.02954, section 3.1; recalled, not read again"


@dataclass(frozen=True)
class DeepSeekLearningRate(Law):
    """Peak learning rate of AdamW from training compute."""

    coefficient: float
    power: float

    formula: ClassVar[str] = "learning rate = coefficient C^power"
    source: ClassVar[str] = "DeepSeek-AI 2024, arXiv 2401.02954, section 3.1"
    inputs: ClassVar[tuple[str, ...]] = ("C",)
    units: ClassVar[Mapping[str, str]] = {"C": "FLOPs without those of the embeddings"}
    linear: ClassVar[tuple[str, ...]] = ("coefficient",)
    positive: ClassVar[tuple[str, ...]] = ("coefficient",)
    target: ClassVar[str] = "learning_rate"
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {"power": (-0.3, -0.1, 0.1, 0.3)}
    published: ClassVar[Mapping[str, Published]] = {
        "deepseek": Published({"coefficient": 0.3118, "power": -0.1250}, _DEEPSEEK)
    }

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """C^power."""
        return (columns["C"] ** self.power,)


@dataclass(frozen=True)
class DeepSeekBatch(DeepSeekLearningRate):
    """Batch of AdamW, in tokens, from training compute."""

    formula: ClassVar[str] = "batch tokens = coefficient C^power"
    target: ClassVar[str] = "batch_tokens"
    published: ClassVar[Mapping[str, Published]] = {
        "deepseek": Published({"coefficient": 0.2920, "power": 0.3271}, _DEEPSEEK)
    }


_PORIAN_N = 108e6  # parameters of the model that was tuned


@dataclass(frozen=True)
class PorianLearningRate(Law):
    """Peak learning rate of AdamW from parameters, for a run of constant learning rate."""

    coefficient: float
    power: float

    formula: ClassVar[str] = "learning rate = coefficient (N / 108e6)^power"
    source: ClassVar[str] = "Porian et al. 2024, arXiv 2406.19146"
    inputs: ClassVar[tuple[str, ...]] = ("N",)
    units: ClassVar[Mapping[str, str]] = {"N": "parameters with the head, without embeddings"}
    linear: ClassVar[tuple[str, ...]] = ("coefficient",)
    positive: ClassVar[tuple[str, ...]] = ("coefficient",)
    target: ClassVar[str] = "learning_rate"
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {"power": (-0.7, -0.3, 0.3, 0.7)}
    published: ClassVar[Mapping[str, Published]] = {
        "porian": Published(
            {"coefficient": 0.0047, "power": -1 / 3}, "arXiv 2406.19146, as in OLMo-core's ladder"
        )
    }

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """(N / 108e6)^power."""
        return ((columns["N"] / _PORIAN_N) ** self.power,)


@dataclass(frozen=True)
class PorianBatch(PorianLearningRate):
    """Batch of AdamW, in tokens, from parameters."""

    formula: ClassVar[str] = "batch tokens = coefficient (N / 108e6)^power"
    target: ClassVar[str] = "batch_tokens"
    published: ClassVar[Mapping[str, Published]] = {
        "porian": Published(
            {"coefficient": 2048 * 160.0, "power": 2 / 3},
            "arXiv 2406.19146, as in OLMo-core's ladder",
        )
    }


@dataclass(frozen=True)
class TrainingRule:
    """A learning rate and a batch for every size.

    Attributes:
        learning_rate: law of the peak learning rate.
        batch: law of the batch, in tokens.
    """

    learning_rate: Law
    batch: Law

    def __call__(self, N: float, D: float) -> tuple[float, float]:
        """Peak learning rate, and tokens a batch, of N parameters on D tokens (C = 6 N D).

        The published rules were measured between 50 M and a few billion parameters.
        """
        columns = {"N": N, "D": D, "C": 6.0 * N * D}
        return float(self.learning_rate.predict(columns)), float(self.batch.predict(columns))


TRAINING_RULES: dict[str, TrainingRule] = {
    "step_law": TrainingRule(
        StepLawLearningRate.from_published("step_law"), StepLawBatch.from_published("step_law")
    ),
    "deepseek": TrainingRule(
        DeepSeekLearningRate.from_published("deepseek"), DeepSeekBatch.from_published("deepseek")
    ),
    "porian": TrainingRule(
        PorianLearningRate.from_published("porian"), PorianBatch.from_published("porian")
    ),
}
