"""A folder with config.json and safetensors files, read and written one array at a time."""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from slm_jax.errors import UserError
from slm_jax.models.files import check_free, read_json, whole_folder
from slm_jax.models.hf.configs import config_from_hf, config_to_hf, family_of
from slm_jax.models.hf.tensors import TensorMap, from_hf, tensor_map, to_hf
from slm_jax.models.lm import LM

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16")
# Constants that old checkpoints store although they follow from the configuration.
_DERIVED = "rotary_emb.inv_freq"


def is_hf(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model."""
    try:
        return "model_type" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # who reads the folder says what is wrong


class HFTokenizer(Protocol):
    """What `save_hf` needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""

    def to_json(self) -> str:
        """The text of its tokenizer.json, as the `tokenizers` library writes it."""


def load_hf(folder: str | Path, *, dtype: Literal["float32", "bfloat16"] | None = None) -> LM:
    """Reads a model that `transformers` saved.

    Holds the model and one more of its arrays in memory: the files are mapped, not read.

    Args:
        folder: holds config.json and model.safetensors, or an index of several such files.
        dtype: compute dtype, float32 by default. The weights become float32 masters either way.

    Returns:
        The model; `model.config` is `config_from_hf` of its config.json.

    Raises:
        UserError: for a missing or broken file, for what `config_from_hf` refuses, and for tensors
            that are missing, left over, of another shape or not of a float type.
    """
    folder = Path(folder)
    hf = _read_object(folder / CONFIG)
    config = config_from_hf(hf)
    if dtype is not None:
        config = replace(config, dtype=dtype)
    shapes = jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))
    mapping = tensor_map(shapes, hf["model_type"])
    with ExitStack() as stack:
        files = _open(folder, stack)
        if config.tie_embeddings:
            _drop_tied_head(folder, files, f"{family_of(hf['model_type']).embed}.weight")
        _check(folder, files, mapping)
        return from_hf(shapes, mapping, lambda name, rows: files[name].get_slice(name)[rows])


def save_hf(
    model: LM,
    folder: str | Path,
    *,
    model_type: str | None = None,
    tokenizer: HFTokenizer | None = None,
    eos_ids: Sequence[int] = (),
    overwrite: bool = False,
) -> None:
    """Writes a folder that `transformers` 5 loads: config.json and model.safetensors, float32.

    The folder appears whole or not at all. Each array goes straight to the file.

    Args:
        model: the model, its weights plain float arrays.
        folder: where to; made with its parents.
        model_type: the class to write for, where several compute this model; see `config_to_hf`.
        tokenizer: written too.
        eos_ids: what ends a text (`eos_token_id`); by default the tokenizer's end of text.
        overwrite: replace the whole folder if it holds a model.

    Raises:
        UserError: if no class computes this model, `folder` is in use, or the tokenizer has more
            ids than the model.
    """
    folder = Path(folder)
    hf = config_to_hf(model.config, model_type)
    mapping = tensor_map(model, hf["model_type"])
    if tokenizer is not None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"vocab_size={model.config.vocab_size} is less than the tokenizer's "
                f"{tokenizer.vocab_size}: give the tokenizer the model was trained with"
            )
        eos_ids = eos_ids or (tokenizer.eos_id,)
    if eos_ids:
        hf["eos_token_id"] = eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
    check_free(folder, marker=CONFIG, what="a model", overwrite=overwrite)
    with whole_folder(folder) as building:
        _write_safetensors(building / WEIGHTS, model, mapping)
        if tokenizer is not None:
            _write_tokenizer(building, tokenizer)
        _write_json(building / CONFIG, hf)


def _read_object(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a JSON {type(data).__name__}, not an object: copy it again")
    return data


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file of every tensor in the folder, by the tensor's name."""
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder} has no {WEIGHTS} and no {INDEX}: save it as safetensors")
        names = _listed(folder)
    files = {}
    for name in names:
        try:
            file = stack.enter_context(safe_open(folder / name, framework="np"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / name} cannot be read ({error}): copy it again") from error
        files.update({tensor: file for tensor in file.keys()})  # noqa: SIM118, no iterator
    return files


def _listed(folder: Path) -> list[str]:
    """The files that an index names; UserError unless they are plain names in this folder."""
    weights = _read_object(folder / INDEX).get("weight_map")
    names: list[Any] = list(weights.values()) if isinstance(weights, dict) else [weights]
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise UserError(
                f"{folder / INDEX} names the file {str(name)[:60]!r}: only files of its own folder "
                "are read"
            )
    return sorted(set(names))


def _drop_tied_head(folder: Path, files: dict[str, Any], embed: str) -> None:
    """Takes a second copy of the embeddings out of `files`; UserError if it is no copy."""
    head = "lm_head.weight"
    if head not in files or embed not in files:
        return
    if not np.array_equal(files[head].get_tensor(head), files[embed].get_tensor(embed)):
        raise UserError(
            f"{folder}: {head} is not {embed} although tie_word_embeddings=true: set it to false"
        )
    del files[head]


def _check(folder: Path, files: dict[str, Any], mapping: TensorMap) -> None:
    """Holds the tensors of the folder against those that its config.json asks for."""
    want = mapping.shapes
    if missing := [name for name in want if name not in files]:
        raise UserError(
            f"{folder} lacks {_some(missing)}, which {CONFIG} asks for: "
            f"mend {CONFIG} or the weights"
        )
    if extra := [name for name in files if name not in want and not name.endswith(_DERIVED)]:
        raise UserError(
            f"{folder} holds {_some(extra)}, for which {CONFIG} has no place: "
            f"mend {CONFIG} or the weights"
        )
    for name, shape in want.items():
        tensor = files[name].get_slice(name)
        if tuple(tensor.get_shape()) != shape:
            raise UserError(
                f"{folder}: {name} is {tensor.get_shape()}, {CONFIG} asks for {list(shape)}: "
                f"mend {CONFIG} or the weights"
            )
        if tensor.get_dtype() not in _FLOATS:
            raise UserError(
                f"{folder}: {name} is of type {tensor.get_dtype()}: "
                f"only {', '.join(_FLOATS)} are read; dequantise it first"
            )


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} and {len(rest)} more tensors" if rest else first


def _write_safetensors(path: Path, model: LM, mapping: TensorMap) -> None:
    """Lays the file out, then fills it through a memory map, so that no second copy is made.

    The format: length of the header (8 bytes), header (JSON), and the tensors without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    spans, end = {}, 0
    for name, shape in mapping.shapes.items():
        spans[name] = slice(end, end + int(np.prod(shape)))
        end = spans[name].stop
        offsets = [4 * spans[name].start, 4 * end]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + 4 * end)
    data = np.memmap(path, "<f4", "r+", offset=8 + len(text), shape=(end,))
    out = {name: data[span].reshape(mapping.shapes[name]) for name, span in spans.items()}
    to_hf(model, mapping, out)
    data.flush()


def _write_tokenizer(folder: Path, tokenizer: HFTokenizer) -> None:
    """tokenizer.json and the two lines that `AutoTokenizer` wants beside it."""
    text = tokenizer.to_json()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": Tokenizer.from_str(text).id_to_token(tokenizer.eos_id),
        },
    )
