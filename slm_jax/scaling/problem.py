"""One fit as a minimisation: rows, weights, an objective, and what is free."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from slm_jax.errors import UserError
from slm_jax.scaling.laws.base import Law
from slm_jax.scaling.objectives import Objective, in_logs, residual, rho
from slm_jax.scaling.rows import Rows


class NotConverged(UserError):
    """A search stopped before it reached a minimum."""


def check(law: type[Law], rows: Rows, kind: Objective, n_free: int) -> None:
    """Refuses rows that cannot be fitted.

    Raises:
        UserError: if a column is missing, a value is not finite or not positive (where it must
            be), or there are fewer rows than free parameters.
    """
    if len(rows) < n_free:
        raise UserError(
            f"rows={len(rows)} are fewer than the {n_free} free parameters of {law.__name__}: "
            "add runs or fix parameters"
        )
    for name in (*law.inputs, law.target):
        if name in rows.labels:
            raise UserError(f"column={name!r} is text: {law.__name__} reads it as a number")
        values = rows[name]
        signed = name in law.any_sign and not (name == law.target and in_logs(kind))
        bad = ~np.isfinite(values) if signed else ~(np.isfinite(values) & (values > 0))
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            need = "finite" if signed else "positive and finite"
            raise UserError(
                f"{name}={values[i]:g} of row {i + 1} ({rows.describe(i)}) must be {need}: mend "
                f"the row or leave it out with a reason; {int(bad.sum())} such rows"
            )


@dataclass(frozen=True)
class Problem:
    """What is minimised: sum over rows of weight * rho(residual), over the free parameters.

    A search sees the logarithm of parameters that are positive, and the others as they are.

    Attributes:
        law: the form.
        columns: its inputs, float64 [n].
        target: what it is to predict, float64 [n].
        weights: of the rows, float64 [n]; a bootstrap draw is such a vector.
        kind: the objective.
        delta: where log-Huber turns from a square to a line.
        fixed: parameters that are not searched.
    """

    law: type[Law]
    columns: Mapping[str, np.ndarray]
    target: np.ndarray
    weights: np.ndarray
    kind: Objective
    delta: float
    fixed: Mapping[str, float]
    free: tuple[str, ...] = field(init=False)
    logs: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        free = tuple(name for name in self.law.names() if name not in self.fixed)
        object.__setattr__(self, "free", free)
        positive = self.law.positive_names()
        object.__setattr__(self, "logs", np.array([name in positive for name in free], bool))

    @classmethod
    def of(
        cls,
        law: type[Law],
        rows: Rows,
        kind: Objective,
        delta: float,
        fixed: Mapping[str, float],
    ) -> Self:
        """A problem on checked rows, each of weight one."""
        for name, value in fixed.items():
            if name not in law.names():
                raise UserError(
                    f"fixed={name!r} is no parameter of {law.__name__}: {', '.join(law.names())}"
                )
            if not np.isfinite(value):
                raise UserError(f"fixed={name}={value} must be finite")
            if value < 0 and name in law.positive_names():
                raise UserError(f"fixed={name}={value} must not be negative")
        check(law, rows, kind, len(law.names()) - len(fixed))
        columns = {name: rows[name] for name in law.inputs}
        return cls(law, columns, rows[law.target], np.ones(len(rows)), kind, delta, dict(fixed))

    def weighted(self, weights: np.ndarray) -> Self:
        """The same with other weights; rows of weight zero cost nothing."""
        on = weights > 0
        columns = {name: value[on] for name, value in self.columns.items()}
        return replace(self, columns=columns, target=self.target[on], weights=weights[on])

    def holding(self, **fixed: float) -> Self:
        """The same with more parameters fixed."""
        return replace(self, fixed={**self.fixed, **fixed})

    def vector(self, values: Mapping[str, float]) -> np.ndarray:
        """The point of the search with these parameters."""
        x = np.array([values[name] for name in self.free], np.float64)
        with np.errstate(divide="ignore"):
            return np.where(self.logs, np.log(np.where(self.logs, x, 1.0)), x)

    def at(self, x: np.ndarray) -> Law:
        """The law at a point of the search.

        Its parameters are NumPy scalars, so that one that runs away makes an infinite or NaN
        prediction and no ZeroDivisionError.
        """
        with np.errstate(over="ignore"):
            values = np.where(self.logs, np.exp(np.where(self.logs, x, 0.0)), x)
        fixed = {k: np.float64(v) for k, v in self.fixed.items()}
        return self.law.of({**fixed, **dict(zip(self.free, values, strict=True))})

    def predict(self, law: Law) -> np.ndarray:
        """The law on every row, float64 [n]."""
        return np.broadcast_to(np.asarray(law(**self.columns), np.float64), self.target.shape)

    def value(self, law: Law) -> float:
        """The objective; infinite where the law has no value on some row."""
        with np.errstate(all="ignore"):
            r = residual(self.kind, self.predict(law), self.target)
            total = float(self.weights @ rho(self.kind, r, self.delta)[0])
        return total if np.isfinite(total) else float("inf")

    def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Objective, its gradient, and its Gauss-Newton matrix at a point of the search.

        The last is J^T diag(weight * rho'') J plus a share of J^T J that keeps it regular when
        most residuals are beyond delta.
        """
        none = np.zeros_like(x), np.eye(len(x))
        with np.errstate(all="ignore"):
            law = self.at(x)
            prediction = self.predict(law)
            r = residual(self.kind, prediction, self.target)
            value, slope, curve = rho(self.kind, r, self.delta)
            total = float(self.weights @ value)
            if not np.isfinite(total):
                return 1e100, *none
            jac = law.jacobian(self.columns, self.free)
            jac = jac * np.where(self.logs, np.array([getattr(law, k) for k in self.free]), 1.0)
            if in_logs(self.kind):
                jac = jac / prediction[:, None]
            gradient = jac.T @ (self.weights * slope)
            if not np.isfinite(gradient).all():
                return 1e100, *none
            curve = self.weights * np.maximum(curve, 0.1)
        return total, gradient, jac.T @ (curve[:, None] * jac)

    def describe(self) -> str:
        """In a message: law, objective, rows."""
        return f"{self.law.__name__} ({self.kind}, {len(self.target)} rows)"


def grid(
    problem: Problem, names: tuple[str, ...], start: Mapping[str, Any]
) -> list[dict[str, float]]:
    """All combinations of the starting values of `names`.

    Raises:
        UserError: if one has no starting values, or the grid has more than 50,000 points.
    """
    missing = [name for name in names if not len(start.get(name, ()))]
    if missing:
        raise UserError(
            f"start={missing} of {problem.law.__name__} has no values to search from: give some"
        )
    sizes = [len(start[name]) for name in names]
    if int(np.prod(sizes)) > 50_000:
        raise UserError(f"start={dict(zip(names, sizes, strict=True))}: more than 50,000 starts")
    mesh = np.meshgrid(*(np.asarray(start[name], np.float64) for name in names), indexing="ij")
    points = np.stack([m.ravel() for m in mesh], axis=1) if names else np.zeros((1, 0))
    return [dict(zip(names, map(float, point), strict=True)) for point in points]
