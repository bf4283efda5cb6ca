"""A ladder: models of one family at several sizes and compute budgets, planned.

Every run is anytime: its learning rate is constant after the warm-up, and the averaged weights
(`Experiment.tail_average`) are evaluated at the step where each budget is spent. So a rung, one
size, is one run and gives one row a budget.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from slm_jax.data import DataConfig
from slm_jax.errors import UserError
from slm_jax.models.lm import LMConfig
from slm_jax.models.presets import ModelSummary, summary
from slm_jax.models.presets.family import FAMILIES, member
from slm_jax.parallel import MeshConfig
from slm_jax.train import rules
from slm_jax.train.loop import LoopConfig
from slm_jax.train.optimizer import OptimizerConfig


@dataclass(frozen=True)
class Ladder:
    """Sizes, budgets and the rules that turn them into runs."""

    family: str = "dense"
    """dense, moe or mamba (`slm_jax.models.presets.family`)."""
    budgets: tuple[float, ...] = ()
    """Training FLOPs: 3 x forward, attention (causal) and head counted."""
    widths: tuple[int, ...] = ()
    """Widths of the sizes; by default 1, 1.5, 2, 3, 4, 6, ... times `width_multiple`, those that
    have an admissible budget."""
    width_multiple: int = 8
    """What widths are multiples of: 8 for toys, 128 on accelerators."""
    min_tokens: float = 5e4
    """Smallest run: a budget too small for a size is left out of its rung."""
    max_tokens: float = 3e7
    """Largest run."""
    min_tokens_per_parameter: float = 1.0
    """Smallest D / N, of the parameters that a token meets."""
    max_tokens_per_parameter: float = 2000.0
    """Largest D / N, likewise."""
    learning_rate_rule: str = "inverse_width"
    """constant, width, inverse_width, porian, step_law or deepseek (`slm_jax.train.rules`)."""
    learning_rate: float | None = 0.012
    """Learning rate at a width of 64, for the first three; None for the others."""
    batch_tokens_rule: str = "constant"
    """constant, porian, step_law or deepseek (`slm_jax.train.rules`)."""
    batch_tokens: int | None = 2048
    """Tokens a step of the constant rule; None for the others."""
    row_multiple: int = 8
    """Rows a step are a multiple of this, so that a mesh divides them."""
    seq_len: int = 128
    """Tokens a row."""
    tail_average: float = 8.0
    """`Experiment.tail_average`."""
    optimizer: OptimizerConfig = OptimizerConfig(b2=0.98, weight_decay=0.0)
    """Update rule."""
    data: DataConfig = DataConfig(source="python-stdlib", valid_fraction=0.04)
    """Text and tokenizer."""
    eval_tokens: int = 196_608
    """Held-out tokens an evaluation reads."""
    seed: int = 0
    """Source of all randomness."""
    part: str = "1/1"
    """Which rungs to run, as i/n: the i-th of n processes that share the ladder takes every n-th
    rung. Each process reports all rows there are when it ends."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    loop: LoopConfig = LoopConfig(log_every=100, checkpoint_every=1000, quiet=True)
    """Logging and checkpoints."""
    out: Path = Path("runs/ladder")
    """Folder of rows.csv and of one run folder a rung."""
    overwrite: bool = False
    """Train again what is in the folder already."""

    def __post_init__(self) -> None:
        if not self.budgets:
            raise UserError("budgets=() is empty: give training FLOPs, such as 1e11 2e11 4e11")
        if not all(0 < b < float("inf") for b in self.budgets):
            raise UserError(f"budgets={self.budgets}: each must be positive and finite")
        for name in ("budgets", "widths"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)}: one occurs twice: remove it")
        for name in ("width_multiple", "row_multiple", "seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        off = [w for w in self.widths if w < 1 or w % self.width_multiple]
        if off:
            raise UserError(
                f"widths={off[0]} is not a multiple of width_multiple={self.width_multiple}: "
                "change one of them"
            )
        if self.family not in FAMILIES:
            raise UserError(f"family={self.family!r} is not known: choose {', '.join(FAMILIES)}")
        part_of(self.part)


@dataclass(frozen=True)
class Rung:
    """One size and what it is trained for.

    Attributes:
        name: of its run folder: family, width, seed.
        model: the model.
        size: its parameters.
        flops_per_token: of training (`slm_jax.models.flops.training_flops`).
        learning_rate: peak.
        warmup_steps: steps of linear warm-up.
        batch_size: rows a step.
        seq_len: tokens a row.
        budgets: admissible budgets in FLOPs, ascending.
        steps: optimiser steps after which each is spent, to the nearest step.
    """

    name: str
    model: LMConfig
    size: ModelSummary
    flops_per_token: float
    learning_rate: float
    warmup_steps: int
    batch_size: int
    seq_len: int
    budgets: tuple[float, ...]
    steps: tuple[int, ...]

    @property
    def batch_tokens(self) -> int:
        """Tokens a step."""
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> tuple[int, ...]:
        """Training tokens D of each budget; D x flops_per_token is the budget within one step."""
        return tuple(steps * self.batch_tokens for steps in self.steps)


def plan(ladder: Ladder, vocab_size: int) -> list[Rung]:
    """The rungs, smallest first; nothing is trained.

    D = C / (FLOPs a token). Rules see the largest admissible budget of a size, because one run
    serves them all.

    Args:
        ladder: what to plan.
        vocab_size: of the tokenizer.

    Raises:
        UserError: if a rule is unknown, or a budget or a width that was given has no admissible
            cell; the message says which limit excludes it.
    """
    rungs: list[Rung] = []
    refused: dict[float, str] = {}
    for width in ladder.widths or _widths(ladder, vocab_size):
        model = replace(
            member(ladder.family, width, vocab_size=vocab_size), max_seq_len=ladder.seq_len
        )
        size = summary(model, ladder.seq_len)
        reasons = {b: _refusal(ladder, size, b) for b in sorted(ladder.budgets)}
        budgets = tuple(b for b, reason in reasons.items() if not reason)
        if budgets:
            rungs.append(_rung(ladder, model, size, budgets))
        elif ladder.widths:
            raise UserError(f"widths={width}: no budget fits it ({[*reasons.values()][-1]})")
        for b, reason in reasons.items():
            refused.setdefault(b, reason)
    for budget in ladder.budgets:
        if not any(budget in rung.budgets for rung in rungs):
            why = refused.get(budget, "every hardware-shaped width is outside the limits")
            raise UserError(f"budgets={budget:g}: no size fits it ({why}): change it or the limits")
    return rungs


def _rung(ladder: Ladder, model: LMConfig, size: ModelSummary, budgets: tuple[float, ...]) -> Rung:
    asked = rules.Run(
        width=model.d_model,
        parameters=size.total,
        non_embedding=size.non_embedding,
        tokens=budgets[-1] / size.training_flops,
        flops=budgets[-1],
    )
    rows = rules.batch_tokens(ladder.batch_tokens_rule, ladder.batch_tokens, asked) / ladder.seq_len
    batch_size = ladder.row_multiple * max(1, round(rows / ladder.row_multiple))
    per_step = size.training_flops * batch_size * ladder.seq_len
    steps = tuple(max(1, round(b / per_step)) for b in budgets)
    if len(set(steps)) < len(steps):
        raise UserError(
            f"budgets={budgets}: at N={size.total:,} two of them end at one step, of "
            f"{per_step:.3g} FLOPs: give budgets further apart, or raise min_tokens"
        )
    return Rung(
        name=f"{ladder.family}-d{model.d_model}-seed{ladder.seed}",
        model=model,
        size=size,
        flops_per_token=size.training_flops,
        learning_rate=rules.learning_rate(ladder.learning_rate_rule, ladder.learning_rate, asked),
        # A share of the shortest run: a warm-up that outlasts a small budget shifts its optimum
        # (arXiv 2406.19146).
        warmup_steps=min(200, max(20, steps[0] // 5)),
        batch_size=batch_size,
        seq_len=ladder.seq_len,
        budgets=budgets,
        steps=steps,
    )


def _refusal(ladder: Ladder, size: ModelSummary, budget: float) -> str:
    """Why a size is not trained at a budget; empty if it is."""
    tokens = budget / size.training_flops
    at = f"N={size.total:,} would see D={tokens:.3g} tokens"
    if tokens < ladder.min_tokens:
        return f"{at}, below min_tokens={ladder.min_tokens:g}"
    if tokens > ladder.max_tokens:
        return f"{at}, above max_tokens={ladder.max_tokens:g}"
    if tokens < ladder.min_tokens_per_parameter * size.active:
        return f"{at}, below min_tokens_per_parameter={ladder.min_tokens_per_parameter:g}"
    if tokens > ladder.max_tokens_per_parameter * size.active:
        return f"{at}, above max_tokens_per_parameter={ladder.max_tokens_per_parameter:g}"
    return ""


def _widths(ladder: Ladder, vocab_size: int) -> list[int]:
    """Hardware-shaped widths, about half an octave apart, with an admissible budget."""
    found = []
    shapes = (m * 2**octave for octave in range(24) for m in (2, 3))
    for width in (ladder.width_multiple * shape // 2 for shape in shapes):
        if width < 8 or width % 4:
            continue
        size = summary(member(ladder.family, width, vocab_size=vocab_size), ladder.seq_len)
        if any(not _refusal(ladder, size, b) for b in ladder.budgets):
            found.append(width)
        elif all(b / size.training_flops < ladder.min_tokens for b in ladder.budgets):
            break
    return found


def part_of(part: str) -> tuple[int, int]:
    """`"i/n"` as numbers.

    Raises:
        UserError: if it is not i/n with 1 <= i <= n.
    """
    try:
        i, n = (int(x) for x in part.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 1 <= i <= n:
        raise UserError(f"part={part!r} must be i/n with 1 <= i <= n, such as 1/8")
    return i, n
