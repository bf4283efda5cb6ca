"""One training run as a process of its own, for `test_resume` to kill.

python -m tests.train.crash_worker KIND TEXT_FOLDER RUN_FOLDER
"""

import sys
from pathlib import Path

from slm_jax.parallel import MeshConfig
from slm_jax.train.experiment import Experiment, run
from slm_jax.train.loop import LoopConfig
from tests.train import tiny

STEPS = 60


def crash_experiment(kind: str, text: Path, out: Path) -> Experiment:
    """Several epochs of a mixture, two microbatches, an average, evaluations, checkpoints."""
    return tiny.experiment(
        kind,
        tiny.text(text),
        out,
        steps=STEPS,
        accumulate=2,
        mesh=MeshConfig(data=1, fsdp=-1),
        loop=LoopConfig(checkpoint_every=7, eval_every=20, quiet=True),
    )


if __name__ == "__main__":
    run(crash_experiment(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
