"""TRM and its training step again, in float64 NumPy: an oracle that shares no code with the model.

Written from a description of the authors' code (TinyRecursiveModels, commit e7b6871), where it
differs from arXiv 2510.04871. Weights are a dictionary by the names of `named_leaves`.
"""

from typing import Any, NamedTuple

import numpy as np

from slm_jax.models.trm import TRMConfig
from slm_jax.train.tasks.trm import TRMLossConfig

Weights = dict[str, np.ndarray]


def norm(h: np.ndarray) -> np.ndarray:
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)


def sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


def swiglu(w: Weights, at: str, h: np.ndarray) -> np.ndarray:
    gate = h @ w[f"{at}.gate.w"]
    return (gate * sigmoid(gate) * (h @ w[f"{at}.up.w"])) @ w[f"{at}.down.w"]


def rotate(h: np.ndarray) -> np.ndarray:
    """Coordinates i and i + d/2 of each head turn by position x 10000^(-2i/d)."""
    half = h.shape[-1] // 2
    angle = np.arange(h.shape[1])[:, None] * 10_000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = h[..., :half], h[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(w: Weights, at: str, h: np.ndarray) -> np.ndarray:
    q, k, v = (np.einsum("bsd,dhe->bshe", h, w[f"{at}.{name}.w"]) for name in "qkv")
    scores = np.einsum("bshe,bthe->bhst", rotate(q), rotate(k)) / np.sqrt(q.shape[-1])
    p = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhst,bthe->bshe", p / p.sum(-1, keepdims=True), v)
    return np.einsum("bshe,hed->bsd", mixed, w[f"{at}.out.w"])


def network(w: Weights, name: str, config: TRMConfig, h: np.ndarray) -> np.ndarray:
    for i in range(config.n_layers):
        at = f"{name}.{i}"
        if config.mixer == "attention":
            h = norm(h + attention(w, f"{at}.mixer", h))
        else:
            t = h.transpose(0, 2, 1)
            h = norm(t + swiglu(w, f"{at}.mixer", t)).transpose(0, 2, 1)
        h = norm(h + swiglu(w, f"{at}.channel", h))
    return h


class State(NamedTuple):
    """The carry; y is `None` with one latent."""

    y: np.ndarray | None
    z: np.ndarray
    steps: np.ndarray
    halted: np.ndarray
    data: dict[str, np.ndarray]


class Outcome(NamedTuple):
    """One supervision step: the sum that is differentiated, what is logged, the new carry.

    `loss_of(weights)` is that sum as a function of the weights whose gradient is asked for: all
    that the gradient does not pass through stays at its value.
    """

    total: float
    logged: dict[str, float]
    state: State
    loss_of: Any


def supervision_step(
    w: Weights, config: TRMConfig, loss: TRMLossConfig, state: State, batch: dict[str, np.ndarray]
) -> Outcome:
    """One supervision step without exploration."""
    fresh = state.halted
    data = {k: np.where(fresh.reshape(-1, *[1] * (v.ndim - 1)), batch[k], v)
            for k, v in state.data.items()}  # fmt: skip
    steps = np.where(fresh, 0, state.steps)
    y = None if state.y is None else np.where(fresh[:, None, None], w["y_init"], state.y)
    z = np.where(fresh[:, None, None], w["z_init"], state.z)
    z_name = "z_blocks" if config.separate_networks else "y_blocks"

    def inputs(w: Weights) -> np.ndarray:
        x = w["embed.w"][data["inputs"]]
        prefix = np.zeros((len(x), config.n_prefix, config.d_model))
        prefix[:, 0] = w["puzzles"][data["puzzle_ids"]]
        return np.sqrt(config.d_model) * np.concatenate([prefix, x], 1)

    def update_z(w: Weights, y: Any, z: np.ndarray, times: int) -> np.ndarray:
        x = inputs(w)
        for _ in range(times):
            z = network(w, z_name, config, z + x if y is None else z + (y + x))
        return z

    def cycle(w: Weights, y: Any, z: np.ndarray, times: int) -> tuple[Any, np.ndarray]:
        if y is None:
            return None, update_z(w, None, z, times + 1)
        z = update_z(w, y, z, times)
        return network(w, "y_blocks", config, y + z), z

    def heads(w: Weights, y: Any, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        answer = z if y is None else y
        q = answer[:, 0] @ w["halt.w"] + w["halt.b"]
        return answer[:, config.n_prefix :] @ w["head.w"], q

    n = config.n_latent_steps
    for _ in range(config.n_cycles - 1):
        y, z = cycle(w, y, z, n)
    if config.gradient == "last":
        kept = 0 if y is None else 1
        z, n = update_z(w, y, z, n - kept), kept
    y0, z0 = y, z

    y, z = cycle(w, y0, z0, n)
    logits, q = heads(w, y, z)
    labels = data["labels"]
    scored = labels > 0
    right = logits.argmax(-1) == labels
    exact = (right | ~scored).all(-1)
    last = steps + 1 >= loss.n_supervision
    target = np.zeros(len(z))
    if loss.continue_loss:
        y1, z1 = y, z
        for _ in range(config.n_cycles):
            y1, z1 = cycle(w, y1, z1, config.n_latent_steps)
        ahead = heads(w, y1, z1)[1]
        target = sigmoid(np.where(last, ahead[:, 0], ahead.max(-1)))

    def terms(w: Weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        logits, q = heads(w, *cycle(w, y0, z0, n))
        score = np.where(logits >= 0, logits + 1, 1 / (1 - np.minimum(logits, 0)))
        p = np.take_along_axis(score, labels[..., None], -1)[..., 0] / score.sum(-1)
        cells = (-np.log(p) * scored).sum(-1) / np.maximum(scored.sum(-1), 1)

        def binary(v: np.ndarray, t: np.ndarray) -> np.ndarray:
            return -t * np.log(sigmoid(v)) - (1 - t) * np.log(sigmoid(-v))

        further = binary(q[:, 1], target) if loss.continue_loss else np.zeros(len(q))
        return cells, binary(q[:, 0], exact.astype(float)), further

    def loss_of(w: Weights) -> float:
        cells, halt, further = terms(w)
        return float(cells.sum() + loss.halt_weight * (halt + further).sum())

    cells, halt, _ = terms(w)
    stop = q[:, 0] > q[:, 1] if loss.continue_loss else q[:, 0] > 0
    halted = last | stop
    logged = {
        "cross_entropy": cells.mean(),
        "halt_loss": halt.mean(),
        "exact_accuracy": exact.mean(),
        "halt_accuracy": ((q[:, 0] >= 0) == exact).mean(),
        "halted": halted.mean(),
        "halted_steps": (halted * (steps + 1)).mean(),
    }
    return Outcome(loss_of(w), logged, State(y, z, steps + 1, halted, data), loss_of)


class Optimizer:
    """Adam-atan2 for the weights, sign-SGD for the rows of the puzzle table that were read."""

    def __init__(self, w: Weights, b1: float, b2: float, decay: float, table_decay: float) -> None:
        self.b1, self.b2, self.decay, self.table_decay, self.t = b1, b2, decay, table_decay, 0
        self.m = {k: np.zeros_like(v) for k, v in w.items()}
        self.v = {k: np.zeros_like(v) for k, v in w.items()}

    def step(self, w: Weights, g: Weights, rate: float, table_rate: float, ids: Any) -> Weights:
        self.t += 1
        new = dict(w)
        for k in w.keys() - {"y_init", "z_init", "puzzles"}:
            self.m[k] = self.b1 * self.m[k] + (1 - self.b1) * g[k]
            self.v[k] = self.b2 * self.v[k] + (1 - self.b2) * g[k] ** 2
            root = np.sqrt(self.v[k]) / np.sqrt(1 - self.b2**self.t)
            new[k] = w[k] * (1 - rate * self.decay)
            new[k] -= rate / (1 - self.b1**self.t) * np.arctan2(self.m[k], root)
        new["puzzles"] = w["puzzles"].copy()
        for i in set(ids.tolist()):
            new["puzzles"][i] *= 1 - table_rate * self.table_decay
            new["puzzles"][i] -= table_rate * np.sign(g["puzzles"][i])
        return new
