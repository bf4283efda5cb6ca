"""What the trainer trains: a `Task` says what the model is and what its loss is."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax


class Loss(NamedTuple):
    """A sum and its weight, kept apart so that microbatches add up exactly.

    Attributes:
        total: `[]` float32, the sum that is differentiated.
        weight: `[]` float32, what it is divided by: tokens, samples.
    """

    total: jax.Array
    weight: jax.Array


class Task(Protocol):
    """A frozen, hashable dataclass; one compiled step serves all runs with an equal task."""

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """The model, and the carry; `()` if nothing lives from step to step.

        The carry is arrays `[B, ...]`, split over devices and microbatches as the batch is: a row
        of the batch meets its own row.
        """
        ...

    def loss(
        self, model: Any, batch: Mapping[str, jax.Array], carry: Any, key: jax.Array
    ) -> tuple[Loss, dict[str, jax.Array], Any]:
        """The loss of one microbatch, what to log (means over the microbatch), the new carry."""
        ...

    def after_update(self, model: Any, aux: dict[str, jax.Array]) -> Any:
        """The model with what no gradient moves (router biases) brought up to date."""
        ...
