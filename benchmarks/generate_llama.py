"""llama.cpp's side of generate.py: greedy text from a GGUF file.

Runs in an environment of its own (make peers): llama-cpp-python and numpy alone.

    argv[1]: {"model": file, "prompt": [ids], "new": n, "threads": n,
              "clock": "wall" or "cpu"}
          -> {"llama-cpp-python": version, "system": what llama.cpp uses of the processor}
    {}    -> {"prefill": seconds, "decode": seconds, "tokens": [n + 1 ids]}
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np

_defaults = llama_cpp.llama_model_default_params


def _without_repacking() -> llama_cpp.llama_model_params:
    """Weights stay as they are in the file: what llama.cpp makes of them for AMX crashes here."""
    params = _defaults()
    params.use_extra_bufts = False
    return params


# `Llama` does not pass the field on.
llama_cpp.llama_cpp.llama_model_default_params = _without_repacking


def main() -> None:
    """Answers until stdin ends. Only answers go to the real stdout; libraries print elsewhere."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    config = json.loads(sys.argv[1])
    now = time.process_time if config["clock"] == "cpu" else time.perf_counter
    prompt, new, threads = config["prompt"], config["new"], config["threads"]
    model = llama_cpp.Llama(
        config["model"], n_ctx=len(prompt) + new + 1, n_threads=threads, n_threads_batch=threads,
        use_mmap=False, verbose=False,
    )  # fmt: skip
    system = llama_cpp.llama_print_system_info().decode()
    print(json.dumps({"llama-cpp-python": llama_cpp.__version__, "system": system}), file=answers)
    for _ in sys.stdin:
        print(json.dumps(turn(model, prompt, new, now)), file=answers)


def turn(
    model: llama_cpp.Llama, prompt: list[int], new: int, now: Callable[[], float]
) -> dict[str, Any]:
    """The likeliest tokens after the prompt; the head reads its last token only."""
    model.reset()
    start = now()
    model.eval(prompt)
    tokens = [likeliest(model)]
    middle = now()
    for _ in range(new):
        model.eval(tokens[-1:])
        tokens.append(likeliest(model))
    end = now()
    return {"prefill": middle - start, "decode": end - middle, "tokens": tokens}


def likeliest(model: llama_cpp.Llama) -> int:
    """The likeliest token after the last that was read."""
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())


if __name__ == "__main__":
    main()
