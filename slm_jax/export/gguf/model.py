"""A model as a GGUF file that llama.cpp runs, and back."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from slm_jax.errors import UserError
from slm_jax.export.gguf.architectures import ARCH_KEY, ROPE_FACTORS
from slm_jax.export.gguf.blocks import BF16, F16, F32, Q8_0, Encoding
from slm_jax.export.gguf.from_config import describe
from slm_jax.export.gguf.names import Part, locate, sources
from slm_jax.export.gguf.read import GGUF, read_gguf
from slm_jax.export.gguf.to_config import described_by
from slm_jax.export.gguf.vocabulary import GGUFTokenizer, vocabulary_from_gguf, vocabulary_to_gguf
from slm_jax.export.gguf.write import PlannedTensor, write_gguf
from slm_jax.models.hf import HFTokenizer, config_from_hf, tensor_map
from slm_jax.models.hf.tensors import Piece, TensorMap, from_hf
from slm_jax.models.lm import LM
from slm_jax.nn.module import count_parameters, named_leaves

Dtype = Literal["f32", "f16", "bf16", "q8_0"]

# The encoding of the matrices, and `general.file_type` of such a file.
_DTYPES: dict[str, tuple[Encoding, int]] = {
    "f32": (F32, 0),
    "f16": (F16, 1),
    "q8_0": (Q8_0, 7),
    "bf16": (BF16, 32),
}
# Small, and llama.cpp computes with them in float32.
_ALWAYS_F32 = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight", "ssm_a", ROPE_FACTORS)


@dataclass(frozen=True)
class Sizes:
    """What a file is made of.

    Attributes:
        arch: llama.cpp's name of the architecture.
        parameters: trained values of the model.
        nbytes: of the whole file.
        tensor_bytes: of the tensors alone.
        encodings: how many tensors have each encoding, by its name.
    """

    arch: str
    parameters: int
    nbytes: int
    tensor_bytes: int
    encodings: dict[str, int]


def save_gguf(
    model: LM,
    path: str | Path,
    *,
    dtype: Dtype = "f32",
    tokenizer: HFTokenizer | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Sizes:
    """Writes a model for llama.cpp; the file appears whole or not at all.

    Vectors, norms, routers, the convolution and A of a Mamba stay float32. With q8_0 a matrix whose
    rows are no multiple of 32 long is stored as f16; the result says how many.

    Args:
        model: the model, its weights plain float arrays.
        path: of the file.
        dtype: of the matrices: float32, float16, bfloat16, or 8 bits with a scale for every 32.
        tokenizer: a byte-level BPE; without one the file takes and gives ids only.
        name: shown by llama.cpp; default the file's.
        overwrite: replace a GGUF file that is there.

    Raises:
        UserError: if llama.cpp has no such model or tokenizer, the path is in use, or numbers do
            not fit the dtype.
    """
    path = Path(path)
    _check_free(path, overwrite)
    said = describe(model.config)
    mapping = tensor_map(model, said.hf["model_type"])
    parts = locate(mapping, said.hf["model_type"], interleave=said.interleave)
    encoding, file_type = _DTYPES[dtype]
    metadata: dict[str, Any] = {
        ARCH_KEY: said.arch,
        "general.type": "model",
        "general.name": name or path.stem,
        "general.file_type": np.uint32(file_type),
        "general.quantization_version": np.uint32(2),
        **{f"{said.arch}.{key}": value for key, value in said.numbers.items()},
        **vocabulary_to_gguf(tokenizer, model.config.vocab_size),
    }
    tensors = _plan(model, mapping, parts, encoding)
    if said.factors is not None:
        factors = said.factors
        tensors[ROPE_FACTORS] = PlannedTensor(factors.shape, F32, lambda: [factors])
    write_gguf(path, metadata, tensors)
    return Sizes(
        said.arch,
        count_parameters(model),
        path.stat().st_size,
        sum(t.encoding.size(t.shape) for t in tensors.values()),
        dict(Counter(t.encoding.name for t in tensors.values())),
    )


def _check_free(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise UserError(f"out={path} is a folder: give the name of a .gguf file")
    if path.exists() and not overwrite:
        raise UserError(f"out={path} exists: choose another or set overwrite=True")


def _plan(
    model: LM, mapping: TensorMap, parts: dict[str, Part], encoding: Encoding
) -> dict[str, PlannedTensor]:
    """Every tensor of the file, its values made when they are written."""
    leaves = {path: leaf.get_value() for path, leaf in named_leaves(model).items()}
    pieces: dict[str, list[Piece]] = {}
    for of_array in mapping.pieces.values():
        for piece in of_array:
            pieces.setdefault(piece.name, []).append(piece)

    def values(name: str) -> np.ndarray:
        """A tensor of the class, float32, in the form of the file."""
        found = sorted(pieces[name], key=lambda piece: piece.rows.start or 0)
        rows = [p.layout.to_hf(np.asarray(leaves[p.path][p.at]), p.n_in) for p in found]
        whole = rows[0] if len(rows) == 1 else np.concatenate(rows)
        return parts[name].form.write(np.asarray(whole, np.float32))

    def all_values(names: list[str]) -> Iterator[np.ndarray]:
        return (values(name) for name in names)

    return {
        gguf: PlannedTensor(shape, _encoding_of(gguf, shape, encoding), partial(all_values, names))
        for gguf, (shape, names) in sources(parts).items()
    }


def _encoding_of(name: str, shape: tuple[int, ...], wanted: Encoding) -> Encoding:
    if len(shape) == 1 or name.endswith(_ALWAYS_F32):
        return F32
    return F16 if shape[-1] % wanted.block else wanted


def load_gguf(
    path: str | Path, *, dtype: Literal["float32", "bfloat16"] | None = None
) -> tuple[LM, Sizes]:
    """Reads a model; the weights become float32 masters, whatever they are in the file.

    Args:
        path: a file of one of `ARCHITECTURES`, its tensors in F32, F16, BF16, Q8_0, Q4_0 or Q4_1.
        dtype: compute dtype, float32 by default.

    Returns:
        The model, and what the file is made of.

    Raises:
        UserError: for a broken file, another architecture, settings that our blocks do not follow,
            and tensors that are missing, left over or of another shape.
    """
    file = read_gguf(path)
    said = described_by(file)
    config = config_from_hf(said.hf)
    if dtype is not None:
        config = replace(config, dtype=dtype)
    shapes = jax.eval_shape(lambda key: LM(config, key), jax.random.key(0))
    mapping = tensor_map(shapes, said.hf["model_type"])
    parts = locate(mapping, said.hf["model_type"], interleave=said.interleave)
    _check(file, parts)

    def rows(name: str, at: slice) -> np.ndarray:
        part = parts[name]
        stored = file.tensors[part.gguf].values(part.entry)
        return part.form.read(stored, mapping.shapes[name])[at]

    model = from_hf(shapes, mapping, rows)
    return model, Sizes(
        said.arch,
        count_parameters(model),
        file.path.stat().st_size,
        sum(t.raw.size for t in file.tensors.values()),
        dict(Counter(t.encoding.name for t in file.tensors.values())),
    )


def load_gguf_tokenizer(path: str | Path, vocab_size: int) -> GGUFTokenizer:
    """The tokenizer of a file whose model has `vocab_size` tokens; UserError if it is not read."""
    return vocabulary_from_gguf(read_gguf(path).metadata, vocab_size)


def _check(file: GGUF, parts: dict[str, Part]) -> None:
    """Holds the tensors of the file against those that its numbers ask for."""
    want = sources(parts)
    for name, (shape, _) in want.items():
        if name not in file.tensors:
            raise UserError(f"{file.path} lacks {name}: copy it again")
        if file.tensors[name].shape != shape:
            raise UserError(
                f"{file.path}: {name} is {list(file.tensors[name].shape)}, its metadata asks for "
                f"{list(shape)}: copy it again"
            )
    if extra := [name for name in file.tensors if name not in want and name != ROPE_FACTORS]:
        raise UserError(
            f"{file.path} holds {extra[0]!r}, for which a {file.metadata[ARCH_KEY]} model has "
            "no place: take a file without it"
        )
