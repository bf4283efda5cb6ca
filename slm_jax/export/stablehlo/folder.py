"""A folder with the programs of a model, its weights, a manifest, and the script that runs them."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from slm_jax import __version__
from slm_jax.export.stablehlo.programs import PLATFORMS, Programs, export_programs
from slm_jax.models.files import check_free, sha256, whole_folder
from slm_jax.models.hf import HFTokenizer
from slm_jax.models.lm import LM
from slm_jax.nn.module import named_leaves

MANIFEST, WEIGHTS, TOKENIZER, RUNNER = (
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "run.py",
)
FORMAT = "slm_jax stablehlo 1"


def check_out(folder: Path, *, overwrite: bool) -> None:
    """Refuses a folder that `save_stablehlo` may not write.

    Raises:
        UserError: if it is in use by anything else than exported programs, or by such and
            `overwrite` is false.
    """
    check_free(folder, marker=RUNNER, what="exported programs", overwrite=overwrite)


def save_stablehlo(
    model: LM,
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    tokenizer: HFTokenizer | None = None,
    eos_ids: Sequence[int] = (),
    prefix: Sequence[int] = (),
    overwrite: bool = False,
) -> Programs:
    """Writes programs for CPUs, NVIDIA GPUs and TPUs; the folder appears whole or not at all.

    Weights keep their types: codes of 8 bits stay int8, and are multiplied as such where the model
    does that (w8a8).

    Args:
        model: the model, quantised or not.
        folder: where to; made with its parents.
        config: JSON that says what the model is, for whoever opens the folder.
        tokenizer: written too.
        eos_ids: what ends a text; by default the tokenizer's end of text.
        prefix: token ids that the model expects before every text.
        overwrite: replace exported programs.

    Returns:
        The programs that were written.

    Raises:
        UserError: as `check_out`.
    """
    folder = Path(folder)
    check_out(folder, overwrite=overwrite)
    programs = export_programs(model)
    if tokenizer is not None:
        eos_ids = eos_ids or (tokenizer.eos_id,)
    exported = {name: getattr(programs, name) for name in ("start", "prefill", "decode")}
    names = {name: f"{name}.stablehlo" for name in exported}
    with whole_folder(folder) as building:
        for name, program in exported.items():
            (building / names[name]).write_bytes(program.serialize())
        leaves = named_leaves(model).items()
        save_file({k: np.asarray(v.get_value()) for k, v in leaves}, building / WEIGHTS)
        hashed = [*names.values(), WEIGHTS]
        if tokenizer is not None:
            (building / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
            hashed.append(TOKENIZER)
        manifest = {
            "format": FORMAT,
            "made_by": {"slm_jax": __version__, "jax": jax.__version__},
            "platforms": PLATFORMS,
            "programs": names,
            "arguments": {name: _arguments(program) for name, program in exported.items()},
            "multiple": programs.multiple,
            "most": programs.most,
            "least_room": programs.least_room,
            "vocab_size": model.config.vocab_size,
            "tokenizer": None if tokenizer is None else TOKENIZER,
            "eos_ids": [int(i) for i in eos_ids],
            "prefix": [int(i) for i in prefix],
            "model": config,
            "weights": WEIGHTS,
            "tensors": _tensors(building / WEIGHTS),
            "sha256": {name: sha256(building / name) for name in hashed},
        }
        (building / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name(RUNNER), building / RUNNER)
    return programs


def _arguments(program: Any) -> list[str]:
    """What a program takes after the weights, as `int32[b,16*n]`."""
    args, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    return [a.str_short() for a in jax.tree.leaves([a for a in args if not isinstance(a, dict)])]


def _tensors(path: Path) -> dict[str, list[Any]]:
    """Type and shape of every array of a safetensors file."""
    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no iterator
    return {name: [s.get_dtype(), s.get_shape()] for name, s in slices.items()}
