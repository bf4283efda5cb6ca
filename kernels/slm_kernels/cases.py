"""Named uses of the TPU kernels: arguments by shape, and the least work that they can cost.

A case is compiled for every TPU by the tests (small shape) and by `slm_kernels.profile`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slm_kernels.attention import attention
from slm_kernels.scan import selective_scan

Shape = Mapping[str, int]
Arguments = dict[str, jax.ShapeDtypeStruct]


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
        against_jax: the same with the kernel that jax ships, where it has one.
    """

    shape: Shape
    small: Shape
    arguments: Callable[[Shape], Arguments]
    function: Callable[[str], Callable[..., jax.Array]]
    work: Callable[[Shape, bool], Work]
    against_jax: Callable[..., jax.Array] | None = None

    def build(
        self, shape: Shape, implementation: str, backward: bool
    ) -> tuple[Callable[..., Any], Arguments]:
        """The function to compile and its arguments.

        Args:
            shape: size of each axis.
            implementation: one of the operation, or `"jax"`.
            backward: also compute the gradient of every floating-point argument, from a cotangent
                that is one more argument.

        Raises:
            ValueError: if jax ships no such kernel.
        """
        if implementation == "jax":
            if self.against_jax is None:
                raise ValueError("against='jax': jax ships no kernel for this case: choose 'xla'")
            forward = self.against_jax
        else:
            forward = self.function(implementation)
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


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _nbytes(arrays: Arguments) -> int:
    return sum(a.size * a.dtype.itemsize for a in arrays.values())


# Attention: B rows of S tokens, H query and K key/value heads of D, window W (0 for none).


def _attention_arguments(s: Shape, packed: bool = False) -> Arguments:
    kv = _array(s["B"], s["S"], s["K"], s["D"])
    args = {"q": _array(s["B"], s["S"], s["H"], s["D"]), "k": kv, "v": kv}
    args["positions"] = _array(s["B"] if packed else 1, s["S"], dtype=jnp.int32)
    if packed:
        args["segments"] = _array(s["B"], s["S"], dtype=jnp.int32)
    return args


def _attention(causal: bool = True, window: int | None = None, softcap: float | None = None) -> Any:
    def function(implementation: str) -> Callable[..., jax.Array]:
        def run(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            positions: jax.Array,
            segments: jax.Array | None = None,
        ) -> jax.Array:
            return attention(
                q,
                k,
                v,
                q_positions=positions,
                kv_positions=positions,
                q_segments=segments,
                kv_segments=segments,
                causal=causal,
                in_order=causal,
                window=window,
                softcap=softcap,
                implementation=implementation,
            )

        return run

    return function


def _attention_work(
    packed: bool = False, causal: bool = True, window: int | None = None
) -> Callable[[Shape, bool], Work]:
    """Two products forward, five backward, one exponential each (arXiv 2205.14135, appendix B).

    Documents of a packed row are not known here: it counts as one.
    """

    def work(s: Shape, backward: bool) -> Work:
        length, rows = s["S"], s["B"] * s["H"]
        w = length if window is None else min(window, length)
        seen = w * (w + 1) // 2 + (length - w) * w if causal else length * length
        scores = rows * seen
        args = _attention_arguments(s, packed)
        moved = _nbytes(args) + _nbytes({"out": args["q"]})
        if not backward:
            return Work(flops=4 * s["D"] * scores, bytes=moved, transcendentals=scores)
        # Read again, with the output's gradient; written: three gradients. And the row sums.
        moved += _nbytes(args) + 2 * _nbytes({"out": args["q"]}) + 2 * 4 * rows * length
        moved += _nbytes({n: args[n] for n in "qkv"})
        return Work(flops=14 * s["D"] * scores, bytes=moved, transcendentals=2 * scores)

    return work


def _flash(causal: bool = True) -> Callable[..., jax.Array]:
    """The kernel of jax; it wants heads before tokens and as many of them for keys as queries."""

    def run(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        positions: jax.Array,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash

        del positions  # the order of the tokens
        n = min(512, q.shape[1])
        blocks = jax_flash.BlockSizes(
            block_q=n,
            block_k_major=n,
            block_k=n,
            block_b=1,
            block_q_major_dkv=n,
            block_k_major_dkv=n,
            block_k_dkv=n,
            block_q_dkv=n,
            block_k_major_dq=n,
            block_k_dq=n,
            block_q_dq=n,
        )
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        out = jax_flash.flash_attention(
            *(x.transpose(0, 2, 1, 3) for x in (q, k, v)),
            segment_ids=None if segments is None else jax_flash.SegmentIds(segments, segments),
            causal=causal,
            sm_scale=q.shape[3] ** -0.5,
            block_sizes=blocks,
        )
        return out.transpose(0, 2, 1, 3)

    return run


# Selective scan: B rows of L tokens, width D, N states a channel.


def _scan_arguments(s: Shape, packed: bool = False) -> Arguments:
    batch, length, width, n = s["B"], s["L"], s["D"], s["N"]
    args = {
        "u": _array(batch, length, width),
        "dt": _array(batch, length, width, dtype=jnp.float32),
        "a": _array(width, n, dtype=jnp.float32),
        "b": _array(batch, length, n),
        "c": _array(batch, length, n),
        "d": _array(width, dtype=jnp.float32),
    }
    if packed:
        args["reset"] = _array(batch, length, dtype=jnp.bool_)
    return args


def _scan(implementation: str) -> Callable[..., jax.Array]:
    return lambda **args: selective_scan(**args, implementation=implementation)[0]


def _scan_work(packed: bool = False) -> Callable[[Shape, bool], Work]:
    """Operations a state and token, of h = exp(dt a) h + (dt u) b; y = c h summed over the states.

    Forward 6: dt a, decay h, (dt u) b, their sum, c h, the sum over states. Backward: 4 and the
    exponential to have h again; g = decay' g' + c dy (3); and for each gradient a product and a
    sum over channels, states or tokens: dc, db, d(dt u) (6), d(dt) and da of g h decay (6).
    """

    def work(s: Shape, backward: bool) -> Work:
        args = _scan_arguments(s, packed)
        states = s["B"] * s["L"] * s["D"] * s["N"]
        y = _nbytes({"y": args["u"]})
        moved = _nbytes(args) + y
        if not backward:
            return Work(bytes=moved, vector_ops=6 * states, transcendentals=states)
        moved += _nbytes(args) + y  # read again, with the gradient of y
        moved += _nbytes({n: a for n, a in args.items() if n != "reset"})
        return Work(bytes=moved, vector_ops=25 * states, transcendentals=2 * states)

    return work


_ATTENTION = {"B": 1, "S": 4096, "H": 2, "K": 2, "D": 128}
_ATTENTION_SMALL = {"S": 1024, "K": 1}
_SCAN = {"B": 1, "L": 2048, "D": 1024, "N": 16}
_SCAN_SMALL = {"L": 256, "D": 256}

CASES = {
    "attention": Case(
        _ATTENTION,
        _ATTENTION_SMALL,
        _attention_arguments,
        _attention(),
        _attention_work(),
        _flash(),
    ),
    "attention-packed": Case(
        _ATTENTION,
        _ATTENTION_SMALL,
        lambda s: _attention_arguments(s, packed=True),
        _attention(),
        _attention_work(packed=True),
        _flash(),
    ),
    "attention-full": Case(
        _ATTENTION,
        _ATTENTION_SMALL,
        _attention_arguments,
        _attention(causal=False),
        _attention_work(causal=False),
        _flash(causal=False),
    ),
    # Sliding window and soft-capped scores, as in Gemma 2; heads of 64, as in small models.
    "attention-window": Case(
        {**_ATTENTION, "D": 64},
        _ATTENTION_SMALL,
        _attention_arguments,
        _attention(window=512, softcap=50.0),
        _attention_work(window=512),
    ),
    "scan": Case(_SCAN, _SCAN_SMALL, _scan_arguments, _scan, _scan_work()),
    "scan-packed": Case(
        _SCAN,
        _SCAN_SMALL,
        lambda s: _scan_arguments(s, packed=True),
        _scan,
        _scan_work(packed=True),
    ),
}
