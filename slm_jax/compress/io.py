"""Folders of quantised and of pruned models: safetensors, JSON, a tokenizer.

Nothing is unpickled.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slm_jax.compress.linear import QuantisedMatrix
from slm_jax.compress.quantise import is_matrix, path_name, quantise
from slm_jax.compress.sparse import (
    KEPT,
    MASK,
    coded_matrices,
    expanded,
    float_matrices,
    squeezed,
)
from slm_jax.compress.spec import QuantSpec, parse_spec
from slm_jax.errors import UserError
from slm_jax.models.files import check_free, read_json, sha256, whole_folder
from slm_jax.nn.module import changed, is_variable, named_leaves

MANIFEST, PRUNED = "quantised.json", "pruned.json"
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
_VERSION = 1
_WHAT = {MANIFEST: "a quantised model", PRUNED: "a pruned model"}


def is_quantised_folder(folder: Path) -> bool:
    """Whether `save_quantised` wrote this folder."""
    return (folder / MANIFEST).is_file()


def is_pruned_folder(folder: Path) -> bool:
    """Whether `save_pruned` wrote this folder."""
    return (folder / PRUNED).is_file()


def check_out(folder: Path, *, overwrite: bool, manifest: str = MANIFEST) -> None:
    """Refuses a folder that `save_quantised` (with PRUNED `save_pruned`) may not write.

    Raises:
        UserError: if it is in use by anything else than a quantised (pruned) model, or by one and
            `overwrite` is false.
    """
    check_free(folder, marker=manifest, what=_WHAT[manifest], overwrite=overwrite)


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
    sparse: bool = False,
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
        sparse: see `write_weights`.
        overwrite: replace a quantised model.

    Raises:
        UserError: as `check_out`.
    """
    about = {"spec": spec.name, "vocab": vocab.name, "keep": list(keep), "model": config, **facts}
    _save(folder, MANIFEST, model, about, tokenizer, sparse=sparse, overwrite=overwrite)


def save_pruned(
    model: Any,
    folder: Path,
    *,
    config: Mapping[str, Any],
    dtype: str,
    tokenizer: str,
    facts: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes a model of float weights, many of them zero; zeros take a bit each.

    Args:
        model: of float weights, `as_stored` in this dtype.
        folder: see `save_quantised`.
        config: see `save_quantised`.
        dtype: see `write_weights`.
        tokenizer: see `save_quantised`.
        facts: see `save_quantised`.
        overwrite: replace a pruned model.

    Raises:
        UserError: as `check_out`.
    """
    about = {"dtype": dtype, "model": config, **facts}
    _save(folder, PRUNED, model, about, tokenizer, sparse=True, dtype=dtype, overwrite=overwrite)


def _save(
    folder: Path,
    name: str,
    model: Any,
    about: Mapping[str, Any],
    tokenizer: str,
    *,
    sparse: bool,
    dtype: str = "float32",
    overwrite: bool,
) -> None:
    check_out(folder, overwrite=overwrite, manifest=name)
    with whole_folder(folder) as building:
        write_weights(model, building / WEIGHTS, sparse=sparse, dtype=dtype)
        (building / TOKENIZER).write_text(tokenizer, encoding="utf-8")
        sums = {file: sha256(building / file) for file in (WEIGHTS, TOKENIZER)}
        manifest = {"version": _VERSION, "sha256": sums, **about}
        (building / name).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def as_stored[M](model: M, dtype: str) -> M:
    """The model as it is read again: its float matrices rounded to `dtype`, still float32."""

    def one(leaf: Any) -> Any:
        if not is_matrix(leaf) or isinstance(leaf.w, QuantisedMatrix):
            return leaf
        return changed(leaf, w=leaf.w.replace(leaf.w[...].astype(dtype).astype(jnp.float32)))

    out: M = jax.tree.map(one, model, is_leaf=is_matrix)
    return out


def write_weights(model: Any, file: Path, *, sparse: bool, dtype: str = "float32") -> None:
    """Writes the arrays of a model in safetensors.

    Args:
        model: quantised or not.
        file: where to.
        sparse: matrices whose zeros are worth it in the form of `sparse.py`.
        dtype: of the float weights of every `Linear` and `Embedding`, float32 or bfloat16.
    """
    coded, floats = coded_matrices(model), float_matrices(model)
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in named_leaves(model).items():
        value = np.asarray(leaf.get_value())
        if name in floats:
            value = value.astype(jnp.dtype(dtype))
        if sparse and (name in coded or name in floats):
            mask, kept = squeezed(value, coded.get(name))
            if mask.nbytes + kept.nbytes < value.nbytes:
                arrays |= {name + MASK: mask, name + KEPT: kept}
                continue
        arrays[name] = value
    save_file(arrays, file)


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
    manifest = _opened(folder, MANIFEST, {"spec": str, "vocab": str, "keep": list, "model": dict})
    spec, vocab = parse_spec(manifest["spec"]), parse_spec(manifest["vocab"])
    keep = tuple(manifest["keep"])
    shapes = jax.eval_shape(
        lambda m: quantise(m, spec, vocab=vocab, keep=keep), build(manifest["model"])
    )
    return _filled(shapes, folder, MANIFEST), manifest


def load_pruned[M](folder: Path, build: Callable[[Any], M]) -> tuple[M, dict[str, Any]]:
    """Reads what `save_pruned` wrote: the model of float32 weights, and the manifest.

    Args:
        folder: the folder.
        build: see `load_quantised`.

    Raises:
        UserError: as `load_quantised`.
    """
    manifest = _opened(folder, PRUNED, {"dtype": str, "model": dict})
    if manifest["dtype"] not in ("float32", "bfloat16"):
        raise UserError(f"{folder / PRUNED} has dtype={manifest['dtype']!r}: prune the model again")
    return _filled(build(manifest["model"]), folder, PRUNED, manifest["dtype"]), manifest


def _filled(shapes: Any, folder: Path, manifest: str, dtype: str = "float32") -> Any:
    """The abstract model with the arrays of the file."""
    try:
        with safe_open(folder / WEIGHTS, framework="np") as file:
            return _filled_from(file, shapes, folder, manifest, dtype)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}): copy it again") from error


def _filled_from(file: Any, shapes: Any, folder: Path, manifest: str, dtype: str) -> Any:
    there, coded, floats = set(file.keys()), coded_matrices(shapes), float_matrices(shapes)
    squeezable = {n for n in (*coded, *floats) if n not in there and n + MASK in there}
    wanted = {n for n in named_leaves(shapes) if n not in squeezable}
    wanted |= {n + end for n in squeezable for end in (MASK, KEPT)}
    if odd := sorted(there ^ wanted):
        what = "lacks" if odd[0] in wanted else "holds"
        raise UserError(
            f"{folder / WEIGHTS} {what} {odd[0]}, which is not as {manifest} says: copy both again"
        )

    def value_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in squeezable:
            value: np.ndarray = file.get_tensor(name)
            return value
        mask, kept = (file.get_tensor(name + end) for end in (MASK, KEPT))
        try:
            return expanded(mask, kept, shape, coded.get(name))
        except UserError as error:
            raise UserError(f"{folder / WEIGHTS}: {name}: {error}: copy it again") from error

    def fill(path: Any, leaf: Any) -> Any:
        name, want = path_name(path), leaf.get_value()
        value = value_of(name, want.shape)
        stored = jnp.dtype(dtype) if name in floats else want.dtype
        if value.shape != want.shape or value.dtype != stored:
            raise UserError(
                f"{folder / WEIGHTS}: {name} is {value.dtype}{list(value.shape)}, {manifest} asks "
                f"for {stored}{list(want.shape)}: copy both again"
            )
        return leaf.replace(jnp.asarray(value.astype(want.dtype)))

    return jax.tree_util.tree_map_with_path(fill, shapes, is_leaf=is_variable)


def _opened(folder: Path, name: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The manifest, after the files have been held against their hashes."""
    path = folder / name
    data = read_json(path)
    if not isinstance(data, dict) or data.get("version") != _VERSION:
        found = data.get("version") if isinstance(data, dict) else None
        raise UserError(f"{path} has version={found!r}, not {_VERSION}: make the folder again")
    for field, kind in {**kinds, "sha256": dict}.items():
        if not isinstance(data.get(field), kind):
            raise UserError(f"{path}: field {field!r} is missing or broken: make the folder again")
    for file in (WEIGHTS, TOKENIZER):
        if not (folder / file).is_file():
            raise UserError(f"{folder} has no {file}: copy the folder again")
        if sha256(folder / file) != data["sha256"].get(file):
            raise UserError(
                f"{folder / file} is not the file that {name} was written with (sha256 "
                "differs): copy the folder again"
            )
    return data
