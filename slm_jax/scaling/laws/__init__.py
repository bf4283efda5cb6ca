"""The laws, one dataclass each; `LAWS` finds them by name."""

from slm_jax.scaling.laws.base import Columns, Law, Published
from slm_jax.scaling.laws.compression import Distillation, Precision, Supervised
from slm_jax.scaling.laws.data_constrained import DataConstrained
from slm_jax.scaling.laws.downstream import ExponentialError, SigmoidAccuracy
from slm_jax.scaling.laws.kaplan import KaplanC, KaplanD, KaplanJoint, KaplanN
from slm_jax.scaling.laws.loss import Chinchilla, ChinchillaTied, Envelope, Gadre
from slm_jax.scaling.laws.moe import FineGrainedMoE, JointMoE, Routing
from slm_jax.scaling.laws.training import (
    DeepSeekBatch,
    DeepSeekLearningRate,
    PorianBatch,
    PorianLearningRate,
    StepLawBatch,
    StepLawLearningRate,
)

LAWS: dict[str, type[Law]] = {
    law.__name__: law
    for law in (
        Chinchilla,
        ChinchillaTied,
        DataConstrained,
        DeepSeekBatch,
        DeepSeekLearningRate,
        Distillation,
        Envelope,
        ExponentialError,
        FineGrainedMoE,
        Gadre,
        JointMoE,
        KaplanC,
        KaplanD,
        KaplanJoint,
        KaplanN,
        PorianBatch,
        PorianLearningRate,
        Precision,
        Routing,
        SigmoidAccuracy,
        StepLawBatch,
        StepLawLearningRate,
        Supervised,
    )
}

__all__ = [
    "LAWS",
    "Chinchilla",
    "ChinchillaTied",
    "Columns",
    "DataConstrained",
    "DeepSeekBatch",
    "DeepSeekLearningRate",
    "Distillation",
    "Envelope",
    "ExponentialError",
    "FineGrainedMoE",
    "Gadre",
    "JointMoE",
    "KaplanC",
    "KaplanD",
    "KaplanJoint",
    "KaplanN",
    "Law",
    "PorianBatch",
    "PorianLearningRate",
    "Precision",
    "Published",
    "Routing",
    "SigmoidAccuracy",
    "StepLawBatch",
    "StepLawLearningRate",
    "Supervised",
]
