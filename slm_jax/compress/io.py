"""A folder that holds a quantised model: safetensors, JSON, a tokenizer. Nothing is unpickled."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slm_jax.compress.quantise import path_name, quantise
from slm_jax.compress.spec import QuantSpec, parse_spec
from slm_jax.errors import UserError
from slm_jax.models.files import check_free, read_json, sha256, whole_folder
from slm_jax.nn.module import is_variable, named_leaves

MANIFEST, WEIGHTS, TOKENIZER = "quantised.json", "model.safetensors", "tokenizer.json"
_VERSION = 1


def is_quantised_folder(folder: Path) -> bool:
    """Whether `save_quantised` wrote this folder."""
    return (folder / MANIFEST).is_file()


def check_out(folder: Path, *, overwrite: bool) -> None:
    """Refuses a folder that `save_quantised` may not write.

    Raises:
        UserError: if it is in use by anything else than a quantised model, or by one and
            `overwrite` is false.
    """
    check_free(folder, marker=MANIFEST, what="a quantised model", overwrite=overwrite)


def save_quantised(
    model: Any,
    folder: Path,
    *,
    config: Mapping[str, Any],
    spec: QuantSpec,
    vocab: QuantSpec,
    keep: tuple[str, ...],
    tokenizer: str,
    facts: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes a quantised model; the folder appears whole or not at all.

    Args:
        model: result of `quantise(..., spec, vocab=vocab, keep=keep)`.
        folder: where to; made with its parents.
        config: JSON from which `load_quantised`'s `build` makes the model.
        spec: see `quantise`.
        vocab: see `quantise`.
        keep: see `quantise`.
        tokenizer: text of the tokenizer.json.
        facts: JSON for whoever opens the folder: how it was made, what it costs.
        overwrite: replace a quantised model.

    Raises:
        UserError: as `check_out`.
    """
    check_out(folder, overwrite=overwrite)
    with whole_folder(folder) as building:
        arrays = {k: np.asarray(v.get_value()) for k, v in named_leaves(model).items()}
        save_file(arrays, building / WEIGHTS)
        (building / TOKENIZER).write_text(tokenizer, encoding="utf-8")
        manifest = {
            "version": _VERSION,
            "spec": spec.name,
            "vocab": vocab.name,
            "keep": list(keep),
            "model": config,
            "sha256": {name: sha256(building / name) for name in (WEIGHTS, TOKENIZER)},
            **facts,
        }
        (building / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def load_quantised[M](folder: Path, build: Callable[[Any], M]) -> tuple[M, dict[str, Any]]:
    """Reads what `save_quantised` wrote.

    Args:
        folder: the folder.
        build: makes the abstract float model (`jax.eval_shape`) from the `config` that was saved;
            raises UserError if it cannot.

    Returns:
        The quantised model and the manifest.

    Raises:
        UserError: if a file is missing, cut short, changed, of another version, or if its arrays
            are not those of the model.
    """
    manifest = _read_manifest(folder)
    for name in (WEIGHTS, TOKENIZER):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: copy the folder again")
        if sha256(folder / name) != manifest["sha256"].get(name):
            raise UserError(
                f"{folder / name} is not the file that {MANIFEST} was written with (sha256 "
                "differs): copy the folder again"
            )
    spec, vocab = parse_spec(manifest["spec"]), parse_spec(manifest["vocab"])
    keep = tuple(manifest["keep"])
    shapes = jax.eval_shape(
        lambda m: quantise(m, spec, vocab=vocab, keep=keep), build(manifest["model"])
    )
    try:
        with safe_open(folder / WEIGHTS, framework="np") as file:
            return _filled(shapes, file, folder), manifest
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}): copy it again") from error


def _filled(shapes: Any, file: Any, folder: Path) -> Any:
    wanted, there = named_leaves(shapes), set(file.keys())
    if odd := sorted(there ^ set(wanted)):
        what = "lacks" if odd[0] in wanted else "holds"
        raise UserError(
            f"{folder / WEIGHTS} {what} {odd[0]}, which is not as {MANIFEST} says: copy both again"
        )

    def fill(path: Any, leaf: Any) -> Any:
        name, want = path_name(path), leaf.get_value()
        value = file.get_tensor(name)
        if value.shape != want.shape or value.dtype != want.dtype:
            raise UserError(
                f"{folder / WEIGHTS}: {name} is {value.dtype}{list(value.shape)}, {MANIFEST} asks "
                f"for {want.dtype}{list(want.shape)}: copy both again"
            )
        return leaf.replace(jnp.asarray(value))

    return jax.tree_util.tree_map_with_path(fill, shapes, is_leaf=is_variable)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    kinds = {"spec": str, "vocab": str, "keep": list, "model": dict, "sha256": dict}
    data = read_json(path)
    if not isinstance(data, dict) or data.get("version") != _VERSION:
        found = data.get("version") if isinstance(data, dict) else None
        raise UserError(f"{path} has version={found!r}, not {_VERSION}: quantise the model again")
    for name, kind in kinds.items():
        if not isinstance(data.get(name), kind):
            raise UserError(f"{path}: field {name!r} is missing or broken: quantise again")
    return data
