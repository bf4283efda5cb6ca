"""What a fit minimises: a sum over rows of a function of the residual."""

from typing import Literal

import numpy as np

Objective = Literal["mse", "log_huber", "asymmetric"]
OBJECTIVES: tuple[Objective, ...] = ("mse", "log_huber", "asymmetric")
OVERESTIMATE_PENALTY = 10.0


def in_logs(kind: Objective) -> bool:
    """Whether the residual is log prediction - log target, or prediction - target."""
    return kind != "mse"


def residual(kind: Objective, prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Prediction minus target, in logarithms unless the objective is `mse`. Float64 [n].

    NaN where a logarithm does not exist.
    """
    if not in_logs(kind):
        return prediction - target
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(prediction) - np.log(target)


def rho(kind: Objective, r: np.ndarray, delta: float) -> tuple[np.ndarray, ...]:
    """Loss of each residual, its first and its second derivative; float64 [n] each.

    `mse`: r^2. `log_huber`: r^2 / 2 up to delta, then delta (|r| - delta / 2): Hoffmann et al.
    2022, section D.2. `asymmetric`: the same, ten times as much where the prediction lies above
    the target, so that badly tuned runs, which can only lie too high, do not lift the curve (the
    factor of OLMo-core's ladder).
    """
    if kind == "mse":
        return r * r, 2 * r, np.full_like(r, 2.0)
    size = np.abs(r)
    near = size <= delta
    value = np.where(near, 0.5 * r * r, delta * (size - 0.5 * delta))
    slope = np.clip(r, -delta, delta)
    curve = near.astype(np.float64)
    if kind == "asymmetric":
        factor = np.where(r > 0, OVERESTIMATE_PENALTY, 1.0)
        return factor * value, factor * slope, factor * curve
    return value, slope, curve
