"""Where the numbers of a run go: JSON lines and TensorBoard always, Weights & Biases if asked."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.errors import UserError
from slm_jax.parallel import distributed

METRICS_FILE = "metrics.jsonl"


class MetricLog:
    """Writes one record a step to every sink; of several processes only process 0 does."""

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        evaluated: bool = True,
        wandb: bool = False,
        name: str = "",
    ) -> None:
        """Opens the sinks.

        Args:
            folder: run folder.
            first_step: records of this step and later, left by a run that was killed, are dropped.
            evaluated: whether the evaluation after the step before stands; if it is to be made
                again, what an interrupted run has written of it is dropped.
            wandb: also log to Weights & Biases, which must be installed.
            name: name of the run there.

        Raises:
            UserError: if `wandb` is asked for and not installed.
        """
        self._writes = distributed.is_first()
        if not self._writes:
            return
        # Late: only a run that writes pays for the import.
        from tensorboardX import SummaryWriter

        self._wandb: Any = None
        if wandb:
            try:
                import wandb as library
            except ImportError as error:
                raise UserError("wandb=True: the package is missing: pip install wandb") from error
            self._wandb = library.init(
                project="slm_jax", name=name, dir=str(folder), resume="allow"
            )
        path = folder / METRICS_FILE
        # Always written anew: a line torn by a kill must not be appended to.
        kept = [r for r in read_metrics(folder) if r["step"] < first_step]
        if not evaluated:
            kept = [r for r in kept if r["step"] < first_step - 1 or "loss" in r]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        os.replace(temporary, path)
        self._lines = path.open("a", buffering=1)
        logging.getLogger("tensorboardX").setLevel(logging.ERROR)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends `{"step": step, **values}`; arrays become lists, floats keep all their bits."""
        if not self._writes:
            return
        record = {"step": step, **{k: _plain(v) for k, v in values.items()}}
        self._lines.write(json.dumps(record) + "\n")
        scalars = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        for k, v in scalars.items():
            self._board.add_scalar(k, v, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Flushes and closes every sink."""
        if not self._writes:
            return
        self._lines.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line torn by a kill is left out."""
    path = folder / METRICS_FILE
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Loss in bits a byte of text: comparable between tokenizers."""
    return nats_per_token / bytes_per_token / math.log(2)
