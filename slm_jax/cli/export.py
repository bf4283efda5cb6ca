"""`slm export`: a trained model as a file or folder that other programs run."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from safetensors import safe_open

from slm_jax.cli.load import end_ids, load
from slm_jax.cli.measure import loss_rows, read_texts, score_programs, score_text
from slm_jax.cli.script import parse
from slm_jax.cli.show import console, count, facts, nbytes
from slm_jax.compress import size
from slm_jax.compress.io import is_quantised_folder
from slm_jax.data import Tokenizer
from slm_jax.errors import UserError
from slm_jax.evaluate import Subject, TextScore
from slm_jax.export.gguf import Dtype, Sizes, load_gguf, save_gguf
from slm_jax.export.stablehlo import PLATFORMS, save_stablehlo
from slm_jax.models.hf import is_hf, load_hf, save_hf
from slm_jax.models.lm import LM
from slm_jax.train.serialize import to_json

_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I8": 1, "U8": 1}
_WRITTEN = (".safetensors", ".json", ".stablehlo", ".py")


@dataclass(frozen=True)
class Export:
    """Writes a trained model for llama.cpp (gguf), for transformers (hf) or for jax (stablehlo)."""

    model: tyro.conf.Positional[Path]
    """Folder of a training run, of a Hugging Face model with its tokenizer.json, or, with
    stablehlo, of `slm quantize`."""
    out: tyro.conf.Positional[Path]
    """The .gguf file to write, or the folder with hf and stablehlo."""
    format: Literal["gguf", "hf", "stablehlo"] = "gguf"
    """gguf: one file for llama.cpp. hf: a folder with config.json and safetensors. stablehlo: a
    folder with prefill and decode as programs for CPUs, NVIDIA GPUs and TPUs, safetensors of the
    types that the model has, and run.py, which needs none of this project."""
    dtype: Dtype = "f32"
    """Of the matrices with gguf; q8_0 has 8 bits and a scale for every 32."""
    tokenizer: bool = True
    """Write the tokenizer too; without it a .gguf file takes and gives token ids only."""
    ema: bool = False
    """Take the average of the weights that the run kept."""
    overwrite: bool = False
    """Replace what is at `out`."""
    text: str | None = None
    """Text to measure the loss on, before and after, as in `slm train --data.source`."""
    text_tokens: int = 8192
    """Most tokens of it."""

    def __post_init__(self) -> None:
        if self.format != "gguf" and self.dtype != "f32":
            raise UserError(
                f"dtype={self.dtype} with format={self.format}: folders hold what the model has; "
                "take format=gguf, or export what `slm quantize` wrote with format=stablehlo"
            )


def command(args: Sequence[str]) -> None:
    """Loads the model, writes it and reports."""
    config = parse(Export, args=args, prog="slm export")
    texts = None if config.text is None else read_texts(config.text)
    model, tokenizer, prefix = _load(config)
    start = time.perf_counter()
    sizes = _write(config, model, tokenizer if config.tokenizer else None, prefix)
    seconds = time.perf_counter() - start
    rows = {
        "model": f"{config.model}, {count(sizes.parameters)} parameters",
        "out": f"{config.out}, {sizes.arch}, {kinds(sizes)}",
        **size_rows(sizes),
        "tokenizer": f"{tokenizer.vocab_size:,} tokens"
        if config.tokenizer and tokenizer is not None
        else "left out",
    }
    if texts is not None:
        assert tokenizer is not None
        before = score_text(Subject(model, tokenizer, prefix), texts, config.text_tokens)
        rows |= loss_rows(before, _score_written(config, Subject(model, tokenizer, prefix), texts))
    console().print(facts(rows | {"time": f"{seconds:.1f} s to write"}))


def _write(config: Export, model: LM, tokenizer: Tokenizer | None, prefix: np.ndarray) -> Sizes:
    eos_ids = () if tokenizer is None else end_ids(config.model, tokenizer)
    if config.format == "stablehlo":
        programs = save_stablehlo(
            model,
            config.out,
            config=to_json(model.config),
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            prefix=prefix.tolist(),
            overwrite=config.overwrite,
        )
        most = f"{programs.most} tokens of each prompt at a time"
        return folder_sizes(model, config.out, f"{', '.join(PLATFORMS)} programs, {most}")
    if is_quantised_folder(config.model):
        raise UserError(
            f"format={config.format}: {config.model} is quantised: take format=stablehlo, or "
            "export the model it was made from"
        )
    if config.format == "hf":
        save_hf(model, config.out, tokenizer=tokenizer, eos_ids=eos_ids, overwrite=config.overwrite)
        return folder_sizes(model, config.out)
    return save_gguf(
        model,
        config.out,
        dtype=config.dtype,
        tokenizer=tokenizer,
        name=config.model.name,
        overwrite=config.overwrite,
    )


def _score_written(config: Export, subject: Subject, texts: list[str]) -> TextScore:
    """Loss of what was written, read back; with stablehlo what its programs compute."""
    if config.format == "stablehlo":
        return score_programs(config.out, subject, texts, config.text_tokens)
    model = load_hf(config.out) if config.format == "hf" else load_gguf(config.out)[0]
    return score_text(replace(subject, model=model), texts, config.text_tokens)


def _load(config: Export) -> tuple[LM, Tokenizer | None, np.ndarray]:
    """The model, with a tokenizer where one is needed: not every folder of others has one."""
    if not config.tokenizer and config.text is None and is_hf(config.model) and not config.ema:
        return load_hf(config.model), None, np.zeros(0, np.int32)
    return load(config.model, ema=config.ema)


def folder_sizes(model: LM, folder: Path, what: str = "Hugging Face folder") -> Sizes:
    """What a folder with the weights of a model in safetensors is made of."""
    encodings: Counter[str] = Counter()
    tensor_bytes = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118, no iterator
                tensor = tensors.get_slice(name)
                encodings[tensor.get_dtype()] += 1
                tensor_bytes += math.prod(tensor.get_shape()) * _BYTES[tensor.get_dtype()]
    written = [file for file in folder.iterdir() if file.suffix in _WRITTEN]
    return Sizes(
        what,
        size(model).parameters,
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
