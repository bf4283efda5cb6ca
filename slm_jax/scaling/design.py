"""Can these runs answer the question? Checks before a fit, and the run to do next.

Runs on one ray D = k N cannot tell A/N^alpha from B/D^beta; an isoFLOP curve whose lowest point is
at its edge has no minimum; half a decade of sizes fixes no exponent. Such designs give confident
numbers that miss, so they are refused or named.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from slm_jax.errors import UserError
from slm_jax.scaling.isoflop import isoflop
from slm_jax.scaling.laws import Law
from slm_jax.scaling.rows import Rows

_RAY = 0.1  # spread of log D beside its line on log N below which N and D are one variable


@dataclass(frozen=True)
class Finding:
    """What is wrong with a design.

    Attributes:
        severity: "error" if a law of N and D cannot be fitted, "warning" if its numbers are weak.
        text: what, with the number, and the remedy.
    """

    severity: Literal["error", "warning"]
    text: str


def check_design(rows: Rows, *, budgets: bool | None = None) -> tuple[Finding, ...]:
    """Looks for designs that cannot carry a law of N and D.

    Args:
        rows: with N, D, C and loss.
        budgets: whether the runs are meant as isoFLOP curves; default: if at least two budgets
            have three sizes or more.
    """
    found: list[Finding] = []
    log_n, log_d = np.log(rows["N"]), np.log(rows["D"])
    sizes = np.unique(rows["N"])
    if len(sizes) < 3:
        found.append(
            Finding("error", f"sizes={len(sizes)}: an exponent of N needs 3 different N or more")
        )
    if len(np.unique(rows["D"])) < 3:
        n = len(np.unique(rows["D"]))
        found.append(Finding("error", f"tokens={n}: an exponent of D needs 3 different D or more"))
    if not found:
        line = np.polyfit(log_n, log_d, 1)
        beside = float(np.std(log_d - np.polyval(line, log_n)))
        if beside < _RAY:
            found.append(
                Finding(
                    "error",
                    f"D is proportional to N^{line[0]:.2f} within {100 * beside:.1f} %: on one ray "
                    "A/N^alpha and B/D^beta cannot be told apart: add runs with other D/N",
                )
            )
    decades = float(np.ptp(log_n) / np.log(10))
    if decades < 1:
        found.append(
            Finding("warning", f"N covers {decades:.2f} decades: an exponent of N needs 1 or more")
        )
    curves = isoflop(rows)
    several = [m for m in curves.minima if m.points >= 3]
    if budgets if budgets is not None else len(several) >= 2:
        for m in curves.minima:
            if m.problem:
                found.append(Finding("warning", f"budget {m.C:.3g} FLOPs: {m.problem}"))
    return tuple(found)


def require_design(findings: Sequence[Finding]) -> None:
    """Refuses a design with errors.

    Raises:
        UserError: naming all of them.
    """
    errors = [f.text for f in findings if f.severity == "error"]
    if errors:
        raise UserError("; ".join(errors))


@dataclass(frozen=True)
class NextRun:
    """A run that could be done.

    Attributes:
        N: parameters.
        D: tokens.
        C: 6 N D.
        half_width: of the 90 % interval of the prediction after it, in the prediction's unit.
        before: the same without it.
    """

    N: float
    D: float
    C: float
    half_width: float
    before: float


def next_run[L: Law](
    law: L,
    rows: Rows,
    prediction: Callable[[L], float],
    *,
    noise: float,
    candidates: Rows,
) -> tuple[NextRun, ...]:
    """Orders possible runs by how much they narrow the interval of a prediction.

    Linearised: the variance of the prediction is g' (J'J)^-1 g noise^2 with g its gradient and J
    that of log loss, both by the parameters; one more row is one more row of J (c-optimal design,
    Elfving 1952). The loss of the new run need not be known.

    Args:
        law: the fit so far.
        rows: what it was fitted to.
        prediction: what is to be known, such as `lambda law: law(N=1e9, D=2e10)`.
        noise: standard deviation of log loss between runs.
        candidates: possible runs, with the law's inputs, N and D.

    Returns:
        The candidates, best first.

    Raises:
        UserError: if the rows do not determine the law (J has not full rank).
    """
    jacobian = _log_gradient(law, lambda changed: np.log(changed.predict(rows.columns)))
    gradient = _log_gradient(law, lambda changed: np.atleast_1d(prediction(changed)))[0]
    names = law.names()
    if np.linalg.matrix_rank(jacobian) < len(names):
        raise UserError(
            f"rows={len(rows)} do not determine {', '.join(names)}: add runs with other N and D/N"
        )
    covariance = np.linalg.inv(jacobian.T @ jacobian)
    before = float(gradient @ covariance @ gradient)
    new = _log_gradient(law, lambda changed: np.log(changed.predict(candidates.columns)))
    reach = new @ covariance  # [candidates, parameters]
    gain = (reach @ gradient) ** 2 / (1 + np.sum(reach * new, axis=1))

    def width(variance: float) -> float:
        return float(1.645 * noise * np.sqrt(max(variance, 0.0)))

    order = np.argsort(-gain, kind="stable")
    n, d = candidates["N"], candidates["D"]
    return tuple(
        NextRun(
            float(n[i]), float(d[i]), float(6 * n[i] * d[i]), width(before - gain[i]), width(before)
        )
        for i in order
    )


def _log_gradient[L: Law](law: L, f: Callable[[L], np.ndarray]) -> np.ndarray:
    """Derivatives of `f(law)`, `[n]`, by the logarithms of the parameters, `[n, parameters]`."""
    step = 1e-5
    columns = []
    for name, value in law.values.items():
        up, down = (type(law).of(law.values | {name: value * (1 + s)}) for s in (step, -step))
        columns.append((f(up) - f(down)) / (2 * step))
    return np.stack(columns, axis=1)
