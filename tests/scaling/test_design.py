"""Designs that cannot carry a law are named, and the next run is the one that helps most."""

import numpy as np
import pytest
from numpy.typing import ArrayLike

from slm_jax.errors import UserError
from slm_jax.scaling.design import check_design, next_run, require_design
from slm_jax.scaling.laws import Chinchilla
from slm_jax.scaling.rows import Rows

LAW = Chinchilla(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37)


def table(n: ArrayLike, d: ArrayLike) -> Rows:
    """Runs at these sizes and tokens."""
    wide = np.broadcast_arrays(np.asarray(n, float), np.asarray(d, float))
    sizes, tokens = (a.ravel() for a in wide)
    return Rows({"N": sizes, "D": tokens, "C": 6 * sizes * tokens, "loss": LAW(N=sizes, D=tokens)})


def grid() -> Rows:
    n = np.geomspace(1e7, 1e9, 6)[:, None]
    return table(n, np.geomspace(1e9, 1e11, 6)[None] * 1.7)


def texts(rows: Rows) -> str:
    return " | ".join(f"{f.severity}: {f.text}" for f in check_design(rows))


def test_a_grid_passes() -> None:
    require_design(check_design(grid()))
    assert not [f for f in check_design(grid(), budgets=False)]


def test_a_ray_is_refused() -> None:
    n = np.geomspace(1e7, 1e9, 8)
    with pytest.raises(UserError, match=r"one ray .* add runs with other D/N"):
        require_design(check_design(table(n, 20 * n)))
    with pytest.raises(UserError, match=r"N\^0\.50"):
        require_design(check_design(table(n, 1e6 * n**0.5)))


def test_too_few_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="sizes=2"):
        require_design(check_design(table(np.array([1e7, 1e8])[:, None], [1e9, 2e9, 4e9])))
    with pytest.raises(UserError, match="tokens=1"):
        require_design(check_design(table(np.geomspace(1e7, 1e9, 5), 1e10)))


def test_half_a_decade_and_edge_minima_are_warned_about() -> None:
    rows = table(np.geomspace(1e7, 3e7, 4)[:, None], np.geomspace(1e8, 1e10, 4)[None])
    assert "warning: N covers 0.48 decades" in texts(rows)
    sizes = np.geomspace(1e6, 3e7, 5)
    edge = Rows(
        {
            k: np.concatenate([table(sizes, c / (6 * sizes)).columns[k] for c in (1e21, 1e22)])
            for k in ("N", "D", "C", "loss")
        }
    )
    assert "budget 1e+21 FLOPs: lowest at the largest size" in texts(edge)


def test_the_next_run_narrows_the_interval_as_it_says() -> None:
    rows = grid()
    options = table(np.array([1e8, 1e9, 1e10]), np.array([1e10, 1e11, 3e11]))
    where = {"N": 1e10, "D": 3e11}

    def prediction(law: Chinchilla) -> float:
        return law(**where)

    found = next_run(LAW, rows, prediction, noise=0.01, candidates=options)
    assert [f.half_width for f in found] == sorted(f.half_width for f in found)
    assert found[0].N == 1e10  # to measure what is asked for
    # Against the sampling spread of refits by linear least squares, with and without that run.
    assert found[0].half_width < found[-1].half_width <= found[0].before

    names = list(LAW.values)

    def gradient(at: Rows) -> np.ndarray:
        columns = []
        for name in names:
            eps = 1e-6 * LAW.values[name]
            up, down = (
                Chinchilla(**(LAW.values | {name: LAW.values[name] + s})) for s in (eps, -eps)
            )
            diff = np.log(up.predict(at.columns)) - np.log(down.predict(at.columns))
            columns.append(diff / (2 * eps))
        return np.stack(columns, 1) * np.array([LAW.values[n] for n in names])

    both = np.concatenate([gradient(rows), gradient(options.take([2]))])
    g = gradient(table(np.array([1e10]), np.array([3e11])))[0] * LAW(**where)
    for jacobian, half in ((gradient(rows), found[0].before), (both, found[0].half_width)):
        variance = g @ np.linalg.pinv(jacobian.T @ jacobian) @ g
        assert half == pytest.approx(1.645 * 0.01 * np.sqrt(variance), rel=1e-3)


def test_rows_that_do_not_determine_the_law_are_refused() -> None:
    n = np.geomspace(1e7, 1e9, 3)
    with pytest.raises(UserError, match="do not determine"):
        next_run(LAW, table(n, 20 * n), lambda law: law(N=1e9, D=1e9), noise=0.1, candidates=grid())
