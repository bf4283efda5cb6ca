"""Learning-rate and batch rules by name: what a size and a run length ask for.

Published rules were measured on web text at 10 M parameters and more with AdamW; at toy size they
are extrapolations, and a sweep comes first.
"""

from collections.abc import Callable
from dataclasses import dataclass

from slm_jax.errors import UserError
from slm_jax.scaling.laws.training import TRAINING_RULES


@dataclass(frozen=True)
class Run:
    """What a rule may depend on.

    Attributes:
        width: of the residual stream.
        parameters: in all, a tied embedding (which is also the head) once.
        non_embedding: without embedding and head.
        tokens: of the longest training run at this size.
        flops: of that run.
    """

    width: int
    parameters: int
    non_embedding: int
    tokens: float
    flops: float


# Rules with a base scale it; the published ones (`slm_jax.scaling.laws.training`) are complete.
_SCALED_RATES: dict[str, Callable[[float, Run], float]] = {
    # The same at every size.
    "constant": lambda base, run: base,
    # As 1 / sqrt(width) above a width of 64, flat below.
    "width": lambda base, run: base * min(1.0, (64 / run.width) ** 0.5),
    # As 1 / width, through the base at 64: what muP (arXiv 2203.03466) has for hidden matrices
    # under Adam, here for all weights. The best of three at widths 12 to 48 (isoflop_cpu.py).
    "inverse_width": lambda base, run: base * 64 / run.width,
}
LEARNING_RATE_RULES = (*_SCALED_RATES, *TRAINING_RULES)
BATCH_RULES = ("constant", *TRAINING_RULES)


def learning_rate(rule: str, base: float | None, run: Run) -> float:
    """The peak learning rate that a rule gives.

    Args:
        rule: a name in `LEARNING_RATE_RULES`.
        base: learning rate at a width of 64, for "constant", "width" and "inverse_width"; `None`
            for the others.
        run: size and length.

    Raises:
        UserError: on an unknown rule, a base that is missing, or one that the rule does not use.
    """
    _check("learning_rate", rule, base, LEARNING_RATE_RULES, tuple(_SCALED_RATES))
    if base is None:
        return float(TRAINING_RULES[rule].learning_rate.predict(_columns(rule, run)))
    return _SCALED_RATES[rule](base, run)


def batch_tokens(rule: str, base: int | None, run: Run) -> float:
    """Tokens a step that a rule gives, before rounding to whole rows.

    Args:
        rule: a name in `BATCH_RULES`.
        base: tokens a step, for "constant"; `None` for the others.
        run: size and length.

    Raises:
        UserError: as in `learning_rate`.
    """
    _check("batch_tokens", rule, base, BATCH_RULES, ("constant",))
    if base is None:
        return float(TRAINING_RULES[rule].batch.predict(_columns(rule, run)))
    return float(base)


def _columns(rule: str, run: Run) -> dict[str, float]:
    """N, D and C as the rule's paper counts them."""
    # Porian et al. count the head, which a tied embedding is; Step Law leaves both out.
    n = run.non_embedding if rule == "step_law" else run.parameters
    return {"N": n, "D": run.tokens, "C": run.flops}


def _check(
    name: str, rule: str, base: float | None, known: tuple[str, ...], scaled: tuple[str, ...]
) -> None:
    if rule not in known:
        raise UserError(f"{name}_rule={rule!r} is not known: choose {', '.join(known)}")
    if rule in scaled and base is None:
        raise UserError(f"{name}=None: {name}_rule={rule!r} needs a base: give --{_flag(name)}")
    if rule not in scaled and base is not None:
        raise UserError(
            f"{name}={base:g} is not used by {name}_rule={rule!r}, which is complete: "
            f"give --{_flag(name)} None"
        )
    if base is not None and not base > 0:
        raise UserError(f"{name}={base:g} must be positive")


def _flag(name: str) -> str:
    return name.replace("_", "-")
