"""Checkpoints: the one module that knows Orbax.

A checkpoint holds the train state as a flat dictionary of named arrays, and as JSON the position of
the data iterator and the configuration. Its number is the next step to run. Saving is asynchronous
and atomic: what is listed is whole.
"""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from slm_jax.errors import UserError

CHECKPOINTS_FOLDER = "checkpoints"


class Restored(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
        step: the next step to run.
        state: the tree that was asked for, on the devices it was asked on.
        data: position of the data iterator, as saved.
    """

    step: int
    state: Any
    data: Any


def named_arrays(tree: Any) -> dict[str, Any]:
    """The arrays of any pytree by dotted path: stable names for files and messages."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
        for path, leaf in flat
    }


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for writes on leaving."""

    def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False) -> None:
        """Opens or creates `folder`.

        Args:
            folder: where the checkpoints are.
            keep: how many of the newest stay.
            read_only: leave a half-written checkpoint, which the run may be writing just now.
        """
        # Orbax takes a relative path and fails later, in the background.
        self.folder = folder.absolute()
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=not read_only,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._orbax.close()

    def latest(self) -> int | None:
        """The newest step there is, or `None`."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any, data: Any, facts: dict[str, Any]) -> None:
        """Begins to write `state`; returns when it may be changed or donated.

        Args:
            step: the next step to run after resuming from here.
            state: any pytree of arrays.
            data: JSON position of the data iterator.
            facts: JSON facts about the run, for whoever opens the folder.
        """
        self._orbax.save_checkpointables_async(
            step,
            {"state": named_arrays(state)},
            force=True,
            custom_metadata={"step": step, "data": data, **facts},
        )

    def restore(self, abstract: Any, step: int | None = None) -> Restored:
        """Reads the newest checkpoint, or that of `step`.

        Args:
            abstract: tree of `jax.ShapeDtypeStruct` with the shardings wanted; a part of what was
                saved will do (weights alone), by the same names.
            step: which checkpoint.

        Raises:
            UserError: if there is none, or its arrays are not those of `abstract`.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"checkpoints={self.folder}: there is none to restore")
        wanted = named_arrays(abstract)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        remedy = "delete it to go on from the one before"
        metadata = self._orbax.checkpointables_metadata(step)
        if metadata.metadata["state"] is None:  # Orbax has logged why
            raise UserError(f"checkpoint={self.folder / str(step)} is damaged: {remedy}")
        self._check(metadata.metadata["state"], wanted)
        try:
            with context:
                got = self._orbax.load_checkpointables(step, {"state": wanted})["state"]
        except (OSError, ValueError) as error:
            raise UserError(
                f"checkpoint={self.folder / str(step)} is damaged ({str(error).splitlines()[0]}): "
                f"{remedy}"
            ) from error
        leaves = [got[name] for name in wanted]
        facts = metadata.custom_metadata or {}
        state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
        return Restored(step, state, facts.get("data"))

    def _check(self, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Refuses other names, shapes or dtypes: Orbax would cast without a word."""
        for name, want in wanted.items():
            have = saved.get(name)
            if have is None:
                raise UserError(
                    f"checkpoints={self.folder}: {name} is not in the checkpoint: it belongs to "
                    "another configuration"
                )
            if tuple(have.shape) != tuple(want.shape) or have.dtype != want.dtype:
                raise UserError(
                    f"checkpoints={self.folder}: {name} is {have.dtype}{list(have.shape)}, the "
                    f"model wants {want.dtype}{list(want.shape)}: use the configuration it was "
                    "trained with"
                )


def restore_weights[M](run: Path, init: Callable[[jax.Array], M], *, ema: bool) -> M:
    """The newest weights of a run, on the first device.

    Args:
        run: its folder.
        init: makes a model of the run's configuration from a key; it is only traced.
        ema: the average of the weights, which the run must have kept.

    Raises:
        UserError: if there is no checkpoint, or it is of another model.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device),
        jax.eval_shape(init, jax.random.key(0)),
    )
    name = "ema" if ema else "model"
    with Checkpoints(run / CHECKPOINTS_FOLDER, read_only=True) as checkpoints:
        model = checkpoints.restore({name: abstract}).state[name]
    # Copies: what was read from a file may not be donated.
    return jax.tree.map(jnp.asarray, model)
