"""Fits a law to a table of runs, and says how."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from slm_jax.errors import UserError
from slm_jax.scaling.laws import LAWS
from slm_jax.scaling.laws.base import Law
from slm_jax.scaling.objectives import OBJECTIVES, OVERESTIMATE_PENALTY, Objective, in_logs
from slm_jax.scaling.problem import Problem
from slm_jax.scaling.rows import Dropped, Rows
from slm_jax.scaling.search import quasi_newton, variable_projection

Method = Literal["vpnls", "lse"]
FORMAT = "slm_jax.scaling.fit/1"
_UNDETERMINED = 1e8  # condition beyond which rounding alone moves a parameter: 1 / sqrt(epsilon)
_SHOWN = 5  # left-out rows that a card lists
_METHODS = {
    "vpnls": "variable projection: a grid over the parameters in which the law is not linear, "
    "non-negative least squares inside, then refinement",
    "lse": "quasi-Newton search over the logarithms of positive parameters, from a grid of starts",
}
_KEYS = (
    *("law", "parameters", "method", "objective", "delta", "value", "residuals", "rmse"),
    *("condition", "starts", "fixed", "dropped", "digest"),
)


@dataclass(frozen=True)
class Fit:
    """A fitted law and where it came from.

    Attributes:
        law: with the fitted values.
        method: `vpnls` or `lse`.
        objective: `mse`, `log_huber` or `asymmetric`.
        delta: of the Huber objectives.
        value: the objective at the minimum, a sum over rows.
        n: rows.
        residuals: log target - log prediction of each row, [n] (target - prediction where the
            target may be negative).
        rmse: root mean square of target - prediction, in the target's unit (nats a token).
        condition: ratio of the extreme singular values of the Jacobian of the predictions by the
            logarithms of the free parameters; infinite if one of them has no effect.
        starts: grid points that were tried.
        fixed: parameters that were given.
        dropped: rows that were left out before, with reasons.
        digest: sha256 of the table (`Rows.digest`).
    """

    law: Law
    method: Method
    objective: Objective
    delta: float
    value: float
    n: int
    residuals: tuple[float, ...]
    rmse: float
    condition: float
    starts: int
    fixed: Mapping[str, float]
    dropped: tuple[Dropped, ...]
    digest: str

    @property
    def free(self) -> tuple[str, ...]:
        """Parameters that were fitted."""
        return tuple(name for name in self.law.names() if name not in self.fixed)

    @property
    def at_zero(self) -> tuple[str, ...]:
        """Fitted parameters that ended at their bound, zero."""
        values = self.law.values
        return tuple(k for k in self.free if k in self.law.positive_names() and values[k] == 0)

    @property
    def determined(self) -> bool:
        """Whether the rows determine every fitted parameter, noise apart (condition < 1e8)."""
        return self.condition < _UNDETERMINED

    def problem(self, rows: Rows) -> Problem:
        """What was minimised, for those who refit it.

        Raises:
            UserError: if `rows` is not the table of this fit.
        """
        if rows.digest() != self.digest:
            raise UserError(
                f"rows={rows.digest()[:12]} is not the table of this fit ({self.digest[:12]}): "
                "pass the rows that were fitted"
            )
        return Problem.of(type(self.law), rows, self.objective, self.delta, self.fixed)

    def card(self, intervals: Mapping[str, tuple[float, float]] | None = None) -> str:
        """Markdown: how this was fitted.

        Args:
            intervals: of parameters, to be printed beside them.
        """
        law, intervals = self.law, intervals or {}
        lines = [
            f"### How this was fitted: {type(law).__name__}",
            "",
            f"- law: `{law.formula}` ({law.source})",
            f"- rows: {self.n}, sha256 {self.digest[:16]}; residuals: rmse {self.rmse:.4g} "
            f"({law.target})",
            f"- objective: {_objective(self.objective, self.delta)} = {self.value:.8g}, the sum "
            "over rows",
            f"- method: {self.method}, {_METHODS[self.method]}; {self.starts} starts; float64",
            f"- condition number of the Jacobian by log parameters: {self.condition:.3g}",
            *([] if self.determined else ["- **these rows do not determine every parameter**"]),
            f"- format: {FORMAT}",
            *(
                f"- left out, {len(d.rows)} rows ({d.reason}): {_shown(d.rows)}"
                for d in self.dropped
            ),
            *([f"- at the bound zero: {', '.join(self.at_zero)}"] if self.at_zero else []),
            "",
            "| parameter | value | interval | unit |",
            "|---|---|---|---|",
        ]
        for name, value in law.values.items():
            if name in self.fixed:
                spread = "fixed"
            elif name in intervals:
                spread = "{:.5g} to {:.5g}".format(*intervals[name])
            else:
                spread = "not computed"
            lines.append(f"| {name} | {value:.6g} | {spread} | {law.units.get(name, '')} |")
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Everything, as text; `from_json` gives it back to the last bit."""
        return json.dumps(
            {
                "format": FORMAT,
                "law": type(self.law).__name__,
                "parameters": self.law.values,
                "method": self.method,
                "objective": self.objective,
                "delta": self.delta,
                "value": self.value,
                "residuals": list(self.residuals),
                "rmse": self.rmse,
                "condition": self.condition if np.isfinite(self.condition) else None,
                "starts": self.starts,
                "fixed": dict(self.fixed),
                "dropped": [{"reason": d.reason, "rows": list(d.rows)} for d in self.dropped],
                "digest": self.digest,
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, law: type[Law] | None = None) -> Self:
        """Reads what `to_json` wrote.

        Args:
            text: the JSON.
            law: the law it must be of; default the one it names.

        Raises:
            UserError: if it is not JSON of this format, or of another law.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"fit={text[:20]!r}... is not JSON ({error}): pass a saved fit") from (
                error
            )
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise UserError(f"format={found!r} is not {FORMAT!r}: fit again with this version")
        missing = sorted(set(_KEYS) - set(data))
        if missing:
            raise UserError(f"fit={missing} is missing from the JSON: save the fit again")
        form = law or LAWS.get(data["law"])
        if form is None or form.__name__ != data["law"]:
            expected = form.__name__ if form else f"one of {', '.join(LAWS)}"
            raise UserError(f"law={data['law']!r} is not {expected}: pass a fit of that law")
        if set(data["parameters"]) != set(form.names()):
            raise UserError(
                f"parameters={sorted(data['parameters'])} are not those of {form.__name__} "
                f"({', '.join(form.names())}): fit again with this version"
            )
        return cls(
            law=form.of(data["parameters"]),
            method=data["method"],
            objective=data["objective"],
            delta=data["delta"],
            value=data["value"],
            n=len(data["residuals"]),
            residuals=tuple(data["residuals"]),
            rmse=data["rmse"],
            condition=float("inf") if data["condition"] is None else data["condition"],
            starts=data["starts"],
            fixed=data["fixed"],
            dropped=tuple(Dropped(d["reason"], tuple(d["rows"])) for d in data["dropped"]),
            digest=data["digest"],
        )


def fit(
    law: type[Law],
    rows: Rows,
    *,
    method: Method | None = None,
    objective: Objective | None = None,
    fixed: Mapping[str, float] | None = None,
    delta: float = 1e-3,
    start: Mapping[str, Sequence[float]] | None = None,
) -> Fit:
    """Fits a law to a table of runs, in float64.

    Args:
        law: the form, such as `Chinchilla`.
        rows: with the columns `law.inputs` and `law.target`.
        method: `vpnls`, variable projection (Golub and Pereyra 1973), which is global in the
            parameters in which the law is linear and has no starts to choose; or `lse`, the
            search of Hoffmann et al. 2022 (section D.2), for any objective and any law. Default
            `vpnls`, and `lse` for a law that is not linear in any parameter.
        objective: default `mse` for vpnls, `log_huber` for lse. All are sums over rows.
        fixed: parameters that keep a value.
        delta: residual (in logs) at which log_huber and asymmetric turn from square to line.
        start: values to search from, instead of `law.start`, for any of the parameters.

    Raises:
        UserError: if the rows cannot be fitted, an argument is not known, or the search did not
            converge.
    """
    if method is None:
        method = "vpnls" if law.linear else "lse"
    if method not in _METHODS:
        raise UserError(f"method={method!r} is not known: choose from {', '.join(_METHODS)}")
    if objective is None:
        objective = "mse" if method == "vpnls" else "log_huber"
    if objective not in OBJECTIVES:
        raise UserError(f"objective={objective!r} is not known: choose from {OBJECTIVES}")
    if method == "vpnls" and objective != "mse":
        raise UserError(f"objective={objective!r} is not one of vpnls: use mse, or method='lse'")
    if method == "vpnls" and not law.linear:
        raise UserError(
            f"method='vpnls' needs a law that is linear in some parameters and {law.__name__} is "
            "not: use method='lse'"
        )
    if not delta > 0:
        raise UserError(f"delta={delta} must be positive: Hoffmann et al. use 1e-3")
    unknown = set(start or {}) - set(law.names())
    if unknown:
        raise UserError(f"start={sorted(unknown)} are no parameters of {law.__name__}")
    problem = Problem.of(law, rows, objective, delta, fixed or {})
    if not problem.free:
        raise UserError(f"fixed={sorted(problem.fixed)} leaves nothing of {law.__name__} to fit")
    search = variable_projection if method == "vpnls" else quasi_newton
    found, starts = search(problem, {**law.start, **(start or {})})
    prediction = problem.predict(found)
    gap = problem.target - prediction
    logs = law.target not in law.any_sign
    return Fit(
        law=law.of(found.values),
        method=method,
        objective=objective,
        delta=delta,
        value=problem.value(found),
        n=len(rows),
        residuals=tuple((np.log(problem.target / prediction) if logs else gap).tolist()),
        rmse=float(np.sqrt(np.mean(gap**2))),
        condition=_condition(problem, found),
        starts=starts,
        fixed=dict(fixed or {}),
        dropped=rows.dropped,
        digest=rows.digest(),
    )


def objective(law: Law, rows: Rows, kind: Objective = "log_huber", delta: float = 1e-3) -> float:
    """The objective of given constants on a table, a sum over rows.

    Raises:
        UserError: as `fit`.
    """
    if kind not in OBJECTIVES:
        raise UserError(f"objective={kind!r} is not known: choose from {OBJECTIVES}")
    return Problem.of(type(law), rows, kind, delta, law.values).value(law)


def _condition(problem: Problem, law: Law) -> float:
    if not problem.free:
        return 1.0
    values = np.array([getattr(law, name) for name in problem.free])
    jac = law.jacobian(problem.columns, problem.free) * values
    if in_logs(problem.kind):
        jac = jac / problem.predict(law)[:, None]
    sizes = np.linalg.svd(jac, compute_uv=False)
    return float(sizes[0] / sizes[-1]) if sizes[-1] > 0 else float("inf")


def _shown(rows: Sequence[str]) -> str:
    """The first rows; `to_json` has all."""
    more = f"; and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return "; ".join(rows[:_SHOWN]) + more


def _objective(kind: Objective, delta: float) -> str:
    if kind == "mse":
        return "squared error"
    text = f"Huber (delta {delta:g}) of log prediction - log target"
    if kind == "asymmetric":
        text += f", x{OVERESTIMATE_PENALTY:g} where the prediction is above the target"
    return text
