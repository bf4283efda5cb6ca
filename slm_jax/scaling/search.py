"""Two searches: variable projection for squares, quasi-Newton from many starts for the rest."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.optimize

from slm_jax.errors import UserError
from slm_jax.scaling.laws.base import Law
from slm_jax.scaling.problem import NotConverged, Problem, grid

Start = Mapping[str, Sequence[float]]
_PROJECTED = 6  # grid points refined by variable projection
_REFINED = 24  # grid points refined by the quasi-Newton search, of all that are screened


class Projection:
    """Least squares in the linear parameters (all >= 0), given the others."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.linear = tuple(k for k in problem.law.linear if k in problem.free)
        self.nonlinear = tuple(k for k in problem.free if k not in self.linear)
        positive = problem.law.positive_names()
        self.logs = np.array([k in positive for k in self.nonlinear], bool)
        self.root = np.sqrt(problem.weights)

    def vector(self, values: Mapping[str, float]) -> np.ndarray:
        """The parameters that are searched, positive ones in logarithms."""
        x = np.array([values[k] for k in self.nonlinear], np.float64)
        return np.where(self.logs, np.log(np.where(self.logs, x, 1.0)), x)

    def values(self, x: np.ndarray) -> dict[str, float]:
        """The inverse of `vector`."""
        with np.errstate(over="ignore"):
            v = np.where(self.logs, np.exp(np.where(self.logs, x, 0.0)), x)
        return dict(zip(self.nonlinear, map(float, v), strict=True))

    def solve(
        self, values: Mapping[str, float], relative: bool = False
    ) -> tuple[Law, np.ndarray, np.ndarray, np.ndarray]:
        """The law of least squares with these nonlinear parameters.

        Args:
            values: of the parameters outside `linear` that are free.
            relative: minimise the residuals over the target instead.

        Returns:
            The law, its weighted residuals [n], the weighted terms [n, linear], and which of
            them have a coefficient above zero.
        """
        p = self.problem
        given = {**dict.fromkeys(p.law.linear, 0.0), **values, **p.fixed}
        given = {k: np.float64(v) for k, v in given.items()}
        law = p.law.of(given)
        n = len(p.target)
        terms = dict(zip(p.law.linear, law.basis(p.columns), strict=True))
        rest = sum((p.fixed[k] * terms[k] for k in terms if k in p.fixed), start=np.zeros(n))
        root = self.root / p.target if relative else self.root
        matrix = np.empty((n, len(self.linear)))
        for i, name in enumerate(self.linear):
            matrix[:, i] = root * terms[name]
        y = root * (p.target - rest)
        scale = np.linalg.norm(matrix, axis=0)
        if not (np.isfinite(scale).all() and np.isfinite(y).all()):
            raise FloatingPointError("the law overflows")
        scaled = matrix / np.where(scale > 0, scale, 1.0)
        # NNLS says which coefficients are positive; QR on those is accurate to rounding.
        try:
            found = scipy.optimize.nnls(scaled, y)[0] if self.linear else np.zeros(0)
        except RuntimeError as error:  # its iterations ran out
            raise FloatingPointError(str(error)) from error
        on = (found > 0) & (scale > 0)  # a term may underflow
        if on.any():
            exact = np.linalg.lstsq(scaled[:, on], y, rcond=None)[0]
            if (exact > 0).all():
                found[on] = exact
        found = found / np.where(scale > 0, scale, 1.0)
        law = p.law.of({**given, **dict(zip(self.linear, found, strict=True))})
        return law, matrix @ found - y, matrix, on

    def residuals(self, x: np.ndarray) -> np.ndarray:
        """Weighted residuals at a point of the search; huge where the law overflows."""
        try:
            with np.errstate(all="ignore"):
                return self.solve(self.values(x))[1]
        except FloatingPointError:
            return np.full(len(self.problem.target), 1e100)

    def jacobian(self, x: np.ndarray) -> np.ndarray:
        """Of `residuals`, after Kaufman 1975: its product with the residuals is exact."""
        p = self.problem
        law, _, matrix, on = self.solve(self.values(x))
        by = law.slopes(p.columns)
        inner = np.array([getattr(law, k) for k in self.nonlinear])
        columns = []
        for name in self.nonlinear:
            pairs = zip(p.law.linear, by[name], strict=True)
            total = sum((getattr(law, k) * t for k, t in pairs), start=np.zeros(len(p.target)))
            columns.append(self.root * total)
        jac = np.stack(columns, axis=1) * np.where(self.logs, inner, 1.0)
        if on.any():
            q = np.linalg.qr(matrix[:, on] / np.linalg.norm(matrix[:, on], axis=0))[0]
            jac = jac - q @ (q.T @ jac)
        return jac

    def refine(self, x: np.ndarray, tolerance: float = 1e-15) -> Law:
        """The minimum that is reached from a point of the search.

        Args:
            x: the point.
            tolerance: relative, of the sum of squares and of the point.

        Raises:
            NotConverged: if none is.
        """
        try:
            return self._refine(x, tolerance)
        except (FloatingPointError, np.linalg.LinAlgError) as error:
            raise NotConverged(
                f"fit={self.problem.describe()}: variable projection broke down ({error}): fix a "
                "parameter or give other starts"
            ) from error

    def _refine(self, x: np.ndarray, tolerance: float) -> Law:
        if not self.nonlinear:
            return self.solve({})[0]
        found = scipy.optimize.least_squares(
            self.residuals,
            x,
            self.jacobian,
            x_scale="jac",
            ftol=tolerance,
            xtol=tolerance,
            gtol=1e-15,
            max_nfev=500,
        )
        law, r, *_ = self.solve(self.values(found.x))
        total = float(r @ r)
        # What a step along the Jacobian could still take off the sum of squares.
        basis, size, _ = np.linalg.svd(self.jacobian(found.x), full_matrices=False)
        promise = float(np.sum((basis[:, size > 1e-12 * size.max()].T @ r) ** 2))
        exact = 1e-20 * float(self.problem.weights @ self.problem.target**2)
        if found.status <= 0 or promise > 1e-7 * total + exact:
            raise NotConverged(
                f"fit={self.problem.describe()}: variable projection did not converge "
                f"({found.message}): fix a parameter or add rows"
            )
        return law


def variable_projection(problem: Problem, start: Start) -> tuple[Law, int]:
    """Global least squares: a grid over the nonlinear parameters, NNLS inside, then refinement.

    Golub and Pereyra 1973 (variable projection), Lawson and Hanson 1974 (NNLS).

    Returns:
        The law, and the number of grid points.

    Raises:
        NotConverged: if no search from the best grid points converges.
    """
    inner = Projection(problem)
    points = grid(problem, inner.nonlinear, start)
    screened = []
    for point in points:
        x = inner.vector(point)
        screened.append((float(np.sum(inner.residuals(x) ** 2)), tuple(x)))
    return _best(problem, [np.array(x) for _, x in sorted(screened)[:_PROJECTED]], inner.refine), (
        len(points)
    )


def quasi_newton(problem: Problem, start: Start) -> tuple[Law, int]:
    """Minimises any objective from a grid of starts.

    The grid is over the nonlinear parameters; a linear parameter without starting values begins
    at its least-squares value there (relative residuals). All points are screened on the
    objective and the best are refined.

    Returns:
        The law, and the number of grid points.

    Raises:
        NotConverged: if no search converges.
    """
    inner = Projection(problem)
    given = tuple(k for k in problem.free if k in inner.nonlinear or k in start)
    points = grid(problem, given, start)
    screened = []
    for point in points:
        with np.errstate(all="ignore"):
            x = problem.vector(_complete(inner, point))
            if np.isfinite(x).all():
                screened.append((problem.value(problem.at(x)), tuple(x)))
    finite = sorted(s for s in screened if np.isfinite(s[0]))
    if not finite:
        raise NotConverged(
            f"fit={problem.describe()}: the objective is finite at no start: give other starts"
        )
    starts = [np.array(x) for _, x in finite[:_REFINED]]
    return _best(problem, starts, lambda x: minimise(problem, x)), len(points)


def _complete(inner: Projection, point: Mapping[str, float]) -> dict[str, float]:
    p = inner.problem
    if not inner.linear or all(k in point for k in inner.linear):
        return dict(point)
    try:
        law, _, matrix, _ = inner.solve({k: point[k] for k in inner.nonlinear}, relative=True)
    except FloatingPointError:
        return dict.fromkeys(p.free, float("nan"))
    typical = np.abs(matrix).mean(axis=0)
    found = {}
    for name, size in zip(inner.linear, typical, strict=True):
        # A search in logarithms cannot begin at zero: begin at a thousandth of the target.
        found[name] = max(getattr(law, name), 1e-3 / size if size > 0 else 1.0)
    return {**found, **point}


def _best(
    problem: Problem, starts: Sequence[np.ndarray], refine: Callable[[np.ndarray], Law]
) -> Law:
    found: list[tuple[float, int, Law]] = []
    failure: NotConverged | None = None
    for i, x in enumerate(starts):
        try:
            law = refine(x)
        except NotConverged as error:
            failure = error
            continue
        found.append((problem.value(law), i, law))
    if not found:
        raise failure or NotConverged(f"fit={problem.describe()}: nothing to start from")
    return min(found)[2]


def minimise(problem: Problem, x: np.ndarray) -> Law:
    """The minimum that is reached from `x`: BFGS, then Newton steps.

    Raises:
        NotConverged: if the last Newton step still promises more than 1e-7 of the objective.
    """
    value, _, model = problem.value_and_gradient(x)
    # The objective may be of any size, and BFGS stops at an absolute gradient: work relative to
    # the start. Averaging instead of summing is how the published Chinchilla fit stopped early.
    unit = max(value, 1e-300)
    found = scipy.optimize.minimize(
        lambda x: tuple(part / unit for part in problem.value_and_gradient(x)[:2]),
        x,
        jac=True,
        method="BFGS",
        options={"gtol": 1e-9, "maxiter": 2000, "hess_inv0": _inverse(model / unit, 1e-9)},
    )
    x = found.x
    value, gradient, _ = problem.value_and_gradient(x)
    for _ in range(50):
        step = _inverse(_hessian(problem, x)) @ gradient
        promise = 0.5 * float(gradient @ step)
        if promise <= 1e-14 * value:
            break
        for shrink in 0.5 ** np.arange(12):
            new = problem.value_and_gradient(x - shrink * step)
            if new[0] < value:
                break
        else:
            break
        x, value, gradient = x - shrink * step, new[0], new[1]
    exact = 1e-22 * float(problem.weights.sum())
    if not (np.isfinite(value) and value < 1e99) or promise > 1e-7 * value + exact:
        raise NotConverged(
            f"fit={problem.describe()}: the search did not converge (objective {value:.6g}, "
            f"{promise:.2g} below it in reach): fix a parameter, add rows or give other starts"
        )
    return problem.at(x)


def _hessian(problem: Problem, x: np.ndarray) -> np.ndarray:
    """Central differences of the exact gradient."""
    steps = 1e-5 * np.where(problem.logs, 1.0, np.maximum(np.abs(x), 1e-3))
    rows = []
    for e, step in zip(np.diag(steps), steps, strict=True):
        up = problem.value_and_gradient(x + e)[1]
        rows.append((up - problem.value_and_gradient(x - e)[1]) / (2 * step))
    matrix = np.array(rows)
    return 0.5 * (matrix + matrix.T)


def _inverse(matrix: np.ndarray, smallest: float = 1e-14) -> np.ndarray:
    """A positive definite inverse: eigenvalues by size, raised to a share of the largest."""
    if not np.isfinite(matrix).all():
        raise UserError("objective is not finite near a start: give other starts")
    values, vectors = np.linalg.eigh(matrix)
    size = np.abs(values)
    floor = max(float(size.max()) * smallest, 1e-300)
    half = vectors / np.sqrt(np.maximum(size, floor))
    return half @ half.T
