"""What a law of N and D advises: the best model of a budget, and what a loss costs."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize

from slm_jax.errors import UserError
from slm_jax.scaling.laws.base import Law
from slm_jax.scaling.laws.loss import Chinchilla, ChinchillaTied, Gadre

FLOPS_PER_PARAMETER_TOKEN = 6  # 2 forward, 4 backward; generation needs only the forward 2
_LARGEST_COMPUTE = 1e60


@dataclass(frozen=True)
class Optimum:
    """The model of lowest loss for a budget.

    Attributes:
        N: parameters.
        D: training tokens.
        C: FLOPs, 6 N D.
        loss: nats a token.
    """

    N: float
    D: float
    C: float
    loss: float


@dataclass(frozen=True)
class Serving:
    """The cheapest model of a loss when it is to generate tokens as well.

    Attributes:
        N: parameters.
        D: training tokens.
        training: FLOPs, 6 N D.
        inference: FLOPs, 2 N a generated token.
        ratio: training + inference over those of the compute-optimal model of the same loss.
    """

    N: float
    D: float
    training: float
    inference: float
    ratio: float


def as_chinchilla(law: Law) -> Chinchilla | None:
    """The same law as a `Chinchilla`, where it is one (C = 6 N D); else None."""
    if isinstance(law, Chinchilla):
        return law
    if isinstance(law, ChinchillaTied):
        return Chinchilla(law.E, law.A, law.B, law.alpha, law.alpha)
    if isinstance(law, Gadre):
        scale = FLOPS_PER_PARAMETER_TOKEN**-law.eta
        return Chinchilla(law.E, law.a * scale, law.b * scale, 2 * law.eta, 2 * law.eta)
    return None


def loss_of(law: Law, N: float, D: float) -> float:
    """The law's loss, nats a token, of N parameters and D training tokens; C = 6 N D, M = D / N.

    Raises:
        UserError: if the law needs more than these.
    """
    have = {"N": N, "D": D, "C": FLOPS_PER_PARAMETER_TOKEN * N * D, "M": D / N}
    missing = [name for name in law.inputs if name not in have]
    if missing:
        raise UserError(
            f"law={type(law).__name__} needs {', '.join(missing)} besides N and D: use a law of N "
            "and D only"
        )
    return float(law(**{name: have[name] for name in law.inputs}))


def exponents(law: Law) -> tuple[float, float]:
    """Exponents a = beta / (alpha + beta) of N* ~ C^a and b = 1 - a of D* ~ C^b.

    Raises:
        UserError: for another law, whose optimum is no power law.
    """
    form = _chinchilla(law)
    total = form.alpha + form.beta
    return form.beta / total, form.alpha / total


def compute_optimal(law: Law, C: float) -> Optimum:
    """The split of C FLOPs into parameters and tokens with the lowest loss.

    Closed form for Chinchilla's form (Hoffmann et al. 2022, equation 4), numeric otherwise.

    Args:
        law: of N and D.
        C: FLOPs, 6 N D.

    Raises:
        UserError: if C is not positive, or the loss has no minimum between one parameter and one
            token.
    """
    if not (np.isfinite(C) and C > 0):
        raise UserError(f"C={C} must be positive and finite FLOPs")
    product = C / FLOPS_PER_PARAMETER_TOKEN
    form = as_chinchilla(law)
    if form is not None:
        a, b = exponents(form)
        g = _balance(form)
        n, d = g * product**a, product**b / g
        return Optimum(n, d, C, float(form(N=n, D=d)))
    log_n = _minimum(
        lambda x: loss_of(law, math.exp(x), product / math.exp(x)),
        0.0,
        math.log(product),
        f"C={C:g}",
    )
    n = math.exp(log_n)
    return Optimum(n, product / n, C, loss_of(law, n, product / n))


def near_optimal(law: Law, C: float, share: float = 0.005) -> tuple[float, float]:
    """The sizes N at a budget whose loss is within `share` of the lowest: the optimum is flat.

    Args:
        law: of N and D.
        C: FLOPs.
        share: of the lowest loss.

    Returns:
        Smallest and largest N.
    """
    best = compute_optimal(law, C)
    product = C / FLOPS_PER_PARAMETER_TOKEN

    def above(x: float) -> float:
        return loss_of(law, math.exp(x), product / math.exp(x)) - (1 + share) * best.loss

    centre, ends = math.log(best.N), []
    for end in (math.log(1e-3), math.log(product * 1e3)):
        if above(end) < 0:
            raise UserError(f"share={share}: every size is this near the optimum: choose less")
        ends.append(math.exp(scipy.optimize.brentq(above, centre, end)))
    return ends[0], ends[1]


def loss_to_compute(law: Law, loss: float) -> float:
    """FLOPs of the cheapest model that reaches a loss: the inverse of `compute_optimal`'s loss.

    Raises:
        UserError: if the loss is not above the irreducible one: it is unreachable.
    """
    _positive_loss(loss)
    form = as_chinchilla(law)
    if form is not None:
        _reachable(form, loss)
        reducible = compute_optimal(form, 1.0).loss - form.E
        power = (form.alpha + form.beta) / (form.alpha * form.beta)
        return float(np.exp(power * (math.log(reducible) - math.log(loss - form.E))))

    def above(log_c: float) -> float:
        return compute_optimal(law, math.exp(log_c)).loss - loss

    low = high = math.log(1e18)
    while above(high) > 0:
        high += math.log(10)
        if high > math.log(_LARGEST_COMPUTE):
            raise UserError(
                f"loss={loss:g} is unreachable: {type(law).__name__} stays above it up to "
                f"{_LARGEST_COMPUTE:g} FLOPs; choose a higher loss"
            )
    while above(low) < 0:
        low -= math.log(10)
    return math.exp(scipy.optimize.brentq(above, low, high, xtol=1e-12))


def tokens_to_loss(law: Law, N: float, loss: float) -> float:
    """Training tokens with which N parameters reach a loss.

    Raises:
        UserError: if no number does: it is unreachable at this size.
    """
    form = _chinchilla(law)
    _positive_loss(loss)
    _reachable(form, loss)
    left = loss - form.E - form.A * N**-form.alpha
    if left <= 0:
        smallest = (form.A / (loss - form.E)) ** (1 / form.alpha)
        raise UserError(
            f"loss={loss:g} is unreachable with N={N:g}: it takes more than {smallest:.4g} "
            "parameters"
        )
    return (form.B / left) ** (1 / form.beta)


def inference_aware(law: Law, loss: float, inference_tokens: float) -> Serving:
    """The model of a loss that is cheapest to train and then to run.

    Minimises 6 N D + 2 N T over N and D with L(N, D) = loss (Sardana et al. 2024,
    arXiv 2401.00448, equation 1).

    Args:
        law: of Chinchilla's form.
        loss: nats a token that the model must reach.
        inference_tokens: T, tokens it will read and write in its life; 0 gives the
            compute-optimal model.

    Raises:
        UserError: if the loss is unreachable or the tokens negative.
    """
    if not (np.isfinite(inference_tokens) and inference_tokens >= 0):
        raise UserError(f"inference_tokens={inference_tokens} must be finite and at least 0")
    form = _chinchilla(law)
    best = compute_optimal(form, loss_to_compute(form, loss))
    smallest = (form.A / (loss - form.E)) ** (1 / form.alpha)

    def log_cost(log_n: float) -> float:
        n = math.exp(log_n)
        return math.log(n) + math.log(6 * tokens_to_loss(form, n, loss) + 2 * inference_tokens)

    # More tokens to serve never favour a larger model than the compute-optimal one.
    low, high = math.log(smallest) + 1e-9, math.log(best.N) + 1e-6
    log_n = _minimum(log_cost, low, high + 0.1, f"inference_tokens={inference_tokens:g}")
    n = math.exp(log_n)
    d = tokens_to_loss(form, n, loss)
    training, inference = FLOPS_PER_PARAMETER_TOKEN * n * d, 2 * n * inference_tokens
    ratio = (training + inference) / (best.C + 2 * best.N * inference_tokens)
    return Serving(n, d, training, inference, ratio)


def deadweight_compute(law: Law, N: float, D: float) -> float:
    """FLOPs that a model wastes by its shape: 6 N D less what its loss costs at the optimum."""
    return FLOPS_PER_PARAMETER_TOKEN * N * D - loss_to_compute(law, loss_of(law, N, D))


def _chinchilla(law: Law) -> Chinchilla:
    form = as_chinchilla(law)
    if form is None:
        raise UserError(
            f"law={type(law).__name__} is not of Chinchilla's form: use Chinchilla, "
            "ChinchillaTied or Gadre"
        )
    return form


def _balance(law: Chinchilla) -> float:
    for name in ("A", "B", "alpha", "beta"):
        if not getattr(law, name) > 0:
            raise UserError(
                f"{name}={getattr(law, name):g} leaves the law without an optimum: it must be > 0"
            )
    return (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))


def _positive_loss(loss: float) -> None:
    if not (np.isfinite(loss) and loss > 0):
        raise UserError(f"loss={loss} must be positive and finite")


def _reachable(law: Chinchilla, loss: float) -> None:
    if loss <= law.E:
        raise UserError(
            f"loss={loss:g} is unreachable: the irreducible loss of the law is E={law.E:.6g}; "
            "choose a higher loss"
        )


def _minimum(function: Callable[[float], float], low: float, high: float, what: str) -> float:
    grid = np.linspace(low, high, 400)
    values = np.array([function(x) for x in grid])
    i = int(np.argmin(values))
    if i in (0, len(grid) - 1):
        raise UserError(f"{what}: the optimum is at the edge of what a model can be: no minimum")
    found = scipy.optimize.minimize_scalar(
        function, bounds=(grid[i - 1], grid[i + 1]), method="bounded", options={"xatol": 1e-10}
    )
    return float(found.x)
