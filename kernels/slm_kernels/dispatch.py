"""How an operation picks its implementation: by name, never by silent fallback."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger("slm_kernels")


@functools.cache
def _log_once(operation: str, implementation: str) -> None:
    logger.info("%s runs its %r implementation", operation, implementation)


def pick(
    operation: str,
    implementation: str | None,
    table: Mapping[str, Callable[..., Any]],
    default: str,
) -> Callable[..., Any]:
    """The function for `implementation`, or for `default` when it is `None`.

    What runs is logged once an operation at level INFO.

    Raises:
        ValueError: if the operation has no such implementation.
    """
    name = default if implementation is None else implementation
    if name not in table:
        raise ValueError(
            f"implementation={name!r} does not exist for {operation}: choose from "
            f"{', '.join(table)}"
        )
    _log_once(operation, name)
    return table[name]
