"""`slm export`: a trained model as a file or folder that other programs run."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from safetensors import safe_open

from slm_jax.cli.load import is_hf, load
from slm_jax.cli.script import parse
from slm_jax.cli.show import console, count, facts, nbytes
from slm_jax.data import Tokenizer
from slm_jax.errors import UserError
from slm_jax.export.gguf import Dtype, Sizes, save_gguf
from slm_jax.models.hf import load_hf, save_hf
from slm_jax.models.lm import LM
from slm_jax.nn.module import count_parameters

# The types that `load_hf` reads.
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Export:
    """Writes a trained model for llama.cpp (gguf) or for transformers (hf)."""

    model: tyro.conf.Positional[Path]
    """Folder of a training run, or of a Hugging Face model with its tokenizer.json."""
    out: tyro.conf.Positional[Path]
    """The .gguf file to write, or the folder with hf."""
    format: Literal["gguf", "hf"] = "gguf"
    """gguf: one file for llama.cpp. hf: a folder with config.json and safetensors."""
    dtype: Dtype = "f32"
    """Of the matrices; q8_0 has 8 bits and a scale for every 32. A folder is always f32."""
    tokenizer: bool = True
    """Write the tokenizer too; without it a .gguf file takes and gives token ids only."""
    ema: bool = False
    """Take the average of the weights that the run kept."""
    overwrite: bool = False
    """Replace what is at `out`."""

    def __post_init__(self) -> None:
        if self.format == "hf" and self.dtype != "f32":
            raise UserError(f"dtype={self.dtype} with format=hf: folders are f32; take format=gguf")


def command(args: Sequence[str]) -> None:
    """Loads the model, writes it and reports."""
    config = parse(Export, args=args, prog="slm export")
    model, tokenizer = _load(config)
    start = time.perf_counter()
    if config.format == "gguf":
        sizes = save_gguf(
            model,
            config.out,
            dtype=config.dtype,
            tokenizer=tokenizer,
            name=config.model.name,
            overwrite=config.overwrite,
        )
    else:
        save_hf(model, config.out, tokenizer=tokenizer, overwrite=config.overwrite)
        sizes = folder_sizes(model, config.out)
    rows = {
        "model": f"{config.model}, {count(sizes.parameters)} parameters",
        "out": f"{config.out}, {sizes.arch}, {kinds(sizes)}",
        **size_rows(sizes),
        "tokenizer": "left out" if tokenizer is None else f"{tokenizer.vocab_size:,} tokens",
        "time": f"{time.perf_counter() - start:.1f} s to write",
    }
    console().print(facts(rows))


def _load(config: Export) -> tuple[LM, Tokenizer | None]:
    if not config.tokenizer and is_hf(config.model) and not config.ema:
        return load_hf(config.model), None
    model, tokenizer, _ = load(config.model, ema=config.ema)
    return model, tokenizer if config.tokenizer else None


def folder_sizes(model: LM, folder: Path) -> Sizes:
    """What a Hugging Face folder that `load_hf` reads is made of."""
    encodings: Counter[str] = Counter()
    tensor_bytes = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118, no iterator
                tensor = tensors.get_slice(name)
                encodings[tensor.get_dtype()] += 1
                tensor_bytes += math.prod(tensor.get_shape()) * _BYTES[tensor.get_dtype()]
    written = [*folder.glob("*.safetensors"), *folder.glob("*.json")]
    return Sizes(
        "Hugging Face folder",
        count_parameters(model),
        sum(file.stat().st_size for file in written),
        tensor_bytes,
        dict(encodings),
    )


def kinds(sizes: Sizes) -> str:
    """`211 tensors in Q8_0, 61 in F32`."""
    (first, n), *rest = sorted(sizes.encodings.items(), key=lambda item: -item[1])
    return ", ".join([f"{n} tensors in {first}", *(f"{n} in {name}" for name, n in rest)])


def size_rows(sizes: Sizes) -> dict[str, str]:
    """Size against the float32 weights of the same model, and bits a weight."""
    full = 4 * sizes.parameters
    return {
        "size": f"{nbytes(sizes.nbytes)}: {sizes.nbytes / full:.3f} x its float32 weights "
        f"({nbytes(full)}), {2 * sizes.nbytes / full:.3f} x bfloat16 ({nbytes(full / 2)})",
        "bits per weight": f"{8 * sizes.tensor_bytes / sizes.parameters:.2f}, scales included",
    }
