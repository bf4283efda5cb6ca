"""Trains the rungs of a ladder (plan.py) and gathers what they measured into rows.csv.

All rungs go through `experiment.run`: a ladder that was killed goes on where it stopped, one that
is finished is only read.

    ladder = Ladder("dense", budgets=(5e10, 1e11, 2e11), learning_rate=0.03)
    rows = run_ladder(ladder)
"""

import csv
import fcntl
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from slm_jax.data import Corpus, open_data
from slm_jax.errors import UserError
from slm_jax.parallel import distributed
from slm_jax.train.experiment import Experiment, find_result, run
from slm_jax.train.loop import DivergedError
from slm_jax.train.metrics import bits_per_byte, read_metrics
from slm_jax.train.optimizer import ScheduleConfig
from slm_jax.train.plan import Ladder, Rung, part_of, plan

ROWS_FILE = "rows.csv"


@dataclass(frozen=True)
class Row:
    """One measurement: a size at a budget. The columns of rows.csv.

    Attributes:
        run: name of the run: rows of one run are not independent.
        family: architecture.
        N: parameters in all, a tied embedding once.
        N_non_embedding: without embedding and head.
        N_active: parameters a token meets.
        flops_per_token: of training.
        D: training tokens.
        C: training FLOPs spent, D x flops_per_token.
        loss: held-out nats a token of the averaged weights.
        loss_raw: of the weights as they are.
        bits_per_byte: `loss` in bits a byte of text.
        learning_rate: peak.
        batch_tokens: tokens a step.
        seed: of the run.
        width: of the residual stream.
        layers: of the model.
    """

    run: str
    family: str
    N: int
    N_non_embedding: int
    N_active: int
    flops_per_token: float
    D: int
    C: float
    loss: float
    loss_raw: float
    bits_per_byte: float
    learning_rate: float
    batch_tokens: int
    seed: int
    width: int
    layers: int


def run_ladder(
    ladder: Ladder,
    corpus: Corpus | None = None,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Trains the rungs of `ladder.part`, or reads them, and writes rows.csv.

    A rung that diverges is reported, the budgets it came to before stay; the others go on.

    Args:
        ladder: what to run.
        corpus: the opened data of `ladder.data`, to share it.
        report: gets one line a rung.

    Returns:
        All rows of the ladder that exist, those of other processes included.

    Raises:
        UserError: as `plan` and `experiment.run`; or if every rung of this part diverged.
    """
    corpus = corpus or open_data(ladder.data)
    rungs = plan(ladder, corpus.tokenizer.vocab_size)
    i, n = part_of(ladder.part)
    mine = rungs[i - 1 :: n]
    failed = 0
    for rung in mine:
        try:
            rows = run_rung(ladder, rung, corpus)
        except DivergedError as error:
            failed += 1
            report(f"{rung.name}: {error}")
            continue
        losses = "  ".join(f"{row.C:.2g}: {row.loss:.3f}" for row in rows)
        report(f"{rung.name}  N {rung.size.total:,}  lr {rung.learning_rate:.3g}  {losses}")
    if mine and failed == len(mine):
        raise DivergedError(f"learning_rate={ladder.learning_rate}: every rung diverged: lower it")
    return _on_first(ROWS_FILE, lambda: write_rows(ladder, rungs, corpus))


def _on_first(name: str, rows: Callable[[], list[Row]]) -> list[Row]:
    """Rows that process 0 has read, for all processes of the job."""
    found = distributed.on_first(name, lambda: [asdict(row) for row in rows()])
    return [Row(**row) for row in found]


def run_rung(ladder: Ladder, rung: Rung, corpus: Corpus) -> list[Row]:
    """Trains one rung to its largest budget, or goes on with it, or reads it.

    Raises:
        UserError: as `experiment.run`; or if the run was finished for other budgets.
    """
    config = experiment(ladder, rung)
    run(config, corpus)
    rows = _on_first(rung.name, lambda: read_rung(ladder, rung, corpus))
    if len(rows) < len(rung.budgets):
        raise UserError(
            f"out={config.out} was trained for other budgets and has no evaluation after "
            f"{rung.steps} steps: choose another --out, or --overwrite to train it again"
        )
    return rows


def experiment(ladder: Ladder, rung: Rung) -> Experiment:
    """The training run of a rung."""
    return Experiment(
        model=rung.model,
        data=ladder.data,
        optimizer=ladder.optimizer,
        schedule=ScheduleConfig(rung.learning_rate, "constant", rung.warmup_steps),
        steps=rung.steps[-1],
        batch_size=rung.batch_size,
        seq_len=rung.seq_len,
        tail_average=ladder.tail_average,
        eval_tokens=ladder.eval_tokens,
        seed=ladder.seed,
        mesh=ladder.mesh,
        loop=replace(ladder.loop, eval_steps=rung.steps),
        out=ladder.out / rung.name,
        overwrite=ladder.overwrite,
    )


def read_rung(ladder: Ladder, rung: Rung, corpus: Corpus) -> list[Row]:
    """The rows that a rung has so far, one a budget that its run has come to.

    Raises:
        UserError: if its folder holds another run.
    """
    find_result(replace(experiment(ladder, rung), overwrite=False), corpus)
    by_step = {r["step"] + 1: r for r in read_metrics(ladder.out / rung.name) if "valid_loss" in r}
    size = rung.size
    return [
        Row(
            run=rung.name,
            family=ladder.family,
            N=size.total,
            N_non_embedding=size.non_embedding,
            N_active=size.active,
            flops_per_token=rung.flops_per_token,
            D=tokens,
            C=tokens * rung.flops_per_token,
            loss=by_step[steps]["valid_loss_ema"],
            loss_raw=by_step[steps]["valid_loss"],
            bits_per_byte=bits_per_byte(by_step[steps]["valid_loss_ema"], corpus.bytes_per_token),
            learning_rate=rung.learning_rate,
            batch_tokens=rung.batch_tokens,
            seed=ladder.seed,
            width=rung.model.d_model,
            layers=rung.model.n_layers,
        )
        for steps, tokens in zip(rung.steps, rung.tokens, strict=True)
        if steps in by_step
    ]


def write_rows(ladder: Ladder, rungs: list[Rung], corpus: Corpus) -> list[Row]:
    """Gathers the rows of all rungs into rows.csv, written whole or not at all."""
    ladder.out.mkdir(parents=True, exist_ok=True)
    with (ladder.out / ".lock").open("a") as lock:  # reading and writing of one process at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [row for rung in rungs for row in read_rung(ladder, rung, corpus)]
        save_rows(ladder.out / ROWS_FILE, rows)
    return rows


def save_rows(path: Path, rows: list[Row]) -> None:
    """Writes rows as CSV, floats with all their bits; of several processes only process 0 does."""
    if not distributed.is_first():
        return
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    os.replace(temporary, path)
