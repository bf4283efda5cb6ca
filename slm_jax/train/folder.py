"""The folder of a run: its configuration and its result, each there whole or not at all.

Of several processes, all call `agree_on_folder`, `make_folder` and `write_result`, and process 0
alone touches the folder.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from slm_jax.errors import UserError
from slm_jax.parallel import distributed
from slm_jax.train.serialize import differences

CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"
KINDS = {"Experiment": "a language model", "TRMExperiment": "a recursive reasoner on puzzles"}
"""What the kinds of run train, by the class of their configuration."""


def check_folder(
    out: Path, config: dict[str, Any], *, free: Collection[str], overwrite: bool
) -> dict[str, Any] | None:
    """Checks that a folder is free, or of this run; changes nothing.

    Args:
        out: run folder, which need not exist.
        config: what is to run, as `to_json` gives it.
        free: fields that may differ from those of the run that is there, as in `model.remat`.
        overwrite: any run may be there.

    Returns:
        The result, if this run is there and done.

    Raises:
        UserError: if the folder holds another run, or anything else.
    """
    if not (out / CONFIG_FILE).exists():
        # A run that was killed as it began leaves its temporary file.
        begun = _temporary(out / CONFIG_FILE)
        if out.exists() and any(path != begun for path in out.iterdir()):
            raise UserError(
                f"out={out} is not empty and holds no run: choose another --out or empty it"
            )
        return None
    saved = read_config(out, kind=config["type"])
    if overwrite:
        return None
    changed = [
        d
        for d in differences(saved, config)
        if not any(d.startswith((f"{name}.", f"{name}:")) for name in free)
    ]
    if changed:
        raise UserError(
            f"out={out} holds another run ({changed[0]}"
            + (f" and {len(changed) - 1} more" if len(changed) > 1 else "")
            + "): choose another --out, or --overwrite to delete it"
        )
    result = out / RESULT_FILE
    return _read_json(result) if result.exists() else None


def agree_on_folder(
    out: Path, config: dict[str, Any], *, free: Collection[str], overwrite: bool
) -> dict[str, Any] | None:
    """`check_folder` for all processes, which must be about to run the same.

    Raises:
        UserError: as `check_folder`; or names a process that runs another configuration.
    """
    distributed.check_same("run", config)
    return distributed.on_first(
        "run folder", lambda: check_folder(out, config, free=free, overwrite=overwrite)
    )


def make_folder(out: Path, config: dict[str, Any], *, overwrite: bool) -> None:
    """Makes a folder that `check_folder` has passed, unless this run has it already."""

    def make() -> None:
        file = out / CONFIG_FILE
        if overwrite and file.exists():
            _delete_run(out)
        if not file.exists():
            out.mkdir(parents=True, exist_ok=True)
            write_json(file, config)

    distributed.on_first("run folder", make)


def write_result(out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Puts the result of a finished run into its folder; returns what process 0 has put there."""

    def write() -> dict[str, Any]:
        write_json(out / RESULT_FILE, result)
        return result

    return distributed.on_first("result", write)


def read_config(out: Path, *, kind: str) -> dict[str, Any]:
    """The configuration of the run in `out`, as `to_json` gave it.

    Args:
        out: run folder.
        kind: class of configuration that is wanted.

    Raises:
        UserError: if the folder holds no run, or one of another kind.
    """
    if not (out / CONFIG_FILE).exists():
        raise UserError(f"run={out} has no {CONFIG_FILE}: give the folder of a training run")
    data = _read_json(out / CONFIG_FILE)
    found = data.get("type")
    if found in KINDS and found != kind:
        raise UserError(f"run={out} trains {KINDS[found]}: give a run that trains {KINDS[kind]}")
    if found != kind:  # many a downloaded model has such a file
        raise UserError(f"run={out} has the {CONFIG_FILE} of something else: give that of a run")
    return data


def _delete_run(out: Path) -> None:
    # The result first and the configuration last: what a kill leaves is an unfinished run.
    (out / RESULT_FILE).unlink(missing_ok=True)
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != CONFIG_FILE:
            path.unlink()
    (out / CONFIG_FILE).unlink()


def _temporary(file: Path) -> Path:
    return file.with_suffix(".tmp")


def write_json(file: Path, data: dict[str, Any]) -> None:
    """Writes a file of a run folder, whole or not at all."""
    _temporary(file).write_text(json.dumps(data, indent=1) + "\n")
    _temporary(file).replace(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text())
        if not isinstance(data, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): is it the folder of a run?") from error
    return data
