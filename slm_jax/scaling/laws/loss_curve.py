"""Loss along a run under any learning-rate schedule: the multi-power law."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import least_squares

from slm_jax.errors import UserError
from slm_jax.scaling.laws.base import Published


@dataclass(frozen=True)
class LossCurve:
    """One run: its schedule and the loss along it.

    Attributes:
        learning_rates: [steps], warm-up included.
        at: [points] index in `learning_rates` of the last step before the loss was measured.
        loss: [points] nats a token.
    """

    learning_rates: np.ndarray
    at: np.ndarray
    loss: np.ndarray

    def __post_init__(self) -> None:
        if len(self.at) != len(self.loss):
            raise UserError(f"at={len(self.at)} and loss={len(self.loss)} differ in length")
        if np.min(self.at) < 0 or np.max(self.at) >= len(self.learning_rates):
            raise UserError(
                f"at={int(np.min(self.at))}..{int(np.max(self.at))} lies outside the schedule of "
                f"{len(self.learning_rates)} steps: give a rate for every step"
            )


@dataclass(frozen=True)
class MultiPower:
    """Training loss at every step under any learning-rate schedule (Luo et al. 2025).

    It takes a whole schedule, not a row of a table, so it is no `Law` and has its own `fit`.
    Warm-up is part of the schedule and its rises count as negative falls, as in the authors' code
    that made the published constants; the paper's text sums from the end of warm-up, which moves
    B times the peak learning rate (0.1 nats) from L0 to the sum.
    """

    L0: float
    A: float
    alpha: float
    B: float
    C: float
    beta: float
    gamma: float

    formula: ClassVar[str] = (
        "L(t) = L0 + A S_0(t)^-alpha - B sum_k (lr_(k-1) - lr_k) "
        "(1 - (C lr_k^-gamma S_k(t) + 1)^-beta), S_k(t) = sum of lr from k to t"
    )
    source: ClassVar[str] = "Luo et al. 2025, arXiv 2503.12811"
    units: ClassVar[Mapping[str, str]] = {"L0": "nats a token", "B": "nats a token"}
    published: ClassVar[Mapping[str, Published]] = {
        name: Published(
            dict(zip(("L0", "A", "alpha", "B", "C", "beta", "gamma"), values, strict=True)),
            "README of thu-yao-01-luo/MultiPowerLaw",
        )
        for name, values in {
            "25M": (3.040, 0.525, 0.508, 363.788, 2.066, 0.583, 0.641),
            "100M": (2.651, 0.601, 0.453, 437.946, 2.132, 0.598, 0.655),
        }.items()
    }

    @classmethod
    def from_published(cls, name: str) -> "MultiPower":
        """The law with constants from the literature.

        Raises:
            UserError: if there are none of that name.
        """
        if name not in cls.published:
            raise UserError(
                f"published={name!r} is not known for {cls.__name__}: it has "
                + ", ".join(cls.published)
            )
        return cls(**cls.published[name].values)

    def predict(self, curve: LossCurve, *, block: int = 1) -> np.ndarray:
        """The loss at the measured points of a run, [points] nats a token.

        Args:
            curve: only its schedule and `at` are read.
            block: drops of the learning rate within so many steps are taken as one, at their
                mean place. 1 is exact and costs points x changes of the learning rate.
        """
        return _terms(curve, block)(self)


# Where the search may go, and four starts. Two schedules leave a ridge along which B grows as beta
# falls; the box ends it.
_BOX = {
    "L0": (1e-2, 20.0),
    "A": (1e-3, 1e2),
    "alpha": (1e-2, 3.0),
    "B": (1.0, 1e6),
    "C": (1e-3, 1e3),
    "beta": (1e-3, 5.0),
    "gamma": (1e-2, 3.0),
}
_STARTS = tuple(
    {"A": 0.5, "alpha": 0.5, "B": B, "C": C, "beta": 0.5, "gamma": gamma}
    for B, C in ((300.0, 2.0), (500.0, 0.5))
    for gamma in (0.3, 0.6)
)


def fit_multi_power(
    curves: Sequence[LossCurve],
    *,
    fixed: Mapping[str, float] | None = None,
    delta: float = 1e-3,
    block: int = 64,
) -> MultiPower:
    """The law that fits several runs of one model best: Huber's loss of log L, as in the paper.

    Args:
        curves: at least one of them with a falling learning rate, or B, C, beta and gamma are free.
        fixed: parameters that keep a value.
        delta: residual of log L at which Huber's loss turns from square to line.
        block: as in `MultiPower.predict`.

    Raises:
        UserError: if no learning rate falls, or a fixed parameter is not known.
    """
    fixed = dict(fixed or {})
    if not any(np.any(np.diff(c.learning_rates) < 0) for c in curves):
        raise UserError(
            f"curves={len(curves)}: no learning rate falls, so the law's decay cannot be fitted: "
            "add a run with decay"
        )
    if set(fixed) - set(_BOX):
        raise UserError(f"fixed={sorted(fixed)}: the parameters are {', '.join(_BOX)}")
    free = [name for name in _BOX if name not in fixed]
    predictors = [_terms(curve, block) for curve in curves]
    target = np.log(np.concatenate([curve.loss for curve in curves]))
    lowest = float(np.exp(target.min()))

    def law(logs: np.ndarray) -> MultiPower:
        return MultiPower(**fixed, **dict(zip(free, map(float, np.exp(logs)), strict=True)))

    def residuals(logs: np.ndarray) -> np.ndarray:
        made = law(logs)
        loss = np.concatenate([predictor(made) for predictor in predictors])
        return np.log(np.maximum(loss, 1e-3)) - target  # a wild step may predict less than nothing

    best = min(
        (
            least_squares(
                residuals,
                np.log([({"L0": 0.95 * lowest} | start)[name] for name in free]),
                loss="huber",
                f_scale=delta,
                x_scale="jac",
                bounds=tuple(np.log([_BOX[name] for name in free]).T),
                xtol=1e-12,
                ftol=1e-13,
                gtol=1e-13,
                max_nfev=500,
            )
            for start in _STARTS
        ),
        key=lambda result: result.cost,
    )
    return law(best.x)


def _terms(curve: LossCurve, block: int) -> Callable[[MultiPower], np.ndarray]:
    """The law's sums over a schedule, prepared once: returns a function of the law."""
    rates = np.asarray(curve.learning_rates, np.float64)
    done = np.concatenate([[0.0], np.cumsum(rates)])
    total = done[np.asarray(curve.at, np.int64) + 1]
    # The rate falls before step k, so S_k(t) = done[t + 1] - done[k].
    drops = -np.diff(rates, prepend=rates[:1])
    where = np.flatnonzero(drops)
    if block > 1 and len(where):
        group = np.unique(where // block, return_inverse=True)[1]
        size = np.bincount(group, drops[where])
        weight = np.bincount(group)
        before = np.bincount(group, done[where]) / weight
        rate = np.bincount(group, rates[where]) / weight
    else:
        size, before, rate = drops[where], done[where], rates[where]
    past = np.maximum(total[:, None] - before[None, :], 0.0)  # [points, drops]; 0: yet to come

    def loss(law: MultiPower) -> np.ndarray:
        flat = law.L0 + law.A * total**-law.alpha
        if not len(size):
            return flat
        gain = 1 - (law.C * rate**-law.gamma * past + 1) ** -law.beta
        return flat - law.B * (gain @ size)

    return loss
