"""Checkpoints: the one module that knows Orbax.

A checkpoint holds the train state as a flat dictionary of named arrays, and as JSON a record: the
position of the data iterator, facts about the run, and dtype, shape and checksum of every array.
Its number is the next step to run. Saving is asynchronous and atomic. What is read is verified:
Orbax by itself restores most flipped bits as wrong numbers, without a word.
"""

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from slm_jax.errors import UserError
from slm_jax.parallel import distributed
from slm_jax.train.checksum import checksums

CHECKPOINTS_FOLDER = "checkpoints"

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What a checkpoint gives back.

    Attributes:
        step: the next step to run.
        state: the tree that was asked for, on the devices it was asked on.
        data: position of the data iterator, as saved.
        facts: what else was saved about the run.
    """

    step: int
    state: Any
    data: Any
    facts: dict[str, Any]


class _DamagedError(Exception):
    """A checkpoint that is not whole; the message says what is wrong with it."""


def named_arrays(tree: Any) -> dict[str, Any]:
    """The arrays of any pytree by dotted path: stable names for files and messages."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
        for path, leaf in flat
    }


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for writes on leaving."""

    def __init__(
        self, folder: Path, *, keep: int = 2, keep_every: int = 0, read_only: bool = False
    ) -> None:
        """Opens or creates `folder`.

        Args:
            folder: where the checkpoints are.
            keep: how many of the newest stay.
            keep_every: those of every so many steps stay, too; 0 is none.
            read_only: change nothing: a run may be writing there just now.

        Raises:
            UserError: if the folder cannot be made.
        """
        # Orbax takes a relative path and fails later, in the background.
        self.folder = folder.absolute()
        self._read_only = read_only
        self._writing: tuple[int, Any] | None = None
        self._failed = False
        if read_only:
            return
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        try:
            self._orbax = ocp.training.Checkpointer(
                self.folder,
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise UserError(
                f"checkpoints={self.folder} cannot be opened ({_first_line(error)}): choose "
                "another run folder, or make it writable"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._read_only:
            return
        try:
            self.wait()
        except UserError as failed:
            # A run that ends well, or stops in order to go on elsewhere, must not seem saved.
            if error is None or isinstance(error, SystemExit):
                raise
            log.warning("%s", failed)
        finally:
            # It raises what has been raised already, again and again.
            with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                self._orbax.close()

    def latest(self) -> int | None:
        """The newest step there is, whole or not, or `None`."""
        return max(self._agreed_steps(), default=None)

    def save(self, step: int, state: Any, data: Any, facts: dict[str, Any]) -> None:
        """Begins to write `state`; returns when it may be changed or donated.

        Args:
            step: the next step to run after resuming from here.
            state: any pytree of arrays.
            data: JSON position of the data iterator.
            facts: JSON facts about the run, for whoever opens the folder.

        Raises:
            UserError: if this one, or the one before, cannot be written.
        """
        self.wait()
        arrays = named_arrays(state)
        sums = checksums(arrays)
        kinds = {name: [str(a.dtype), list(a.shape), *sums[name]] for name, a in arrays.items()}
        record = {"step": step, "data": data, "facts": facts, "arrays": kinds}
        try:
            if distributed.is_first():
                # A folder that Orbax cannot make it waits for, five minutes, in the background.
                tempfile.TemporaryDirectory(prefix=".", dir=self.folder).cleanup()
            response = self._orbax.save_checkpointables_async(
                step,
                {"state": arrays},
                force=True,
                custom_metadata={"record": record, "sha256": _digest(record)},
            )
        except OSError as error:
            raise self._unwritten(step, error) from error
        self._writing = step, response

    def poll(self) -> None:
        """Raises what made the last `save` fail, as soon as that is known; does not wait.

        Raises:
            UserError: if the checkpoint cannot be written.
        """
        if self._writing is not None and not self._orbax.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last `save` is on the disk.

        Raises:
            UserError: if it cannot be written.
        """
        if self._writing is None:
            return
        (step, response), self._writing = self._writing, None
        try:
            response.result()
        except Exception as error:  # Orbax passes on what its threads met, of any type
            self._failed = True
            raise self._unwritten(step, error) from error

    def restore(self, abstract: Any, step: int | None = None) -> Restored:
        """Reads the newest whole checkpoint, or that of `step`.

        Newer ones that are damaged are named in a warning and moved to `<folder>-damaged`, so
        that the run can save these steps again; nothing is deleted.

        Args:
            abstract: tree of `jax.ShapeDtypeStruct` with the shardings wanted; a part of what was
                saved will do (weights alone), by the same names.
            step: which checkpoint.

        Raises:
            UserError: if there is none that is whole, or its arrays are not those of `abstract`.
        """
        wanted = named_arrays(abstract)
        steps = sorted(self._agreed_steps(), reverse=True) if step is None else [step]
        if not steps:
            raise UserError(f"checkpoints={self.folder}: there is none to restore")
        damaged: dict[int, str] = {}
        for found in steps:
            try:
                record, arrays = self._read(found, wanted)
                break
            except _DamagedError as error:
                damaged[found] = str(error)
        else:
            reasons = "; ".join(f"{s} ({why})" for s, why in damaged.items())
            raise UserError(
                f"checkpoints={self.folder}: none is whole: {reasons}: put a copy back, or delete "
                "the folder to train from the beginning"
            )
        for bad, why in damaged.items():
            place = "is left out" if self._read_only else f"is now {self._set_aside(bad)}"
            log.warning(
                "checkpoint=%s is damaged (%s) and %s: going on from step %d, the newest that is "
                "whole",
                *(self.folder / str(bad), why, place, found),
            )
        leaves = [arrays[name] for name in wanted]
        state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
        return Restored(found, state, record["data"], record["facts"])

    def _steps(self) -> list[int]:
        """Steps by the names in the folder; what has such a name may be anything."""
        if not self.folder.is_dir():
            return []
        return [int(p.name) for p in self.folder.iterdir() if p.name == _as_step(p.name)]

    def _agreed_steps(self) -> list[int]:
        """What process 0 finds: all must read the same checkpoint."""
        return self._steps() if self._read_only else distributed.on_first("steps", self._steps)

    def _read(self, step: int, wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The record of a checkpoint and its arrays of these names, both verified.

        Raises:
            _DamagedError: if it is not as it was saved.
            UserError: if it is, and has other arrays.
        """
        record = arrays = None
        why = ""
        try:
            record = self._record(step)
        except Exception as error:  # whatever a damaged file makes of it
            why = _reason(error)
        _together(why)
        assert record is not None
        self._check(record["arrays"], wanted)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                arrays = ocp.load_checkpointables(self.folder / str(step), {"state": wanted})
        except Exception as error:
            why = _reason(error)
        _together(why)
        assert arrays is not None
        arrays = {name: arrays["state"][name] for name in wanted}
        for name, (a, b) in checksums(arrays).items():
            if [a, b] != record["arrays"][name][2:]:
                raise _DamagedError(f"the checksum of {name} is wrong")
        return record, arrays

    def _record(self, step: int) -> dict[str, Any]:
        path = self.folder / str(step)
        if path.is_symlink():
            raise _DamagedError("it is a link")
        if not path.is_dir():
            raise _DamagedError("it is no folder")
        saved = ocp.checkpointables_metadata(path).custom_metadata
        if not saved or "record" not in saved:
            raise _DamagedError("it has no record of what was saved")
        record = saved["record"]
        if saved.get("sha256") != _digest(record):
            raise _DamagedError("the checksum of its record is wrong")
        if record["step"] != step:
            raise _DamagedError(f"it is of step {record['step']}")
        return record

    def _check(self, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Refuses other names, shapes or dtypes: Orbax would cast without a word."""
        for name, want in wanted.items():
            if name not in saved:
                raise UserError(
                    f"checkpoints={self.folder}: {name} is not in the checkpoint: it belongs to "
                    "another configuration"
                )
            dtype, shape = saved[name][:2]
            if shape != list(want.shape) or dtype != str(want.dtype):
                raise UserError(
                    f"checkpoints={self.folder}: {name} is {dtype}{shape}, the model wants "
                    f"{want.dtype}{list(want.shape)}: use the configuration it was trained with"
                )

    def _set_aside(self, step: int) -> Path:
        """Moves what has the name of a step out of the way and of Orbax's sight."""
        place = self.folder.with_name(f"{self.folder.name}-damaged")
        path, n = place / str(step), 1
        while path.exists() or path.is_symlink():
            path, n = place / f"{step}.{n}", n + 1
        if distributed.is_first():
            place.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(path)
        _together("")
        self._orbax.reload()
        return path

    def _unwritten(self, step: int, error: BaseException) -> UserError:
        whole = sorted(s for s in self._steps() if s != step)
        kept = f"{whole[-1]} is the last there is" if whole else "there is no other"
        return UserError(
            f"checkpoint={self.folder / str(step)} could not be written ({_first_line(error)}): "
            f"{kept}; make room and run the same command to go on from it"
        )


def _together(why: str) -> None:
    """Raises in every process if one found damage: the others must not wait for it."""
    anywhere = bool(why)
    if jax.process_count() > 1:
        anywhere = bool(multihost_utils.process_allgather(np.array(anywhere)).any())
    if anywhere:
        raise _DamagedError(why or "another process could not read it")


def _as_step(name: str) -> str | None:
    """How Orbax would write the number that `name` is; `None` if it is none."""
    return str(int(name)) if name.isascii() and name.isdigit() else None


def _digest(record: Any) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _reason(error: BaseException) -> str:
    """What is behind an error of Orbax, which often says only that it met one."""
    while (behind := error.__cause__ or error.__context__) is not None:
        error = behind
    return str(error) if isinstance(error, _DamagedError) else _first_line(error)


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else f"{text[:200]}..."


def restore_weights[M](run: Path, init: Callable[[jax.Array], M], *, ema: bool) -> M:
    """The newest weights of a run, on the first device.

    Args:
        run: its folder.
        init: makes a model of the run's configuration from a key; it is only traced.
        ema: the average of the weights, which the run must have kept.

    Raises:
        UserError: if there is no checkpoint, or it is of another model.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device),
        jax.eval_shape(init, jax.random.key(0)),
    )
    name = "ema" if ema else "model"
    with Checkpoints(run / CHECKPOINTS_FOLDER, read_only=True) as checkpoints:
        model = checkpoints.restore({name: abstract}).state[name]
    # Copies: what was read from a file may not be donated.
    return jax.tree.map(jnp.asarray, model)
