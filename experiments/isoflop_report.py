"""What an isoFLOP study leaves behind: report.md and report.png from the rows it trained."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from slm_jax.errors import UserError
from slm_jax.scaling.compare import compare_families
from slm_jax.scaling.effective_size import place
from slm_jax.scaling.isoflop import ExponentDraws, IsoFLOP, Method, exponent_draws, isoflop
from slm_jax.scaling.optimum import compute_optimal
from slm_jax.scaling.report import (
    comparison_markdown,
    effective_size_markdown,
    plot_study,
    study_markdown,
    table,
)
from slm_jax.scaling.rows import Rows, admissible
from slm_jax.scaling.study import Study, seed_noise, study
from slm_jax.train.ladder import Row

# Runs below these are in their early transient, where no power law holds; isoFLOP curves show them.
MIN_TOKENS = 3e5
MIN_TOKENS_PER_PARAMETER = 5.0
DRAWS = 200  # of bootstraps and noise
_NEAREST = 5  # sizes around the lowest one that a parabola is put through


@dataclass(frozen=True)
class Trained:
    """What was trained.

    Attributes:
        rows: all measurements.
        budgets: nominal FLOPs of each family, ascending; the first family is the reference.
        tuned: by family and base learning rate, the rows of the tuning runs.
        corpus: name of the text.
        command: what makes the report again.
    """

    rows: Sequence[Row]
    budgets: Mapping[str, tuple[float, ...]]
    tuned: Mapping[str, Mapping[float, Sequence[Row]]]
    corpus: str
    command: str


@dataclass(frozen=True)
class Curves:
    """The isoFLOP curves of one family by one method.

    Attributes:
        found: minima.
        exponents: intervals from the noise between seeds; `None` where it is not known.
    """

    found: IsoFLOP
    exponents: ExponentDraws | None

    def exponent(self, of: str) -> str:
        """An exponent of C with its 90 % interval; there must be two interior minima."""
        value = self.found.growth(of).exponent  # type: ignore[arg-type]
        if of == "loss" or self.exponents is None:
            return f"{value:.3f}"
        low, high = self.exponents.interval(of)  # type: ignore[arg-type]
        return f"{value:.3f} ({low:.3f} to {high:.3f})"


def as_table(rows: Sequence[Row]) -> Rows:
    """Rows for the fits: N is FLOPs a token / 6, so that 6 N D counts attention and head too."""
    return Rows(
        {
            "N": np.array([r.flops_per_token / 6 for r in rows]),
            "D": np.array([r.D for r in rows]),
            "C": np.array([r.C for r in rows]),
            "loss": np.array([r.loss for r in rows]),
            "N_total": np.array([r.N for r in rows]),
            "width": np.array([r.width for r in rows]),
        },
        {"run": np.array([r.run for r in rows]), "family": np.array([r.family for r in rows])},
    )


def noise_of(rows: Rows) -> float | None:
    """Standard deviation of log loss between seeds; `None` if every cell has one seed."""
    try:
        return seed_noise(rows)
    except UserError:
        return None


def mean_of_seeds(rows: Rows) -> Rows:
    """One row a size and budget: the best of a few noisy runs would flatter their family."""
    cells = np.stack([rows["N"], rows["D"]], axis=1)
    _, first, cell = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    return rows.take(first).with_columns(loss=np.bincount(cell, rows["loss"]) / np.bincount(cell))


def curves(rows: Rows, budgets: Sequence[float], noise: float | None, method: Method) -> Curves:
    """The minima of every budget, edges named, and the exponents' intervals."""
    options = {"budgets": budgets, "method": method, "nearest": _NEAREST}
    found = isoflop(rows, **options)  # type: ignore[arg-type]
    draws = None
    if noise is not None and len(found.interior) >= 2:
        draws = exponent_draws(rows, noise, draws=DRAWS, **options)  # type: ignore[arg-type]
    return Curves(found, draws)


def fitted(rows: Rows, noise: float | None) -> Study | str:
    """The law of the admissible runs, or why there is none."""
    kept = admissible(
        rows, min_tokens=MIN_TOKENS, min_tokens_per_parameter=MIN_TOKENS_PER_PARAMETER
    )
    if not len(kept):
        return f"no run has {MIN_TOKENS:g} tokens and {MIN_TOKENS_PER_PARAMETER:g} a parameter"
    try:
        return study(kept, size="flops", noise=noise, nearest=_NEAREST, draws=DRAWS)
    except UserError as error:
        return str(error)


def write_report(out: Path, trained: Trained, console: Console) -> None:
    """Prints the report and writes report.md and report.png into `out`."""
    everything = as_table(trained.rows)
    text = [
        f"# IsoFLOP curves: {', '.join(trained.budgets)} on {trained.corpus}\n\n"
        f"`{trained.command}`\n\nLosses are nats a byte of held-out files, of tail-averaged "
        "weights. One run of a size gives its loss at every budget. N is FLOPs a token / 6, "
        "attention and head counted, unless it says parameters.\n",
        _tuning(trained),
    ]
    studies: dict[str, Study] = {}
    for family, budgets in trained.budgets.items():
        rows = everything.take(everything["family"] == family)
        noise = noise_of(rows)
        both = {m: curves(rows, budgets, noise, m) for m in ("parabola", "akima")}
        text.append(_losses(family, [r for r in trained.rows if r.family == family], budgets))
        text.append(_minima(family, both, noise))
        text.append(_predicted_minimum(family, rows, budgets))
        found = fitted(rows, noise)
        if isinstance(found, str):
            text.append(f"## The law: {family}\n\nNone was fitted: {found}\n")
            continue
        # Curves over all runs: a valley has a side of few tokens, which no fit may use.
        shown = replace(found, curves=both["parabola"].found, exponents=both["parabola"].exponents)
        studies[family] = replace(shown, rows=mean_of_seeds(rows))
        text.append(study_markdown(replace(found, curves=None), family))
    if len(studies) > 1:
        text.append(_compared(studies, everything, next(iter(trained.budgets))))
    if studies:
        plot_study(studies, out / "report.png", f"isoFLOP curves on {trained.corpus}")
        text.append("![isoFLOP curves, best size, loss](report.png)\n")
    report = "\n".join(text)
    (out / "report.md").write_text(report)
    console.print(Markdown(report))
    console.print(f"report.md, report.png and rows.csv are in {out}", highlight=False)


def _tuning(trained: Trained) -> str:
    cells = [
        (
            family,
            f"{rate:g}",
            *(f"d={r.width}: {r.loss:.3f} at lr {r.learning_rate:.3g}" for r in rows),
        )
        for family, rates in trained.tuned.items()
        for rate, rows in rates.items()
    ]
    widths = max(len(cell) for cell in cells) - 2
    headings = ("family", "lr at width 64", *(f"loss {i + 1}" for i in range(widths)))
    text = f"## Learning rate\n\n{table(headings, cells)}"
    for family, rates in trained.tuned.items():
        mean = {rate: float(np.mean([r.loss for r in rows])) for rate, rows in rates.items()}
        best = min(mean, key=lambda rate: mean[rate])
        text += f"\n{family}: {best:g} has the lowest mean"
        if len(mean) > 2 and best in (min(mean), max(mean)):
            nearest = sorted(mean.values())[1] - mean[best]
            text += f", {nearest:.4f} below the next, and is at the edge of the rates tried"
        text += ".\n"
    return text


def _losses(family: str, rows: Sequence[Row], budgets: Sequence[float]) -> str:
    """Mean over the seeds; the lowest of a budget in bold, the number of seeds in brackets."""
    sizes = sorted({(r.N, r.width, r.layers, r.learning_rate) for r in rows})
    mean: dict[tuple[float, int], tuple[float, int]] = {}
    for budget, (n, *_) in itertools.product(budgets, sizes):
        found = [r.loss for r in rows if n == r.N and abs(np.log(r.C / budget)) < 0.1]
        if found:
            mean[budget, n] = float(np.mean(found)), len(found)
    lowest = {b: min(v for (c, _), (v, _) in mean.items() if c == b) for b in budgets}

    def cell(budget: float, n: int) -> str:
        if (budget, n) not in mean:
            return "-"
        loss, seeds = mean[budget, n]
        text = f"**{loss:.3f}**" if loss == lowest[budget] else f"{loss:.3f}"
        return text + (f" ({seeds})" if seeds > 1 else "")

    cells = [
        (f"{n:,}", width, layers, f"{rate:.3g}", *(cell(b, n) for b in budgets))
        for n, width, layers, rate in sizes
    ]
    headings = ("parameters", "width", "layers", "lr", *(f"{b:g}" for b in budgets))
    return f"## Losses: {family}\n\n{table(headings, cells)}"


def _minima(family: str, both: Mapping[str, Curves], noise: float | None) -> str:
    text = f"## Best size at each budget: {family}\n\n"
    if noise is None:
        text += "The noise between seeds was not measured: exponents have no interval.\n\n"
    else:
        text += f"Noise between seeds: {100 * noise:.2f} % of the loss (standard deviation).\n\n"
    cells = [
        (method, f"{m.C:.3g}", m.points, f"{m.N:,.0f}", f"{m.D:.3g}", f"{m.D / m.N:.1f}",
         f"{m.loss:.4f}", m.problem or "interior")
        for method, c in both.items()
        for m in c.found.minima
    ]  # fmt: skip
    text += table(("method", "C", "sizes", "N*", "D*", "D*/N*", "L*", "minimum"), cells)
    for method, c in both.items():
        losses = [m.loss for m in c.found.minima]
        falls = all(a > b for a, b in itertools.pairwise(losses))
        text += f"\nBy {method}: "
        if len(c.found.interior) < 2:
            text += "fewer than two interior minima, no exponent; "
        else:
            text += ", ".join(
                f"{name} ~ C^{c.exponent(of)}"
                for name, of in (("N*", "N"), ("D*", "D"), ("L*", "loss"))
            )
            text += "; "
        text += f"L* {'falls' if falls else 'does NOT fall'} with every budget.\n"
    return text


def _predicted_minimum(family: str, rows: Rows, budgets: Sequence[float]) -> str:
    """N* and L* at the largest budget, from the curves of the others alone."""
    heading = f"## The largest budget's minimum, predicted from the others: {family}\n\n"
    if len(budgets) < 3:
        return f"{heading}There are {len(budgets)} budgets: it takes three.\n"
    smaller = isoflop(rows, budgets=budgets[:-1], nearest=_NEAREST)
    if len(smaller.interior) < 2:
        return f"{heading}The smaller budgets have fewer than two interior minima.\n"
    top = budgets[-1]
    size, loss = (float(smaller.growth(of)(top)) for of in ("N", "loss"))
    law = fitted(rows.take(rows["C"] < 0.75 * top), None)
    said = [("power laws through the smaller minima", size, loss)]
    if isinstance(law, Study):
        best = compute_optimal(law.law, top)
        said.append(("law fitted to the smaller budgets", best.N, best.loss))
    measured = isoflop(rows, budgets=(top,), nearest=_NEAREST).minima[0]
    cells = [
        (how, f"{n:,.0f}", f"{value:.4f}", f"{n / measured.N:.2f}",
         f"{100 * (measured.loss / value - 1):+.2f} %")
        for how, n, value in said
    ]  # fmt: skip
    return (
        f"{heading}At {top:g} FLOPs:\n\n"
        + table(("from", "N*", "L*", "N* over measured", "measured over predicted L*"), cells)
        + f"\nMeasured: N* {measured.N:,.0f}, L* {measured.loss:.4f} "
        f"({measured.problem or 'interior'}).\n"
    )


def _compared(studies: Mapping[str, Study], everything: Rows, reference: str) -> str:
    """Which letters of the law differ between families, and effective size by the reference."""
    kept = admissible(
        everything, min_tokens=MIN_TOKENS, min_tokens_per_parameter=MIN_TOKENS_PER_PARAMETER
    )
    kept = kept.take(np.isin(kept["family"], list(studies)))
    text = "## Families compared\n\n"
    text += comparison_markdown(compare_families(kept, reference=reference), draws=DRAWS)
    if reference not in studies:
        return text
    ruler = studies[reference]
    placed = {
        family: place(ruler.draws, s.rows, loss_error=s.fit.rmse) for family, s in studies.items()
    }
    return f"{text}\n## Effective size\n\n{effective_size_markdown(placed, reference)}"
