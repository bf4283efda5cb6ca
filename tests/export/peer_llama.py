"""What llama.cpp computes with GGUF files: run in the environment of `make peers`.

    .peers-env/bin/python tests/export/peer_llama.py TOKENS.npy TEXT OUT.npz FILE.gguf...

For every file NAME.gguf the output holds: NAME, the logits of TOKENS `[n, vocab]` with a float32
cache; NAME-greedy, the 64 likeliest ids after TOKENS; NAME-ids, TEXT as ids; NAME-text, the bytes
of the greedy ids. Nothing of slm_jax is imported.
"""

import sys
from pathlib import Path

import llama_cpp
import numpy as np

GREEDY = 64

_defaults = llama_cpp.llama_model_default_params


def _without_repacking() -> llama_cpp.llama_model_params:
    """Weights stay as they are in the file: what llama.cpp makes of them for AMX crashes here."""
    params = _defaults()
    params.use_extra_bufts = False
    return params


# `Llama` does not pass the field on.
llama_cpp.llama_cpp.llama_model_default_params = _without_repacking


def main(tokens: str, text: str, out: str, *files: str) -> None:
    """Runs every file."""
    ids = np.load(tokens).tolist()
    found = {}
    for file in map(Path, files):
        model = llama_cpp.Llama(
            str(file), n_ctx=256, logits_all=True, n_threads=1, use_mmap=False, verbose=False,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
        )  # fmt: skip
        model.eval(ids)
        found[file.stem] = np.array(model.scores[: len(ids)])
        greedy = []
        for _ in range(GREEDY):
            greedy.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(greedy[-1:])
        found[f"{file.stem}-greedy"] = np.array(greedy)
        found[f"{file.stem}-ids"] = np.array(model.tokenize(text.encode(), add_bos=False))
        found[f"{file.stem}-text"] = np.frombuffer(model.detokenize(greedy), np.uint8)
        model.close()
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
