"""Markdown and plots of a study: what it says, and how it was fitted."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.scaling.compare import Comparison
from slm_jax.scaling.effective_size import Reading, Target
from slm_jax.scaling.isoflop import group_budgets
from slm_jax.scaling.laws import Chinchilla
from slm_jax.scaling.optimum import compute_optimal
from slm_jax.scaling.rows import Rows
from slm_jax.scaling.study import HeldOut, Study

_N = {"parameters": "N", "flops": "N = FLOPs a token / 6"}


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def study_markdown(s: Study, name: str = "") -> str:
    """Everything a study says, as Markdown sections.

    Args:
        s: the study.
        name: of the family, for the headings.
    """
    title = f": {name}" if name else ""
    parts = [f"## Checks{title}\n\n{_findings(s)}"]
    if s.held_out is not None:
        parts.append(
            f"## Prediction of the largest budget{title}\n\n{held_out_markdown(s.held_out)}"
        )
    if s.curves is not None:
        parts.append(f"## IsoFLOP curves{title}\n\n{_curves(s)}")
    parts.append(f"## Compute-optimal by the fitted law{title}\n\n{_optimum(s)}")
    intervals = {k: s.boot.interval(k) for k in s.fit.free}
    parts.append(s.fit.card(intervals))
    return "\n".join(parts)


def held_out_markdown(h: HeldOut) -> str:
    """The prediction first, then what was measured."""
    order = np.lexsort((h.rows["N"], h.rows["C"]))
    cells = [
        (
            f"{h.rows['C'][i]:.3g}",
            f"{h.rows['N'][i]:.3g}",
            f"{h.rows['D'][i]:.3g}",
            f"{h.predicted[i]:.4f} ({h.low[i]:.4f} to {h.high[i]:.4f})",
            f"{h.rows['loss'][i]:.4f}",
            f"{100 * h.errors[i] / h.rows['loss'][i]:+.2f} %",
        )
        for i in order
    ]
    return (
        f"Fitted to the {h.fit.n} runs of at most {h.above:.3g} FLOPs; the {len(h.rows)} larger "
        "ones were not seen.\n\n"
        + table(("C", "N", "D", "predicted (90 %)", "measured", "measured - predicted"), cells)
        + f"\nRoot mean square error {h.rmse:.4f} nats, bias {h.errors.mean():+.4f}, worst "
        f"{100 * h.worst:.2f} % of the loss; {100 * h.covered:.0f} % inside the intervals.\n"
    )


def comparison_markdown(c: Comparison, *, draws: int = 200) -> str:
    """Which letters differ between families, best hypothesis first.

    Args:
        c: the comparison.
        draws: bootstrap draws behind the intervals of hypotheses with one letter.
    """
    cells = []
    for f in c.fits:
        spread = c.intervals(f.separate, draws=draws) if len(f.separate) == 1 else {}
        amounts = []
        for letter, each in f.multipliers().items():
            texts = [f"{v:.3g}" for v in each]
            for j, (low, high) in enumerate(spread.get(letter, [])):
                texts[j] += f" ({low:.3g} to {high:.3g})" if j else ""
            amounts.append(f"{letter}: {', '.join(texts)}")
        cells.append(
            (
                f.separate or "nothing",
                f"{f.aicc:.1f}",
                f"{f.aicc - c.best.aicc:.1f}",
                f"{f.fit.rmse:.4f}",
                f"{f.held_out:.4f}",
                "; ".join(amounts),
            )
        )
    return (
        f"Families: {', '.join(c.families)}; amounts refer to the first. `E` is a difference of "
        "asymptotes in nats; `A` and `B` say how many of the first family's parameters or tokens "
        "one of this family's is worth (the surveys' Q is `B`), with 90 % intervals where one "
        "letter differs. The amounts of a hypothesis that loses by 10 or more describe nothing, "
        "however narrow their intervals.\n\n"
        + table(
            ("differs", "AICc", "above best", "rmse", "leave-one-budget-out rmse", "amounts"), cells
        )
    )


def effective_size_markdown(
    placed: Mapping[str, Sequence[tuple[Target, Mapping[str, Reading]]]], reference: str
) -> str:
    """Each family's best runs on the scale of the reference family (`effective_size.place`)."""
    cells = [
        (name, f"{target.flops:.3g}", f"{target.N:.3g}", f"{target.loss:.4f}",
         *(str(r) for r in readings.values()))
        for name, runs in placed.items()
        for target, readings in runs
    ]  # fmt: skip
    readings = next((list(r) for runs in placed.values() for _, r in runs), [])
    return (
        f"Effective size against {reference} (median, 90 % interval): the best run of each family "
        "at each budget. A size is in parameters; the compute gain is the reference's compute for "
        "this loss over the compute spent; the data multiplier is the tokens the reference needs "
        "at this size over those spent.\n\n" + table(("family", "C", "N", "loss", *readings), cells)
    )


def _findings(s: Study) -> str:
    lines = [f"- {f.severity}: {f.text}" for f in s.findings] or ["- none: the design is sound"]
    lines.append(f"- {len(s.rows)} rows; N is {_N[s.size]}")
    lines += [f"- left out, {len(d.rows)} rows: {d.reason}" for d in s.rows.dropped]
    if s.boot.failed:
        lines.append(f"- {s.boot.failed} bootstrap draws did not converge and are not counted")
    return "\n".join(lines) + "\n"


def _curves(s: Study) -> str:
    assert s.curves is not None
    cells = [
        (f"{m.C:.3g}", m.points, f"{m.N:.3g}", f"{m.D:.3g}", f"{m.D / m.N:.1f}", f"{m.loss:.4f}",
         m.problem or "interior")
        for m in s.curves.minima
    ]  # fmt: skip
    text = table(("C", "sizes", "N*", "D*", "D*/N*", "L*", "minimum"), cells)
    losses = [m.loss for m in s.curves.interior]
    falls = all(a > b for a, b in itertools.pairwise(losses))
    text += f"\nL* {'falls with every budget' if falls else 'does NOT fall with every budget'}.\n"
    if len(losses) < 2:
        return text + "Fewer than two interior minima: no exponent.\n"
    for letter in ("N", "D"):
        power = s.curves.growth(letter)
        spread = ""
        if s.exponents is not None:
            low, high = s.exponents.interval(letter)
            spread = f" (90 %: {low:.3f} to {high:.3f}, {s.exponents.failed} draws without)"
        text += f"{letter}* = {power.coefficient:.4g} C^{power.exponent:.3f}{spread}.\n"
    return text + f"L* falls as C^{s.curves.growth('loss').exponent:.3f}.\n"


def _optimum(s: Study) -> str:
    budgets = np.geomspace(s.rows["C"].min(), 10 * s.rows["C"].max(), 6)
    cells = []
    for c in budgets:
        best = compute_optimal(s.law, float(c))
        n = np.array([compute_optimal(law, float(c)).N for law in s.draws])
        low, high = np.percentile(n, [5, 95])
        beyond = " (beyond the data)" if c > s.rows["C"].max() else ""
        cells.append(
            (f"{c:.3g}{beyond}", f"{best.N:.3g} ({low:.3g} to {high:.3g})", f"{best.D:.3g}",
             f"{best.loss:.4f}")
        )  # fmt: skip
    return table(("C", "N* (90 %)", "D*", "L*"), cells)


def plot_study(studies: Mapping[str, Study], path: Path, title: str) -> None:
    """IsoFLOP curves of each study, then N*(C) and the loss over compute of all.

    Args:
        studies: by name.
        path: the PNG.
        title: of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = len(studies) + 2
    lines = -(-panels // 3)
    figure, grid = plt.subplots(
        lines, 3, figsize=(16, 4.8 * lines), constrained_layout=True, squeeze=False
    )
    *curves, growth, loss = grid.flat[:panels]
    for ax in grid.flat[panels:]:
        ax.axis("off")
    for i, (ax, (name, s)) in enumerate(zip(curves, studies.items(), strict=True)):
        _plot_curves(ax, s, name)
        _plot_growth(growth, s, name, f"C{i}")
        _plot_loss(loss, s, name, f"C{i}")
    growth.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="best size N*")
    loss.set(xscale="log", xlabel="training FLOPs", ylabel="loss (nats/token)")
    for ax in (growth, loss):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_levels(c: Comparison, path: Path, title: str) -> None:
    """Loss over N of every family, one panel each, with the law of the best hypothesis dashed.

    Args:
        c: the comparison.
        path: the PNG.
        title: of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = len(c.families)
    figure, axes = plt.subplots(
        1, n, figsize=(5.3 * n, 4.8), sharey=True, constrained_layout=True, squeeze=False
    )
    label = group_budgets(c.rows["C"])
    for j, (ax, family) in enumerate(zip(axes.flat, c.families, strict=True)):
        law = c.best.law.of_group(j)
        of = c.rows["group"] == j
        for i, budget in enumerate(np.unique(label)):
            _plot_budget(ax, c.rows.take(of & (label == budget)), law, f"C{i}", f"{budget:.2g}")
        ax.set(xscale="log", xlabel="N", title=family)
        ax.grid(alpha=0.3)
    axes[0][0].set(ylabel="loss (nats/token)")
    axes[0][-1].legend(title="FLOPs", fontsize=7)
    figure.suptitle(f"{title}; dashed: {c.best.law.formula}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_budget(ax: Any, rows: Rows, law: Chinchilla, color: Any, label: str) -> None:
    """Loss over N at one budget, and the law between the sizes dashed."""
    if not len(rows):
        return
    rows = rows.take(np.argsort(rows["N"]))
    ax.plot(rows["N"], rows["loss"], "o-", ms=4, color=color, label=label)
    grid = np.geomspace(rows["N"][0], rows["N"][-1], 60)
    tokens = np.exp(np.interp(np.log(grid), np.log(rows["N"]), np.log(rows["D"])))
    ax.plot(grid, law(N=grid, D=tokens), "--", lw=1, color=color)


def _plot_curves(ax: Any, s: Study, name: str) -> None:
    """Loss over N, a colour a budget; the law dashed."""
    from matplotlib import colormaps

    budgets = [m.C for m in s.curves.minima] if s.curves else sorted(set(s.rows["C"]))
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(budgets)))
    nearest = np.argmin(np.abs(np.log(s.rows["C"])[:, None] - np.log(budgets)), axis=1)
    for i, (budget, color) in enumerate(zip(budgets, colors, strict=True)):
        _plot_budget(ax, s.rows.take(nearest == i), s.law, color, f"{budget:.2g}")
        if s.curves and s.curves.minima[i].interior:
            ax.plot(s.curves.minima[i].N, s.curves.minima[i].loss, "*", ms=11, color=color, mec="k")
    ax.set(xscale="log", xlabel=_N[s.size], ylabel="loss (nats/token)", title=name)
    ax.grid(alpha=0.3)
    ax.legend(title="FLOPs", fontsize=7)


def _plot_growth(ax: Any, s: Study, name: str, color: str) -> None:
    span = np.geomspace(s.rows["C"].min(), 3 * s.rows["C"].max(), 40)
    ax.plot(span, [compute_optimal(s.law, c).N for c in span], color=color, label=f"{name}, law")
    sizes = np.array([[compute_optimal(law, c).N for c in span] for law in s.draws])
    ax.fill_between(span, *np.percentile(sizes, [5, 95], axis=0), color=color, alpha=0.2, lw=0)
    if s.curves:
        good = s.curves.interior
        ax.plot([m.C for m in good], [m.N for m in good], "*", ms=11, color=color, mec="k",
                label=f"{name}, parabolas")  # fmt: skip


def _plot_loss(ax: Any, s: Study, name: str, color: str) -> None:
    span = np.geomspace(s.rows["C"].min(), 3 * s.rows["C"].max(), 40)
    ax.plot(
        span, [compute_optimal(s.law, c).loss for c in span], color=color, label=f"{name}, L*(C)"
    )
    losses = np.array([[compute_optimal(law, c).loss for c in span] for law in s.draws])
    ax.fill_between(span, *np.percentile(losses, [5, 95], axis=0), color=color, alpha=0.2, lw=0)
    ax.plot(s.rows["C"], s.rows["loss"], ".", ms=4, color=color, alpha=0.6)
    if s.held_out:
        h = s.held_out.rows
        ax.plot(h["C"], h["loss"], "x", color=color, label=f"{name}, held out")
