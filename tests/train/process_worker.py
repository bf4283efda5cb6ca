"""One process of a training run, for `test_processes`, and what may go wrong in it.

python -m tests.train.process_worker SPEC     (JSON of the fields of `Spec`)
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from slm_jax.cli.host import keep_freed_memory
from slm_jax.cli.script import guarded, together
from slm_jax.models.lm import LMConfig
from slm_jax.nn.attention import AttentionConfig
from slm_jax.nn.block import LayerConfig
from slm_jax.parallel import MeshConfig, distributed, local_rows
from slm_jax.train import experiment, trm_experiment
from slm_jax.train.experiment import Experiment
from slm_jax.train.loop import LoopConfig
from tests.train import tiny, tiny_trm

BATCH_SIZE = 16
# All sizes are even: a tensor axis of 2 splits everything.
MODEL = LMConfig(258, 16, 1, (LayerConfig(AttentionConfig(2, 2, 8), tiny.MLP),))


@dataclass(frozen=True)
class Spec:
    """A run of `tiny.experiment` by several processes."""

    text: str
    out: str
    mesh: dict[str, int] = field(default_factory=dict)
    steps: int = 6
    checkpoint_every: int = 2
    fault: str = ""
    """What happens to process `victim` before step 3: "" is nothing."""
    victim: int = 1
    hang_limit: float = 0.0
    puzzles: bool = False
    """It is the run of `tiny_trm`; nothing happens to it."""
    differs: bool = False
    """Process 1 is told another seed."""


def config_of(spec: Spec) -> Experiment:
    """The run that a spec describes."""
    return tiny.experiment(
        "dense",
        tiny.text(Path(spec.text)),
        Path(spec.out),
        model=MODEL,
        steps=spec.steps,
        seed=int(spec.differs and distributed.index() == 1),
        batch_size=BATCH_SIZE,
        mesh=MeshConfig(**{"fsdp": 1, **spec.mesh}),
        loop=LoopConfig(
            checkpoint_every=spec.checkpoint_every, hang_limit=spec.hang_limit, quiet=True
        ),
    )


def run(spec: Spec) -> None:
    """Trains; every row that a process reads goes into a file beside the run folder."""
    print("all is well")
    if spec.puzzles:
        mesh = MeshConfig(**{"fsdp": 1, **spec.mesh})
        trm_experiment.run(tiny_trm.experiment(Path(spec.out), mesh=mesh))
        return
    train = experiment.train

    def watched(program: Any, mesh: Any, batches: Any, **arguments: Any) -> Any:
        rows = local_rows(mesh, BATCH_SIZE)
        return train(program, mesh, Watched(batches, spec, rows), **arguments)

    with mock.patch.object(experiment, "train", watched):
        result = experiment.run(config_of(spec))
    print("held-out loss", result.valid_loss)


class Watched:
    """The batches of a run; says which rows they are, and breaks as the spec tells."""

    def __init__(self, batches: Any, spec: Spec, rows: np.ndarray) -> None:
        self._batches, self._spec, self._rows = batches, spec, rows
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        step = self.get_state()["next_index"]
        if step == 3 and distributed.index() == self._spec.victim:
            match self._spec.fault:
                case "raise":
                    raise RuntimeError("bad record")
                case "kill":
                    while not Path(self._spec.out, "checkpoints/2").exists():
                        time.sleep(0.01)  # it is written in the background
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stall":
                    Path(f"{self._spec.out}.stalled").touch()  # its time is looked at
                    time.sleep(3600)
                case "term":
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(3)  # jax looks for it now and then, and steps are short
                case "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
        batch: dict[str, np.ndarray] = next(self._batches)
        digests = [
            hashlib.sha256(b"".join(batch[k][i].tobytes() for k in sorted(batch))).hexdigest()
            for i in range(len(self._rows))
        ]
        rows = dict(zip(self._rows.tolist(), digests, strict=True))
        with Path(f"{self._spec.out}.rows.{distributed.index()}").open("a") as file:
            file.write(json.dumps([step, rows]) + "\n")
        return batch


if __name__ == "__main__":
    keep_freed_memory()
    spec = Spec(**json.loads(sys.argv[1]))
    sys.exit(guarded(lambda: together(lambda: run(spec))))
