"""The folders that commands read language models from: runs, smaller and Hugging Face ones."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from slm_jax.compress.io import (
    MANIFEST,
    PRUNED,
    TOKENIZER,
    is_pruned_folder,
    is_quantised_folder,
    load_pruned,
    load_quantised,
)
from slm_jax.data import Tokenizer, load_tokenizer
from slm_jax.errors import UserError
from slm_jax.models.hf import is_hf, load_hf
from slm_jax.models.lm import LM, LMConfig
from slm_jax.train.experiment import load_model, load_run_tokenizer
from slm_jax.train.folder import CONFIG_FILE
from slm_jax.train.serialize import from_json

GENERATION = "generation_config.json"


def load(folder: Path, *, ema: bool = False) -> tuple[LM, Tokenizer, np.ndarray]:
    """Model, tokenizer, and the ids (int32) that the model expects before every text.

    Args:
        folder: of a training run, of `slm quantize` or `slm prune`, or of a Hugging Face model.
        ema: the average of the weights that a run kept.

    Raises:
        UserError: if it is none of these, or damaged.
    """
    one_set = "holds one set of weights: leave out ema"
    if is_quantised_folder(folder) or is_pruned_folder(folder):
        if ema:
            kind = "quantised" if is_quantised_folder(folder) else "pruned"
            raise UserError(f"ema=True: {folder} is a {kind} model and {one_set}")
        return _load_smaller(folder)
    if not is_hf(folder):
        tokenizer = load_run_tokenizer(folder)
        return load_model(folder, ema=ema)[0], tokenizer, np.zeros(0, np.int32)
    if ema:
        raise UserError(f"ema=True: {folder} is a Hugging Face model and {one_set}")
    file = folder / "tokenizer.json"
    tokenizer = load_tokenizer(str(file))
    # What its post-processor puts around an empty text: the beginning of text, if it has one.
    prefix = tokenizers.Tokenizer.from_file(str(file)).encode("").ids
    return load_hf(folder), tokenizer, np.asarray(prefix, np.int32)


def end_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text of this model: several where an assistant's turn ends otherwise.

    From generation_config.json or config.json of a Hugging Face folder, from what `slm quantize`
    and `slm prune` kept of these; else the tokenizer's end of text.

    Args:
        folder: as in `load`.
        tokenizer: that `load` gave.

    Raises:
        UserError: if a file names no token ids.
    """
    sources = [(GENERATION, "eos_token_id"), (CONFIG_FILE, "eos_token_id")]
    if is_quantised_folder(folder):
        sources = [(MANIFEST, "eos_ids")]
    elif is_pruned_folder(folder):
        sources = [(PRUNED, "eos_ids")]
    elif not is_hf(folder):
        sources = []
    for name, field in sources:
        if not (folder / name).is_file():
            continue
        try:
            data = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / name} cannot be read ({error}): copy it again") from error
        found = data.get(field) if isinstance(data, dict) else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise UserError(f"{folder / name}: {field}={found!r} is no list of token ids: mend it")
        return tuple(ids)
    return (tokenizer.eos_id,)


def _load_smaller(folder: Path) -> tuple[LM, Tokenizer, np.ndarray]:
    read = load_quantised if is_quantised_folder(folder) else load_pruned
    model, manifest = read(folder, functools.partial(_abstract, folder))
    tokenizer = load_tokenizer(str(folder / TOKENIZER))
    prefix = manifest.get("prefix", [])
    if not isinstance(prefix, list) or not all(isinstance(i, int) for i in prefix):
        raise UserError(f"{folder}: prefix={prefix!r} is no list of token ids: make it again")
    return model, tokenizer, np.asarray(prefix, np.int32)


def _abstract(folder: Path, data: Any) -> LM:
    """The float model of a saved configuration, shapes only."""
    try:
        config = from_json(LMConfig, data)
        return jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))
    except (TypeError, ValueError, ArithmeticError) as error:  # UserError is a ValueError
        raise UserError(f"{folder} describes no model ({error}): make it again") from error
