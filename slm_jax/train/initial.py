"""Beginning with the weights of another model: a run of ours, or a Hugging Face folder."""

import string
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.compress.qat import QATConfig, floats, with_steps
from slm_jax.data import Tokenizer, load_tokenizer
from slm_jax.errors import UserError
from slm_jax.models.files import read_json
from slm_jax.models.hf import config_from_hf, is_hf, load_hf
from slm_jax.models.lm import LM, LMConfig
from slm_jax.parallel import shardings
from slm_jax.train import folder
from slm_jax.train.checkpoint import CHECKPOINTS_FOLDER, Checkpoints
from slm_jax.train.serialize import differences, from_json, to_json
from slm_jax.train.step import TrainState

# Text that tokenizers split in different ways.
_SAMPLE = string.printable + " The year 2026, naïve coöperation: 你好, 1234567890 != 0x1F\n\n"
# Fields of a model that change neither its weights nor what it computes, but for rounding.
_FREE = ("max_seq_len", "dtype", "residual_dtype", "init_std", "remat", "scan_unroll")


def check_source(source: Path, model: LMConfig, tokenizer: Tokenizer, *, out: Path) -> None:
    """Refuses what a run cannot begin with; reads no weights.

    Args:
        source: folder of a run, or of a Hugging Face model.
        model: that is to be trained.
        tokenizer: of its data.
        out: its run folder.

    Raises:
        UserError: if there is no model in the folder, or one of another architecture or another
            tokenizer.
    """
    if source.resolve() == out.resolve():
        raise UserError(f"init_from={source} is the run folder itself: choose another --out")
    found, _ = _described(source)
    changed = [
        d
        for d in differences(to_json(found), to_json(model))
        if d.split(":")[0].split(".")[0] not in _FREE
    ]
    if changed:
        raise UserError(
            f"init_from={source} is another model ({changed[0].replace('saved', 'it has')}"
            + (f" and {len(changed) - 1} more" if len(changed) > 1 else "")
            + "): give the options that it was trained with"
        )
    if not _has_tokenizer(source, tokenizer):
        raise UserError(
            f"data.tokenizer={tokenizer.name} is not the tokenizer of init_from={source}: give its "
            "own"
        )


def with_weights_of(source: Path, model: LMConfig, qat: QATConfig, state: TrainState) -> TrainState:
    """A first state with other weights; step sizes are those that LSQ begins with at these.

    Args:
        source: that `check_source` has passed.
        model: that is to be trained.
        qat: how it is trained.
        state: of the run's seed, on the mesh.

    Raises:
        UserError: if the weights cannot be read.
    """
    own = floats(state.model)
    if is_hf(source):
        found = jax.tree.map(np.asarray, load_hf(source))
    else:
        found = _saved(source, jax.tree.leaves(own)[0].sharding.mesh)
    leaves = [
        jax.device_put(new, old.sharding)
        for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True)
    ]
    loaded = jax.tree.unflatten(jax.tree.structure(own), leaves)
    places = jax.tree.map(lambda a: a.sharding, state.model)
    # Copies: what was read from a file may not be donated, and model and average are two buffers.
    fresh = jax.jit(lambda m: jax.tree.map(jnp.copy, with_steps(m, qat)), out_shardings=places)
    ema = None if state.ema is None else fresh(loaded)
    return state._replace(model=fresh(loaded), ema=ema)


def _described(source: Path) -> tuple[LMConfig, QATConfig]:
    """The model, and how it was trained for fewer bits."""
    if is_hf(source):
        return config_from_hf(read_json(source / folder.CONFIG_FILE)), QATConfig()
    data = folder.read_config(source, kind="Experiment")
    qat = from_json(QATConfig, data["qat"]) if "qat" in data else QATConfig()
    return from_json(LMConfig, data["model"]), qat


def _has_tokenizer(source: Path, tokenizer: Tokenizer) -> bool:
    """Whether a model was trained with a tokenizer; true if its folder has none.

    The tokenizer.json of an exported model may be another definition with the same ids.
    """
    if not is_hf(source):
        data = folder.read_config(source, kind="Experiment")
        return bool(data["tokenizer_fingerprint"] == tokenizer.fingerprint)
    file = source / "tokenizer.json"
    if not file.exists():
        return True
    found = load_tokenizer(str(file))
    return found.fingerprint == tokenizer.fingerprint or np.array_equal(
        found.encode(_SAMPLE), tokenizer.encode(_SAMPLE)
    )


def _saved(source: Path, mesh: Any) -> LM:
    """The newest float weights of a run, split over a mesh."""
    config, qat = _described(source)
    abstract = jax.eval_shape(lambda key: with_steps(LM(config, key), qat), jax.random.key(0))
    wanted = jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        abstract,
        shardings(abstract, mesh),
    )
    with Checkpoints(source / CHECKPOINTS_FOLDER, read_only=True) as checkpoints:
        return floats(checkpoints.restore({"model": wanted}).state["model"])
