"""PyTorch's side of generate.py: greedy text by `transformers`, eager, with its KV cache.

Runs in an environment of its own (make golden-env): torch and transformers alone.

    argv[1]: {"model": folder, "prompt": [ids], "new": n, "threads": n,
              "clock": "wall" or "cpu"}
          -> {"torch": version, "transformers": version}
    {}    -> {"prefill": seconds, "decode": seconds, "tokens": [n + 1 ids]}
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers


def main() -> None:
    """Answers until stdin ends. Only answers go to the real stdout; libraries print elsewhere."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    config = json.loads(sys.argv[1])
    now = time.process_time if config["clock"] == "cpu" else time.perf_counter
    torch.set_num_threads(config["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32)
    model.eval()
    prompt = torch.tensor([config["prompt"]])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions), file=answers)
    for _ in sys.stdin:
        with torch.inference_mode():
            print(json.dumps(turn(model, prompt, config["new"], now)), file=answers)


def turn(model: Any, prompt: torch.Tensor, new: int, now: Callable[[], float]) -> dict[str, Any]:
    """The likeliest tokens after `prompt` `[1, S]`; the head reads its last token only."""
    start = now()
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    tokens = [int(out.logits[0, -1].argmax())]
    middle = now()
    for _ in range(new):
        last = torch.tensor([tokens[-1:]])
        out = model(input_ids=last, past_key_values=out.past_key_values, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    end = now()
    return {"prefill": middle - start, "decode": end - middle, "tokens": tokens}


if __name__ == "__main__":
    main()
