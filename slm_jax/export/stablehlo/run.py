"""Continues token ids with the model of this folder: needs jax and flatbuffers, nothing else.

python run.py 12,7,30 5,6 --new 16        one line of new ids for each row of ids
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

DTYPES: dict[str, Any] = {
    "F32": np.float32,
    "BF16": jnp.bfloat16,
    "I8": np.int8,
    "U8": np.uint8,
    "I32": np.int32,
}


class Model:
    """Weights and programs of a folder; every file is the one its manifest was written with."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        if self.manifest.get("format") != "slm_jax stablehlo 1":
            raise ValueError(f"format={self.manifest.get('format')!r}: this runner reads version 1")
        programs = [self.read(self.manifest["programs"][k]) for k in ("start", "prefill", "decode")]
        start, prefill, decode = (export.deserialize(bytearray(p)) for p in programs)
        self.start = jax.jit(start.call)
        self.prefill = jax.jit(prefill.call, donate_argnums=3)
        self.decode = jax.jit(decode.call, donate_argnums=3)
        self.weights = self.tensors(self.read(self.manifest["weights"]))

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
            raise ValueError(f"{name!r} is no file of this folder: only those are read")
        data = (self.folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.manifest["sha256"].get(name):
            raise ValueError(f"{name} is not what the manifest was written with: copy it again")
        return data

    def tensors(self, data: bytes) -> dict[str, jax.Array]:
        """The arrays of a safetensors file, which are to be those of the manifest."""
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        header.pop("__metadata__", None)
        if {k: [v["dtype"], v["shape"]] for k, v in header.items()} != self.manifest["tensors"]:
            raise ValueError("the tensors are not those of the manifest: copy the folder again")
        out = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            flat = np.frombuffer(data[end + first : end + last], DTYPES[entry["dtype"]])
            out[name] = jnp.asarray(flat.reshape(entry["shape"]))
        return out

    def generate(self, prompts: list[list[int]], new: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of token ids to `[rows, new]` ids, the likeliest each time, and their logits."""
        vocab, step = self.manifest["vocab_size"], self.manifest["multiple"]
        if new < 1 or not all(p and min(p) >= 0 and max(p) < vocab for p in prompts):
            raise ValueError(f"give rows of token ids below {vocab}, and new of at least 1")
        lengths = np.array([len(p) for p in prompts])
        size = min(-(-max(lengths) // step) * step, self.manifest["most"])
        total = -(-max(lengths) // size) * size
        tokens, positions = np.zeros((len(prompts), total), np.int32), np.arange(total)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[total - len(prompt) :] = prompt
        positions = np.maximum(positions - (total - lengths)[:, None], -1).astype(np.int32)
        room = max(total + new, self.manifest["least_room"])
        state = self.start(np.zeros((len(prompts), room), bool))
        for i in range(0, total, size):
            part = slice(i, i + size)
            logits, state = self.prefill(self.weights, tokens[:, part], positions[:, part], state)
        seen = [logits]
        for i in range(new - 1):
            token = jnp.argmax(logits, -1).astype(jnp.int32)[:, None]
            at = (lengths + i).astype(np.int32)[:, None]
            logits, state = self.decode(self.weights, token, at, state)
            seen.append(logits)
        logits = np.stack(seen, 1)
        return logits.argmax(-1), logits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", nargs="+", type=lambda text: [int(i) for i in text.split(",")])
    parser.add_argument("--new", type=int, default=16)
    arguments = parser.parse_args()
    try:
        rows, _ = Model(Path(__file__).parent).generate(arguments.ids, arguments.new)
    except (OSError, ValueError, LookupError) as error:
        parser.error(f"{type(error).__name__}: {error}")
    for row in rows:
        print(",".join(map(str, row)))
