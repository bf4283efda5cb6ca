"""Run by test_steps.py in a process of its own, so that XLA's log can be read.

    python steps.py STEPS ARCHITECTURE[+FORMAT]:MESH,MESH/ACCUMULATE,... ...

Trains a tiny model on eight fake devices, or on one where the mesh is "one", for fewer bits where
a format of `QATConfig` is given. For every run it writes a line to stderr, which what XLA logs then
follows, and a JSON object to stdout: loss and gradient norm of every step, and how many collectives
of each kind a step runs.
"""

import json
import sys
from typing import Any

import jax
import numpy as np

from slm_jax.compress.qat import QATConfig
from slm_jax.models.lm import LMConfig
from slm_jax.models.trm import TRMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.ssm import MambaConfig
from slm_jax.parallel import make_mesh, shard_batch
from slm_jax.plan.collectives import read_collectives
from slm_jax.train.optimizer import OptimizerConfig
from slm_jax.train.step import BatchShapes, StepConfig, compile_step
from slm_jax.train.task import Task
from slm_jax.train.tasks.lm import LMLossConfig, LMTask
from slm_jax.train.tasks.trm import TRMLossConfig, TRMTask
from tests.parallel.compare import parse_mesh

ROWS, LENGTH, VOCAB, WIDTH = 32, 16, 48, 16

_GQA = AttentionConfig(n_heads=4, n_kv_heads=4, head_dim=4, window=9)
_SWIGLU = MLPConfig(16)
_MAMBA = MambaConfig(d_inner=16, d_state=4)
_MOE = MoEConfig(n_experts=4, d_ff=8)
PATTERNS = {
    "dense": (LayerConfig(_GQA, _SWIGLU),),
    "moe": (LayerConfig(_GQA, _MOE),),
    "mamba": (LayerConfig(_MAMBA, None),),
    "hybrid": (LayerConfig(_MAMBA, _SWIGLU), LayerConfig(_GQA, _MOE)),
}


def task_of(architecture: str, accumulate: bool) -> Task:
    """The task; what is a mean over a microbatch is left out where microbatches are compared."""
    if architecture == "trm":
        model = TRMConfig(
            VOCAB, LENGTH, d_model=WIDTH, n_heads=4, n_layers=1, mixer="attention", n_prefix=4,
            n_cycles=2, n_latent_steps=2, ff_multiple=8,
        )  # fmt: skip
        return TRMTask(model, ROWS, TRMLossConfig(3, exploration=0.0))
    config = LMConfig(VOCAB, WIDTH, 2, PATTERNS[architecture])
    balance = LMLossConfig(load_balance=0.0, router_z=0.0) if accumulate else LMLossConfig()
    return LMTask(config, balance)


def batches(architecture: str, steps: int) -> list[dict[str, np.ndarray]]:
    """Rows in which every token follows from the one before, in two documents and padding."""
    out = []
    for step in range(steps):
        rng = np.random.default_rng(step)
        ids = np.empty((ROWS, LENGTH + 1), np.int32)
        ids[:, 0] = rng.integers(0, VOCAB, ROWS)
        for t in range(LENGTH):
            ids[:, t + 1] = (5 * ids[:, t] + 7) % VOCAB
        if architecture == "trm":
            cells = np.maximum(ids[:, 1:], 1)
            given = np.where(rng.random((ROWS, LENGTH)) < 0.5, cells, 0).astype(np.int32)
            numbers = np.zeros(ROWS, np.int32)
            out.append({"inputs": given, "labels": cells, "puzzle_ids": numbers})
            continue
        segments = np.where(np.arange(LENGTH) < 6, 1, 2) * np.ones((ROWS, 1), np.int32)
        segments[::3, 11:] = 0
        positions = np.where(np.arange(LENGTH) < 6, np.arange(LENGTH), np.arange(LENGTH) - 6)
        out.append(
            {
                "tokens": ids[:, :-1],
                "targets": ids[:, 1:],
                "segments": segments.astype(np.int32),
                "positions": (positions * np.ones((ROWS, 1))).astype(np.int32),
                "weights": (segments > 0).astype(np.float32),
            }
        )
    return out


def train(architecture: str, name: str, steps: int) -> dict[str, Any]:
    """Losses, gradient norms and collectives of a run."""
    name, _, accumulate = name.partition("/")
    architecture, _, bits = architecture.partition("+")
    task = task_of(architecture, accumulate=bool(accumulate))
    qat = QATConfig(bits or None)
    config = StepConfig(task, OptimizerConfig(), int(accumulate or 1), qat=qat)
    if name == "one":
        mesh = make_mesh(parse_mesh("data1"), jax.devices()[:1])
    else:
        mesh = make_mesh(parse_mesh(name))
    data = batches(architecture, steps)
    # Low enough for rounding not to grow: a token near the border of two experts, or a puzzle near
    # halting, goes the other way, and from then on the runs are two.
    rate = np.float32(1e-3 if architecture == "trm" else 3e-3)
    shapes: BatchShapes = tuple((k, v.shape, v.dtype) for k, v in data[0].items())
    compiled = compile_step(config, mesh, shapes)
    found: dict[str, Any] = {"loss": [], "grad_norm": []}
    with jax.set_mesh(mesh):
        # With seed 0 one token of the MoE stands between two experts, and rounding decides.
        state = compiled.init(np.uint32(1))
        for batch in data:
            state, metrics = compiled.step(state, shard_batch(batch, mesh), rate)
            for series in found:
                found[series].append(float(metrics[series]))
    hlo: str = compiled.step.as_text()  # type: ignore[attr-defined]
    counts = [(c.kind, c.group, c.count) for c in read_collectives(hlo, mesh.size) if c.group > 1]
    return found | {"collectives": sorted(counts)}


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        architecture, _, names = argument.partition(":")
        for name in names.split(","):
            print(f"=== {architecture}:{name}", file=sys.stderr, flush=True)
            print(json.dumps(train(architecture, name, int(sys.argv[1]))), flush=True)
