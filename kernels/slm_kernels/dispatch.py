"""How an operation picks its implementation: by name, never by silent fallback."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

logger = logging.getLogger("slm_kernels")

KERNELS = ("tpu", "gpu", "cudnn")
"""Implementations that see one device's part of the arrays."""

# In the names that the driver gives to GPUs of compute capability 9.0.
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")


@functools.cache
def _log_once(operation: str, implementation: str) -> None:
    logger.info("%s runs its %r implementation", operation, implementation)


def pick(
    operation: str,
    implementation: str | None,
    table: Mapping[str, Callable[..., Any]],
    default: str,
) -> tuple[str, Callable[..., Any]]:
    """Name and function of `implementation`, or of `default` when it is `None`.

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
    return name, table[name]


def check_shapes(
    beside: tuple[str, jax.Array], want: Mapping[str, tuple[jax.Array | None, tuple[int, ...]]]
) -> None:
    """Checks arguments that are given, by name, each with the shape that it must have.

    Args:
        beside: name of the argument that sets the sizes, and the argument.
        want: the others.

    Raises:
        ValueError: on another shape.
    """
    name_of_sizes, sizes = beside
    for name, (array, shape) in want.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name}{array.shape}: want {shape} to go with {name_of_sizes}{sizes.shape}"
            )


def platform() -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`: what the mesh in use is made of, or the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """What the driver calls the devices of the mesh in use, or of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.device_kind


def on_hopper() -> bool:
    """Whether the mesh in use, or the default backend, is made of Hopper GPUs (H100, H200, ...)."""
    return platform() == "gpu" and any(name in device_kind() for name in _HOPPER)


def spec_of(array: jax.Array) -> P:
    """How `array` is split over explicit mesh axes, one entry a dimension."""
    spec = jax.typeof(array).sharding.spec
    return P(*spec, *(None,) * (array.ndim - len(spec)))


def reshape_rows(x: jax.Array, *shape: int) -> jax.Array:
    """`x.reshape(shape)` of another shape behind the first axis, which stays split as it is.

    On an explicit mesh a reshape to or from an axis of size one takes the first axis for another
    one where it has size one too, and forgets how it is split.
    """
    y = x.reshape(shape)
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return y
    rows, (first, *rest) = spec_of(x)[0], spec_of(y)
    return y if first == rows else jax.reshard(y, P(rows, *rest))


def whole_rows(implementation: str, name: str, array: jax.Array) -> P:
    """How `array` `[B, S, ...]` is split.

    Raises:
        ValueError: if it is split along the sequence, which no kernel can work on.
    """
    spec = spec_of(array)
    if spec[1] is not None:
        raise ValueError(
            f"implementation={implementation!r} needs whole rows and {name} is split over "
            f"{spec[1]} along the sequence: gather it, or use implementation='xla'"
        )
    return spec


def per_shard(
    run: Callable[..., Any],
    arguments: Mapping[str, jax.Array | None],
    specs: Mapping[str, P],
    out_specs: Any,
) -> Any:
    """Calls a kernel on every device's part: the compiler cannot split one itself.

    Args:
        run: called with the arguments by name.
        arguments: arrays, or `None` for those left out.
        specs: how each array has to be split; one that is split otherwise is moved.
        out_specs: how the results are.
    """
    given = {name: x for name, x in arguments.items() if x is not None}
    left_out = {name: None for name in arguments if name not in given}

    def call(given: dict[str, jax.Array]) -> Any:
        return run(**given, **left_out)

    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return call(given)
    split = {name: specs[name] for name in given}
    moved = {name: jax.reshard(x, split[name]) for name, x in given.items()}
    # No check of varying axes: what a kernel writes carries no such mark.
    return jax.shard_map(call, in_specs=(split,), out_specs=out_specs, check_vma=False)(moved)
