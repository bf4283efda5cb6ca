"""The other side of train_step.py: the same model and step in PyTorch and `transformers`.

Runs in an environment of its own (make golden-env), which need not know this project: it needs
torch and transformers alone. A line of JSON comes in, a line goes out:

    argv[1]: {"model": folder, "batch": file.npz, "compile": bool, "threads": n, "lr": x}
          -> {"parameters": n, "torch": version, "transformers": version}
    {"steps": n}
          -> {"seconds": s, "losses": [...]}

Between two lines the process waits on stdin and uses no CPU.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers


def main() -> None:
    """Answers until stdin ends. Only answers go to the real stdout; libraries print elsewhere."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    config = json.loads(sys.argv[1])
    torch.set_num_threads(config["threads"])
    batch = {k: torch.from_numpy(v.astype(np.int64)) for k, v in np.load(config["batch"]).items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32)
    model.train()
    optimizer = adamw(model, config["lr"])
    parameters = sum(p.numel() for p in model.parameters())
    forward = torch.compile(model) if config["compile"] else model
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"parameters": parameters, **versions}), file=answers)
    for line in sys.stdin:
        n = json.loads(line)["steps"]
        start = time.perf_counter()
        losses = [step(forward, model, optimizer, batch) for _ in range(n)]
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "losses": losses}), file=answers)


def adamw(model: Any, lr: float) -> torch.optim.Optimizer:
    """AdamW of this project's defaults: weight decay on matrices and the embedding only."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def step(forward: Any, model: Any, optimizer: Any, batch: dict[str, torch.Tensor]) -> float:
    """One step on the batch; its loss in nats a token."""
    # `shift_labels` are targets as they are; `labels` alone would drop the last of every row.
    targets = batch["targets"]
    loss = forward(
        input_ids=batch["tokens"], labels=targets, shift_labels=targets, use_cache=False
    ).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


if __name__ == "__main__":
    main()
