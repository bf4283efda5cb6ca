"""What a named use of a kernel consists of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

Shape = Mapping[str, int]
Arguments = dict[str, jax.ShapeDtypeStruct]

# What some case has in `against`.
PUBLIC = ("jax", "splash", "associative_scan", "lax.scan")


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without, however it is written.

    Attributes:
        flops: of matrix products, a multiplication and an addition being two.
        bytes: inputs read once and outputs written once.
        vector_ops: elementwise operations.
        transcendentals: exponentials.
    """

    flops: float = 0
    bytes: float = 0
    vector_ops: float = 0
    transcendentals: float = 0


@dataclass(frozen=True)
class Case:
    """One use of one operation.

    Attributes:
        shape: default size of each axis, by letter.
        small: sizes that differ in tests.
        arguments: from sizes to arrays; those of floating type are differentiated.
        function: from an implementation's name to a function of the arguments by name.
        work: from sizes and whether the gradients are computed too to the least work.
        against: the same by public code, by its name: `"jax"` is the kernel that jax ships.
        gradients: whether the operation has any.
        blocks: block sizes that a search tries, by the kernel whose they are.
    """

    shape: Shape
    small: Shape
    arguments: Callable[[Shape], Arguments]
    function: Callable[[str], Callable[..., jax.Array]]
    work: Callable[[Shape, bool], Work]
    against: Mapping[str, Callable[..., jax.Array]] = field(default_factory=dict)
    gradients: bool = True
    blocks: Mapping[str, Sequence[Mapping[str, int]]] = field(default_factory=dict)

    def build(
        self, shape: Shape, implementation: str, backward: bool
    ) -> tuple[Callable[..., Any], Arguments]:
        """The function to compile and its arguments.

        Args:
            shape: size of each axis.
            implementation: one of the operation, or a key of `against`.
            backward: also compute the gradient of every floating-point argument, from a cotangent
                that is one more argument.

        Raises:
            ValueError: if there is no such public code, or the operation has no gradient.
        """
        if backward and not self.gradients:
            raise ValueError("backward=True: this case has no gradient: profile it forward")
        if implementation in PUBLIC and implementation not in self.against:
            choices = ", ".join(map(repr, ["xla", *self.against]))
            raise ValueError(
                f"against={implementation!r}: not known for this case: choose from {choices}"
            )
        forward = self.against.get(implementation) or self.function(implementation)
        args = self.arguments(shape)
        if not backward:
            return forward, args
        out = jax.eval_shape(forward, **args)

        def gradient(cotangent: jax.Array, **args: jax.Array) -> tuple[jax.Array, Any]:
            floats = {n: a for n, a in args.items() if jnp.issubdtype(a.dtype, jnp.floating)}
            rest = {n: a for n, a in args.items() if n not in floats}
            out, pull = jax.vjp(lambda x: forward(**x, **rest), floats)
            return out, pull(cotangent)

        return gradient, {"cotangent": jax.ShapeDtypeStruct(out.shape, out.dtype), **args}


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An argument."""
    return jax.ShapeDtypeStruct(shape, dtype)


def nbytes(arrays: Arguments) -> int:
    """Bytes of all of them."""
    return sum(a.size * a.dtype.itemsize for a in arrays.values())
