"""The tables of public runs in experiments/data, as `Rows`; where each is from is in its README."""

import csv
import gzip
import io
from pathlib import Path

import numpy as np

from slm_jax.errors import UserError
from slm_jax.scaling.laws.loss_curve import LossCurve
from slm_jax.scaling.rows import Rows, read_csv

DATA = Path(__file__).parent / "data"


def chinchilla(*, drop_highest: int = 5, largest_C: float = np.inf) -> Rows:
    """Points of figure 4 of arXiv 2203.15556: N, C, D = C / 6 N, loss.

    Args:
        drop_highest: how many of the highest losses are left out, as Besiroglu et al. did.
        largest_C: FLOPs below which points are kept.
    """
    rows = read_csv(DATA / "chinchilla_figure4.csv.gz")
    limit = np.sort(rows["loss"])[len(rows) - drop_highest] if drop_highest else np.inf
    rows = rows.keep(rows["loss"] < limit, f"among the {drop_highest} highest losses")
    return rows.keep(rows["C"] < largest_C, f"C >= {largest_C:g} FLOPs")


def datablations() -> Rows:
    """Runs on C4 with repeated tokens (arXiv 2305.16264): N, D, U unique tokens, loss."""
    return read_csv(DATA / "datablations_c4.csv.gz", {"U": "U"})


def gadre(corpus: str) -> Rows:
    """Runs of arXiv 2403.08540 on one corpus: N, D, C, M = D / N, multiplier, loss, error.

    Args:
        corpus: `c4_original`, `rpj` or `rw_original`.
    """
    rows = read_csv(
        DATA / "gadre_overtraining.csv.gz", {"multiplier": "multiplier", "error": "error"}
    )
    rows = rows.take(rows["corpus"] == corpus)
    return rows.with_columns(M=rows["D"] / rows["N"])


def olmo_ladder() -> Rows:
    """Checkpoints of 16 runs (arXiv 2412.04403), in order: N, D, losses and accuracies of tasks."""
    path = DATA / "olmo_ladder.csv.gz"
    with gzip.open(path, "rt") as file:
        names = next(csv.reader(file))
    return read_csv(path, {n: n for n in names if n not in ("run", "N", "D")} | {"loss": "c4_loss"})


def routing(router: str, path: Path | None = None) -> Rows:
    """Last losses of models of one router and of the dense models (arXiv 2202.01169).

    Args:
        router: `S-Base`, `RL-R` or `Hash`.
        path: the authors' whole curves.csv.gz; default the table that ships, up to 370 M.

    Returns:
        N parameters of the dense model, experts, loss after 250,000 steps.
    """
    if path is None:
        records = _records(DATA / "routing.csv.gz")
    else:
        records = _last_routing(_records(path), path)
    kept = [r for r in records if r["router"] in (router, "Dense")]
    if not any(r["router"] == router for r in kept):
        names = sorted({r["router"] for r in records})
        raise UserError(f"router={router!r} is not in the table: it has {', '.join(names)}")
    return Rows(
        {k: np.array([float(r[k]) for r in kept]) for k in ("N", "experts", "loss")},
        {"router": np.array([r["router"] for r in kept])},
    )


def _last_routing(records: list[dict[str, str]], path: Path) -> list[dict[str, str]]:
    """The authors' selection: last step, routing in every other layer, one expert, seed 42."""
    need = (
        "hyper_id",
        "step",
        "routing_frequency",
        "k",
        "seed",
        "router_type",
        "dense_parameter_count",
        "num_experts",
        "loss_validation",
    )
    missing = [name for name in need if name not in records[0]]
    if missing:
        raise UserError(
            f"path={str(path)!r} has no column {', '.join(missing)}: pass data/curves.csv.gz of "
            "google-deepmind/scaling_laws_for_routing"
        )
    last: dict[str, dict[str, str]] = {}
    for r in records:
        if r["hyper_id"] not in last or int(r["step"]) > int(last[r["hyper_id"]]["step"]):
            last[r["hyper_id"]] = r
    return [
        {
            "router": r["router_type"],
            "N": r["dense_parameter_count"],
            "experts": r["num_experts"],
            "loss": r["loss_validation"],
        }
        for r in last.values()
        if (float(r["routing_frequency"]), int(r["k"]), int(r["seed"])) == (0.5, 1, 42)
    ]


_WARMUP, _PEAK, _END = 2160, 3e-4, 3e-5  # of all schedules of arXiv 2503.12811
SCHEDULES = (
    "constant_24000",
    "cosine_24000",
    "constant_72000",
    "cosine_72000",
    "wsd_20000_24000",
    "wsdld_20000_24000",
)


def learning_rates(schedule: str) -> np.ndarray:
    """The learning rate of every step of a schedule of arXiv 2503.12811, warm-up included.

    `wsd` decays exponentially from step 20,000, `wsdld` linearly.
    """
    kind, *_, last = schedule.split("_")
    steps = int(last)
    t = np.arange(_WARMUP, steps)
    decay = np.clip((t - 20_000) / (steps - 20_000), 0, 1)
    after = {
        "constant": np.full(len(t), _PEAK),
        "cosine": _END
        + (_PEAK - _END) * (1 + np.cos(np.pi * (t - _WARMUP) / (steps - _WARMUP))) / 2,
        "wsd": _PEAK * (_END / _PEAK) ** decay,
        "wsdld": _PEAK + (_END - _PEAK) * decay,
    }[kind]
    return np.concatenate([np.linspace(0, _PEAK, _WARMUP), after])


def loss_curves(size: str) -> dict[str, LossCurve]:
    """The loss along six schedules (arXiv 2503.12811), by schedule.

    Args:
        size: `25` or `100`, millions of parameters.
    """
    records = [r for r in _records(DATA / "multi_power_law.csv.gz") if r["size"] == size]
    return {
        name: LossCurve(
            learning_rates(name),
            np.array([int(r["step"]) for r in records if r["schedule"] == name]),
            np.array([float(r["loss"]) for r in records if r["schedule"] == name]),
        )
        for name in SCHEDULES
    }


def _records(path: Path) -> list[dict[str, str]]:
    if not Path(path).is_file():
        raise UserError(f"path={str(path)!r} is not a file: check the path")
    data = Path(path).read_bytes()
    try:
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        records = list(csv.DictReader(io.StringIO(text.decode())))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"path={str(path)!r} is not a CSV table ({error})") from error
    if not records:
        raise UserError(f"path={str(path)!r} has no rows below its heading")
    return records
