"""What a law is: a formula with named parameters, units and a source."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np

from slm_jax.errors import UserError

Columns = Mapping[str, Any]
_STEP = 1e-30  # of the complex-step derivative: no subtraction, so no rounding


@dataclass(frozen=True)
class Published:
    """Constants as printed somewhere.

    Attributes:
        values: parameters of the law by name.
        source: paper and table, or repository.
    """

    values: Mapping[str, float]
    source: str


class Law:
    """Base of the laws: frozen dataclasses whose fields are the parameters.

    A law is called with its inputs by name, `law(N=1e9, D=2e10)`, on numbers or NumPy arrays, and
    returns what it predicts: a loss in nats a token unless the class says otherwise. A fit
    differentiates it by complex steps (`jacobian`), so a formula must be made of functions that
    NumPy extends to complex numbers (powers, exp, log, tanh, where, minimum; not abs or interp)
    and must not force its values to float.

    Class attributes:
        formula: as printed in reports.
        source: paper and section or equation.
        inputs: names of the columns it needs.
        units: of parameters and inputs that have any.
        linear: parameters, all >= 0, in which the prediction is linear once the others are known:
            `prediction = basis(columns) @ linear`. Variable projection needs at least one.
        positive: parameters > 0; they are searched on a logarithmic scale. Default: all.
        start: for each parameter outside `linear`, or for all of them, the values that a search
            starts from (its grid).
        target: the column it predicts.
        any_sign: inputs (or the target) in which zero and negative values are meant.
        published: constants from the literature, by a short name.
    """

    formula: ClassVar[str]
    source: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ("N", "D")
    units: ClassVar[Mapping[str, str]] = {}
    linear: ClassVar[tuple[str, ...]] = ()
    positive: ClassVar[tuple[str, ...] | None] = None
    start: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    target: ClassVar[str] = "loss"
    any_sign: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[Mapping[str, Published]] = {}

    def __call__(self, **columns: Any) -> Any:
        """The prediction for columns that broadcast against each other."""
        basis = self.basis(columns)
        parts = [getattr(self, name) * term for name, term in zip(self.linear, basis, strict=True)]
        return sum(parts[1:], start=parts[0])

    def basis(self, columns: Columns) -> tuple[Any, ...]:
        """One term a parameter of `linear`, each broadcastable to the prediction.

        Only parameters outside `linear` may be read here.
        """
        raise NotImplementedError(f"{type(self).__name__} is not linear in any parameter")

    def slopes(self, columns: Columns) -> dict[str, tuple[Any, ...]]:
        """Derivatives of the terms of `basis` by each parameter outside `linear`.

        The default is the complex step, exact to rounding; a law that is fitted thousands of
        times may give the formulas.
        """

        def terms(law: Law) -> np.ndarray:
            return np.stack(np.broadcast_arrays(*law.basis(columns)))

        return {name: tuple(self._complex_step(name, terms)) for name in self.nonlinear()}

    def jacobian(self, columns: Columns, names: Sequence[str]) -> np.ndarray:
        """Derivatives of the prediction by the parameters `names`: [rows, parameters]."""
        by: dict[str, Any] = {}
        if self.linear:
            by |= dict(zip(self.linear, self.basis(columns), strict=True))
            if set(names) - set(self.linear):
                for name, terms in self.slopes(columns).items():
                    pairs = zip(self.linear, terms, strict=True)
                    by[name] = sum(getattr(self, k) * term for k, term in pairs)
        else:
            by = {name: self._complex_step(name, lambda law: law(**columns)) for name in names}
        n = max(np.size(value) for value in columns.values())
        return np.stack([np.broadcast_to(by[name], n) for name in names], axis=1)

    def _complex_step(self, name: str, function: Callable[["Law"], Any]) -> np.ndarray:
        values = {k: getattr(self, k) for k in self.names()}
        values[name] = values[name] + 1j * _STEP
        with warnings.catch_warnings():
            # A formula that drops the imaginary part would have a derivative of zero.
            warnings.simplefilter("error", np.exceptions.ComplexWarning)
            return np.imag(np.asarray(function(type(self).of(values)))) / _STEP

    @classmethod
    def from_published(cls, name: str) -> Self:
        """The law with constants from the literature.

        Raises:
            UserError: if there are none of that name.
        """
        if name not in cls.published:
            names = ", ".join(cls.published) or "none"
            raise UserError(f"published={name!r} is not known for {cls.__name__}: it has {names}")
        return cls.of(cls.published[name].values)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All parameters, in their order."""
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]

    @classmethod
    def nonlinear(cls) -> tuple[str, ...]:
        """Parameters outside `linear`."""
        return tuple(n for n in cls.names() if n not in cls.linear)

    @classmethod
    def positive_names(cls) -> tuple[str, ...]:
        """Parameters that are searched on a logarithmic scale."""
        return cls.names() if cls.positive is None else cls.positive

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The law with these parameters."""
        return cls(**{name: values[name] for name in cls.names()})

    @property
    def values(self) -> dict[str, float]:
        """Parameters by name."""
        return {name: float(getattr(self, name)) for name in self.names()}

    def predict(self, columns: Columns) -> np.ndarray:
        """The prediction for the rows of a table that has (at least) the law's inputs."""
        given = {name: np.asarray(columns[name], np.float64) for name in self.inputs}
        return np.asarray(self(**given), np.float64)

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value:.5g}" for name, value in self.values.items())
        return f"{self.formula} with {values}"
