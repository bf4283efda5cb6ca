"""Models, text and experiments that compile in seconds and take milliseconds a step."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.data import DataConfig
from slm_jax.models.lm import LMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.moe import MoEConfig
from slm_jax.nn.ssm import MambaConfig
from slm_jax.parallel import MeshConfig
from slm_jax.train.experiment import Experiment
from slm_jax.train.loop import LoopConfig
from slm_jax.train.optimizer import ScheduleConfig

ATTENTION = AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8)
MLP = MLPConfig(d_ff=32)
MAMBA = MambaConfig(d_inner=32, d_state=4)
MOE = MoEConfig(n_experts=4, d_ff=16, selection_bias=True)
LAYERS = {
    "dense": (LayerConfig(ATTENTION, MLP),),
    "moe": (LayerConfig(ATTENTION, MOE),),
    "mamba": (LayerConfig(MAMBA, None),),
    "hybrid": (LayerConfig(MAMBA, MLP), LayerConfig(ATTENTION, MOE)),
}


def model(kind: str, **changes: Any) -> LMConfig:
    """Two layers over bytes, of width 16."""
    return LMConfig(257, 16, 2, LAYERS[kind], **changes)


def write_text(folder: Path) -> DataConfig:
    """Writes two sources of short documents; returns `text(folder)`."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, letters in (("vowels", "aeiou "), ("digits", "0123456789")):
        documents = ["".join(rng.choice(list(letters), rng.integers(5, 60))) for _ in range(60)]
        lines = "".join(json.dumps({"text": d}) + "\n" for d in documents)
        (folder / f"{name}.jsonl").write_text(lines)
    return text(folder)


def text(folder: Path) -> DataConfig:
    """The mixture of the two sources in the folder, about 2000 bytes each."""
    return DataConfig(
        mixture=((str(folder / "vowels.jsonl"), 0.7), (str(folder / "digits.jsonl"), 0.3)),
        cache_dir=str(folder / "cache"),
    )


def experiment(kind: str, data: DataConfig, out: Path, **changes: Any) -> Experiment:
    """Six steps on all devices, a checkpoint every second."""
    return Experiment(
        **{
            "model": model(kind),
            "data": data,
            "schedule": ScheduleConfig(learning_rate=0.01, warmup_steps=2),
            "steps": 6,
            "batch_size": 16,
            "seq_len": 16,
            "ema_decay": 0.9,
            "eval_tokens": 300,
            "mesh": MeshConfig(fsdp=8),
            "loop": LoopConfig(checkpoint_every=2, quiet=True),
            "out": out,
            **changes,
        }
    )
