"""Run by test_equality.py in a process of its own, so that XLA's log can be read.

    python compare.py ARCHITECTURE[@tpu|@ring]:MESH,... ...

A mesh is named by its axes, as in `expert4-fsdp2`. With `@tpu` after the architecture the meshes
run its TPU kernels, interpreted, and are compared with the same program without them; with `@ring`
keys go round the devices that a row is split over. For every architecture it writes a line to
stderr, which what XLA logs then follows, and a JSON object to stdout: a list with the result on
every mesh. A gradient's error is the largest one over the largest value. The architecture
"control" compiles something that XLA can only do by replicating an array.
"""

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from slm_kernels.pallas import interpreted

from slm_jax.models.loss import next_token_loss
from slm_jax.models.recursion import RecursionConfig
from slm_jax.parallel import MeshConfig, make_mesh, shard_batch, shardings
from tests.nn.tiny import tiny_lm, tokens

ROWS, LENGTH = 8, 16


def control() -> None:
    """Moves the split of an array from one dimension to others halfway through a program."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)

    def resplit(x):
        for split in (P(None, ("a", "c")), P("c", None)):
            x = jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, split))
        return x

    jax.jit(resplit).lower(jnp.zeros((64, 64))).compile()


def parse_mesh(name: str) -> MeshConfig:
    """A mesh by axes and sizes, as in `expert4-fsdp2`; axes left out have size one."""
    parts = [re.fullmatch(r"([a-z]+)(\d+)", part) for part in name.split("-")]
    sizes = {part[1]: int(part[2]) for part in parts if part is not None}
    assert len(sizes) == len(parts), name
    return MeshConfig(**({"fsdp": 1} | sizes))


@jax.jit
@jax.value_and_grad
def loss_of(model, batch):
    nll, weight, aux = next_token_loss(model, batch, chunk=8)
    return nll / weight + sum(jnp.sum(v) for k, v in sorted(aux.items()) if k != "moe_load")


@contextlib.contextmanager
def tpu_kernels() -> Iterator[None]:
    """Operations choose as on a TPU, and what they choose is interpreted."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(interpreted())
        for operation in ("attention", "scan"):
            stack.enter_context(mock.patch(f"slm_kernels.{operation}.platform", return_value="tpu"))
        stack.enter_context(mock.patch("slm_kernels.attention._FEW_QUERIES", 1))
        yield


def compare(architecture: str, meshes: list[str]) -> list[dict]:
    """Loss and gradients on every mesh against the same program without one.

    Args:
        architecture: of `tests.nn.tiny`, or `looped`; with `@tpu` its kernels are interpreted,
            with `@ring` keys go round.
        meshes: as of `parse_mesh`.
    """
    architecture, _, way = architecture.partition("@")
    kernels = way == "tpu"
    # An interpreted kernel has effects, which rematerialisation refuses.
    changes: dict = dict(remat="none" if kernels else "full", n_layers=2)
    if architecture == "looped":
        changes["recursion"] = RecursionConfig(1, 1, repeats=3, backward=2)
    model = tiny_lm("dense" if architecture == "looped" else architecture, **changes)
    ids = tokens(ROWS, LENGTH + 1)
    segments = np.where(np.arange(LENGTH) < 5, 1, 2) * np.ones((ROWS, 1), np.int32)
    segments[3:5, 9:] = 0  # padding in some shards only
    batch = dict(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        segments=segments,
        weights=(segments > 0).astype(np.float32),
    )
    loss, gradient = loss_of(model, batch)
    results = []
    for name in meshes:
        config = dataclasses.replace(parse_mesh(name), ring=way == "ring")
        mesh = make_mesh(config)
        loss_of.clear_cache()  # rules are no part of what it is cached by
        interpreted = tpu_kernels() if kernels else contextlib.nullcontext()
        with jax.set_mesh(mesh), config.rules(), interpreted:
            split = jax.device_put(model, shardings(model, mesh))
            got, got_gradient = loss_of(split, shard_batch(batch, mesh))
        errors = jax.tree.map(
            lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()),
            got_gradient,
            gradient,
        )
        same = jax.tree.map(lambda a, b: a.sharding == b.sharding, got_gradient, split)
        result = dict(mesh=name, loss=float(got), loss_without_mesh=float(loss),
                      gradient_error=max(jax.tree.leaves(errors)),
                      gradient_split_as_weights=all(jax.tree.leaves(same)))  # fmt: skip
        results.append(result)
    return results


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        architecture, _, meshes = argument.partition(":")
        print(f"=== {architecture}", file=sys.stderr, flush=True)
        if architecture == "control":
            control()
        else:
            print(json.dumps(compare(architecture, meshes.split(","))), flush=True)
