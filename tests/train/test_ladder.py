"""Ladders: what is planned, and that what is run is what was planned, killed or not."""

import csv
import dataclasses
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slm_jax.data import DataConfig
from slm_jax.errors import UserError
from slm_jax.models.flops import training_flops
from slm_jax.models.presets import summary
from slm_jax.models.presets.family import FAMILIES, depth, member
from slm_jax.parallel import MeshConfig
from slm_jax.train import experiment as experiment_module
from slm_jax.train import rules
from slm_jax.train.experiment import evaluate
from slm_jax.train.ladder import ROWS_FILE, Row, run_ladder
from slm_jax.train.loop import DivergedError, LoopConfig
from slm_jax.train.plan import Ladder, plan

PLANNED = Ladder(budgets=(5e10, 1e11, 4e11), widths=(12, 24, 48), width_multiple=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_budget_is_spent_to_within_a_step(family: str) -> None:
    rungs = plan(replace(PLANNED, family=family), vocab_size=257)
    assert [r.model.d_model for r in rungs] == [12, 24, 48]
    for rung in rungs:
        # Counted from the model that is trained, over rows as long as those it is trained on.
        flops = training_flops(rung.model, 128)
        assert rung.flops_per_token == flops == 3 * summary(rung.model, 128).forward_flops
        assert rung.batch_tokens == rung.batch_size * rung.seq_len == 2048
        assert rung.steps == tuple(sorted(set(rung.steps)))
        for budget, tokens, steps in zip(rung.budgets, rung.tokens, rung.steps, strict=True):
            assert tokens == steps * 2048
            assert abs(tokens * flops - budget) <= flops * 2048 / 2
        assert rung.learning_rate == pytest.approx(0.012 * 64 / rung.model.d_model)
        assert 20 <= rung.warmup_steps <= max(20, rung.steps[0] // 5)


def test_limits_leave_out_cells() -> None:
    limits = replace(
        PLANNED,
        min_tokens=3e5,
        max_tokens=5e6,
        min_tokens_per_parameter=5,
        max_tokens_per_parameter=300,
    )
    kept = {(r.model.d_model, b) for r in plan(limits, 257) for b in r.budgets}
    cells = {
        (w, b)
        for w in PLANNED.widths
        for b in PLANNED.budgets
        for size in [summary(member("dense", w, vocab_size=257), 128)]
        for d in [b / size.training_flops]
        if 3e5 <= d <= 5e6 and 5 <= d / size.total <= 300
    }
    assert kept == cells
    assert 0 < len(cells) < 9


def test_hardware_shaped_sizes() -> None:
    big = Ladder(
        budgets=(1e18, 1e19),
        width_multiple=128,
        max_tokens=1e12,
        min_tokens_per_parameter=2,
        max_tokens_per_parameter=200,
        learning_rate_rule="porian",
        learning_rate=None,
        batch_tokens_rule="porian",
        batch_tokens=None,
        row_multiple=32,
        seq_len=2048,
    )
    rungs = plan(big, 50_304)
    assert len(rungs) >= 4
    for rung in rungs:
        model = rung.model
        assert model.d_model % 128 == 0
        if model.d_model >= 512:
            assert model.pattern[0].mixer.head_dim == 128  # type: ignore[union-attr]
            assert model.pattern[0].channel.d_ff % 128 == 0  # type: ignore[union-attr]
        assert rung.batch_size % 32 == 0
        assert model.n_layers == depth(model.d_model)
    # Both sides of 20 tokens a parameter at the largest budget.
    ratios = [r.tokens[-1] / r.size.total for r in rungs if r.budgets[-1] == 1e19]
    assert max(ratios) > 40
    assert min(ratios) < 10


def test_toy_sizes_have_heads_of_eight_or_more() -> None:
    for width in range(8, 260, 4):
        mixer: Any = member("dense", width, vocab_size=257).pattern[0].mixer
        assert mixer.head_dim >= 8
        assert mixer.head_dim % 2 == 0
        assert mixer.head_dim * mixer.n_heads == width


def test_families_of_one_width_cost_alike() -> None:
    flops = {f: training_flops(member(f, 48, vocab_size=257), 128) for f in FAMILIES}
    assert flops["moe"] == pytest.approx(flops["dense"], rel=0.02)
    assert summary(member("moe", 48, vocab_size=257)).active < 1.05 * 67_968
    assert flops["mamba"] < 1.5 * flops["dense"]


def test_rules() -> None:
    run = rules.Run(width=256, parameters=108_000_000, non_embedding=10**9, tokens=1e11, flops=1e20)
    rate, batch = rules.learning_rate, rules.batch_tokens
    assert rate("constant", 0.1, run) == 0.1
    assert rate("width", 0.1, run) == pytest.approx(0.05)
    assert rate("width", 0.1, replace(run, width=16)) == 0.1
    assert rate("inverse_width", 0.1, run) == pytest.approx(0.025)
    # At the size that the constants are written for.
    assert rate("porian", None, run) == pytest.approx(0.0047)
    assert batch("porian", None, run) == pytest.approx(327_680)
    assert batch("porian", None, replace(run, parameters=8 * 108_000_000)) == pytest.approx(
        4 * 327_680
    )
    # 1.79 x 10^(-9 x 0.713 + 11 x 0.307), 0.58 x 10^(11 x 0.571).
    assert rate("step_law", None, run) == pytest.approx(1.79 * 10**-3.04, rel=1e-9)
    assert batch("step_law", None, run) == pytest.approx(0.58 * 10**6.281, rel=1e-9)
    # 0.3118 x 10^(-20 x 0.125), 0.2920 x 10^(20 x 0.3271).
    assert rate("deepseek", None, run) == pytest.approx(0.3118 * 10**-2.5, rel=1e-9)
    assert batch("deepseek", None, run) == pytest.approx(0.2920 * 10**6.542, rel=1e-9)
    assert batch("constant", 2048, run) == 2048
    for name in rules.LEARNING_RATE_RULES:
        scaled = name in ("constant", "width", "inverse_width")
        assert rate(name, 0.1 if scaled else None, run) > 0
        with pytest.raises(UserError, match="learning_rate=None" if scaled else "is not used"):
            rate(name, None if scaled else 0.1, run)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budgets": ()}, r"budgets=\(\) is empty"),
        ({"budgets": (1e11, -1.0)}, "each must be positive"),
        ({"budgets": (1e11, math.inf)}, "each must be positive and finite"),
        ({"budgets": (1e11, 1e11)}, "one occurs twice"),
        ({"budgets": (1e6, 1e11)}, r"budgets=1e\+06: no size fits it \(N=6,648 .* min_tokens="),
        ({"budgets": (1e18,), "widths": ()}, r"budgets=1e\+18: no size fits it"),
        ({"widths": (12, 400)}, "widths=400: no budget fits it .* below min_tokens=50000"),
        ({"widths": (12, 14)}, "widths=14 is not a multiple of width_multiple=4"),
        ({"widths": (12, 12)}, "one occurs twice"),
        ({"family": "rnn"}, "family='rnn' is not known: choose dense, moe, mamba"),
        ({"learning_rate_rule": "best"}, "learning_rate_rule='best' is not known: choose constant"),
        ({"learning_rate": None}, "learning_rate=None: .* needs a base"),
        ({"learning_rate": -1.0}, "learning_rate=-1 must be positive"),
        ({"batch_tokens_rule": "best"}, "batch_tokens_rule='best' is not known"),
        ({"batch_tokens_rule": "porian"}, "batch_tokens=2048 is not used by"),
        ({"budgets": (5e10, 5.01e10)}, "two of them end at one step"),
        ({"part": "3/2"}, "part='3/2' must be i/n"),
        ({"part": "all"}, "part='all' must be i/n"),
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
    ],
)
def test_what_cannot_be_planned_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        plan(replace(PLANNED, **changes), 257)
    assert "\n" not in str(error.value)


@pytest.fixture
def tiny_ladder(text: DataConfig, tmp_path: Path) -> Ladder:
    """Two sizes of a few steps."""
    return Ladder(
        budgets=(3e8, 6e8, 1.2e9),
        widths=(8, 16),
        width_multiple=4,
        min_tokens=256,
        min_tokens_per_parameter=0,
        learning_rate=0.02,
        batch_tokens=256,
        seq_len=16,
        data=text,
        eval_tokens=300,
        mesh=MeshConfig(data=1),
        loop=LoopConfig(checkpoint_every=5, quiet=True),
        out=tmp_path / "ladder",
    )


def read_csv(ladder: Ladder) -> list[dict[str, str]]:
    with (ladder.out / ROWS_FILE).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_ladder_is_measured_where_it_was_planned(
    tiny_ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    rows = run_ladder(tiny_ladder, report=lines.append)
    assert len(lines) == 2
    rungs = plan(tiny_ladder, 257)
    assert [(r.run, r.D) for r in rows] == [(g.name, d) for g in rungs for d in g.tokens]
    for row in rows:
        assert row.D * row.flops_per_token == row.C
        assert row.bits_per_byte == pytest.approx(row.loss / math.log(2))
        assert row.N == row.N_active == row.N_non_embedding + 257 * row.width
        assert row.loss != row.loss_raw
    # The same run cut off at the first budget gives the first row: that is what anytime means.
    # The warm-up follows from the smallest budget, so only the length differs.
    short = replace(tiny_ladder, budgets=tiny_ladder.budgets[:1], out=tiny_ladder.out / "short")
    assert [r.loss for r in run_ladder(short, report=lines.append)] == [
        r.loss for r in rows if abs(r.C / 3e8 - 1) < 0.2
    ]
    saved = read_csv(tiny_ladder)
    assert list(saved[0]) == [f.name for f in dataclasses.fields(Row)]
    assert [float(r["loss"]) for r in saved] == [r.loss for r in rows]  # all bits

    # A finished ladder is only read.
    monkeypatch.setattr(experiment_module, "train", refuse)
    assert run_ladder(tiny_ladder, report=lines.append) == rows
    with pytest.raises(AssertionError, match="trained"):
        run_ladder(replace(tiny_ladder, out=tiny_ladder.out / "new"), report=lines.append)


def refuse(*args: Any, **arguments: Any) -> Any:
    raise AssertionError("trained")


@pytest.mark.slow
def test_killed_ladder_goes_on_and_gives_the_same_bits(
    tiny_ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_ladder(replace(tiny_ladder, out=tiny_ladder.out / "whole"), report=lambda _: None)
    evaluations = 0

    def kill_at_the_fifth(*args: Any, **arguments: Any) -> dict[str, float]:
        nonlocal evaluations
        evaluations += 1
        if evaluations == 5:  # in the second of the two rungs, which has written a checkpoint
            raise KeyboardInterrupt
        return evaluate(*args, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(experiment_module, "evaluate", kill_at_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            run_ladder(tiny_ladder, report=lambda _: None)
    assert not (tiny_ladder.out / ROWS_FILE).exists()
    begun = tiny_ladder.out / "dense-d16-seed0"
    assert not (begun / "result.json").exists()
    assert list((begun / "checkpoints").iterdir())
    assert run_ladder(tiny_ladder, report=lambda _: None) == whole


@pytest.mark.slow
def test_processes_share_a_ladder(tiny_ladder: Ladder) -> None:
    """Rung by rung, in any order; the rows of all are in the file when the last one ends."""
    second = run_ladder(replace(tiny_ladder, part="2/2"), report=lambda _: None)
    assert {r.width for r in second} == {16}
    both = run_ladder(replace(tiny_ladder, part="1/2"), report=lambda _: None)
    assert [r.width for r in both] == [8, 8, 8, 16, 16, 16]
    assert both[3:] == second
    assert [float(r["loss"]) for r in read_csv(tiny_ladder)] == [r.loss for r in both]
    # More processes than rungs: the idle one has no rung, and reports all the same.
    assert run_ladder(replace(tiny_ladder, part="3/3"), report=lambda _: None) == both


@pytest.mark.slow
def test_another_ladder_in_the_folder_is_refused(tiny_ladder: Ladder) -> None:
    run_ladder(replace(tiny_ladder, widths=(8,)), report=lambda _: None)
    with pytest.raises(UserError, match=r"holds another run \(schedule.learning_rate"):
        run_ladder(replace(tiny_ladder, widths=(8,), learning_rate=0.04), report=lambda _: None)
    # Also where another process would train it: its rows would be reported as this ladder's.
    with pytest.raises(UserError, match=r"holds another run \(schedule.learning_rate"):
        run_ladder(replace(tiny_ladder, learning_rate=0.04, part="2/2"), report=lambda _: None)
    # The same run to the same end, but with a budget in between that was not evaluated.
    more = replace(tiny_ladder, widths=(8,), budgets=(3e8, 6e8, 9e8, 1.2e9))
    with pytest.raises(UserError, match="was trained for other budgets"):
        run_ladder(more, report=lambda _: None)


@pytest.mark.slow
def test_a_rung_that_diverges_is_left_out(
    tiny_ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_wide_ones(config: Any, *args: Any) -> dict[str, float]:
        values = evaluate(config, *args)
        return values if config.model.d_model < 16 else values | {"valid_loss": math.nan}

    monkeypatch.setattr(experiment_module, "evaluate", no_wide_ones)
    lines: list[str] = []
    rows = run_ladder(tiny_ladder, report=lines.append)
    assert {r.width for r in rows} == {8}
    assert lines[1].startswith("dense-d16-seed0: valid_loss=nan")
    with pytest.raises(DivergedError, match="every rung diverged"):
        run_ladder(
            replace(tiny_ladder, widths=(16,), out=tiny_ladder.out / "b"), report=lines.append
        )
