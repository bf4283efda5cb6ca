"""Tables of runs drawn from known laws."""

from collections.abc import Mapping

import numpy as np
import pytest

from slm_jax.scaling.fit import fit
from slm_jax.scaling.laws import LAWS, Chinchilla, Law
from slm_jax.scaling.rows import Rows

LAW = Chinchilla(E=1.2, A=300.0, B=900.0, alpha=0.45, beta=0.42)
BUDGETS = 1e17 * 2.0 ** np.arange(5)


def isoflop_table(
    law: Chinchilla = LAW, *, noise: float = 0.004, seed: int = 0, family: str = "dense"
) -> Rows:
    """Nine sizes at five budgets; every size is one run that serves all budgets."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(2e6, 3e8, 9)
    n, c = (a.ravel() for a in np.meshgrid(sizes, BUDGETS))
    d = c / (6 * n)
    loss = law(N=n, D=d) * np.exp(noise * rng.standard_normal(len(n)))
    kept = (d / n > 2) & (d / n < 5000)
    rows = Rows(
        {"N": n, "D": d, "C": c, "loss": loss},
        {
            "run": np.array([f"{family}-{x:.3g}" for x in n]),
            "family": np.full(len(n), family),
        },
    )
    return rows.take(kept)


def csv_text(rows: Rows, names: dict[str, str] | None = None) -> str:
    """The table as CSV, some columns renamed, nothing rounded."""
    names = names or {}
    columns = {**rows.labels, **rows.columns}
    lines = [",".join(names.get(k, k) for k in columns)]
    lines += [
        ",".join(v[i] if k in rows.labels else repr(float(v[i])) for k, v in columns.items())
        for i in range(len(rows))
    ]
    return "\n".join(lines) + "\n"


def check_recovery(law: Law, columns: Mapping[str, np.ndarray]) -> None:
    """Fits what the law itself gives: its parameters come back to 1e-6."""
    inputs = {name: columns[name] for name in law.inputs}
    found = fit(type(law), Rows({**inputs, law.target: law.predict(columns)}))
    for name, value in law.values.items():
        assert found.law.values[name] == pytest.approx(value, rel=1e-6), name
    assert LAWS[type(law).__name__] is type(law)
