"""Families of runs (corpora, architectures) under one law: what differs between them?

The surveys' "a token of better data is worth Q tokens" is one of several nested hypotheses: it
says that B differs and nothing else. On public isoFLOP grids of three corpora the asymptote E
explains more. So Q is a result of a comparison (`compare_families`), not an assumption.
"""

from collections.abc import Mapping
from dataclasses import make_dataclass
from typing import Any, ClassVar

import numpy as np

from slm_jax.scaling.laws.base import Columns, Law
from slm_jax.scaling.laws.loss import Chinchilla

LETTERS = ("E", "A", "B")


class QualityNest(Law):
    """L_j = E_j + A_j N^-alpha + B_j D^-beta for family j; alpha and beta are shared.

    Made by `quality_nest`, which says which letters have one value a family. The column `group`
    holds the family's number, from 0.

    Attributes:
        groups: families.
        separate: letters with one value a family.
    """

    groups: ClassVar[int]
    separate: ClassVar[tuple[str, ...]]
    source: ClassVar[str] = "nested forms of Hoffmann et al. 2022, arXiv 2203.15556, equation 2"
    inputs: ClassVar[tuple[str, ...]] = ("N", "D", "group")
    any_sign: ClassVar[tuple[str, ...]] = ("group",)
    units: ClassVar[Mapping[str, str]] = Chinchilla.units
    start: ClassVar[Mapping[str, tuple[float, ...]]] = Chinchilla.start

    alpha: float
    beta: float

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """One term a linear parameter: a family's own is zero for the others."""
        n, d, group = columns["N"], columns["D"], np.asarray(columns["group"])
        shape = np.broadcast(n, d, group)
        term = {"E": np.ones(shape.shape), "A": n**-self.alpha, "B": d**-self.beta}
        return tuple(
            np.where(group == int(name[1:]), term[name[0]], 0.0) if name[1:] else term[name]
            for name in self.linear
        )

    def of_group(self, j: int) -> Chinchilla:
        """The law of one family."""
        values = self.values
        letters = {k: values[f"{k}{j}"] if k in self.separate else values[k] for k in LETTERS}
        return Chinchilla(**letters, alpha=values["alpha"], beta=values["beta"])


def quality_nest(separate: str, groups: int) -> type[QualityNest]:
    """The law in which the letters of `separate` ("", "E", "B", "EA", ...) differ by family.

    Args:
        separate: letters out of E, A and B.
        groups: number of families.
    """
    letters = tuple(k for k in LETTERS if k in separate)
    linear = [
        name
        for k in LETTERS
        for name in ([f"{k}{j}" for j in range(groups)] if k in letters else [k])
    ]
    shown = {k: f"{k}_j" if k in letters else k for k in LETTERS}
    return make_dataclass(
        f"QualityNest{''.join(letters)}",
        [(name, float) for name in ("alpha", "beta", *linear)],
        bases=(QualityNest,),
        frozen=True,
        namespace={
            "linear": tuple(linear),
            "groups": groups,
            "separate": letters,
            "formula": f"L = {shown['E']} + {shown['A']}/N^alpha + {shown['B']}/D^beta",
        },
    )
