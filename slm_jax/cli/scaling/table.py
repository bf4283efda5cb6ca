"""What the commands that read a table of runs share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.markdown import Markdown

from slm_jax.cli.show import console
from slm_jax.errors import UserError
from slm_jax.scaling.design import Finding, check_design, require_design
from slm_jax.scaling.rows import Rows, admissible, read_csv


@dataclass(frozen=True)
class Table:
    """A table of runs, and which of them count."""

    rows: Annotated[Path, tyro.conf.Positional]
    """CSV file (.csv or .csv.gz) with a heading."""
    columns: tuple[str, ...] = ()
    """OURS=THEIRS for columns that have another name, such as N=params."""
    size: Literal["parameters", "flops"] = "parameters"
    """What N is in a law: the column, or C / (6 D), which counts attention and head."""
    min_tokens: float = 0.0
    """Runs of fewer tokens are left out: the early transient is no power law."""
    min_tokens_per_parameter: float = 0.0
    """Runs of a smaller D / N are left out."""
    draws: int = 400
    """Bootstrap draws behind the intervals."""
    seed: int = 0
    """Of the bootstrap."""

    def read(self, *, needed: Sequence[str] = (), label: str | None = None) -> Rows:
        """The rows that count.

        Args:
            needed: columns that a law reads besides N, D, C and loss.
            label: a further column of text.

        Raises:
            UserError: as `read_csv`; or if no row is left.
        """
        names = {}
        for pair in self.columns:
            ours, equals, theirs = pair.partition("=")
            if not (ours and equals and theirs):
                raise UserError(f"columns={pair!r} is not OURS=THEIRS, such as N=params")
            names[ours] = theirs
        names |= {name: name for name in needed if name not in (*names, "N", "D", "C", "loss")}
        labels = ("run", "family", *([label] if label else []))
        rows = read_csv(self.rows, names, labels=labels)
        if self.size == "flops":
            rows = rows.with_columns(N=rows["C"] / (6 * rows["D"]))
        kept = admissible(
            rows,
            min_tokens=self.min_tokens,
            min_tokens_per_parameter=self.min_tokens_per_parameter,
        )
        if not len(kept):
            raise UserError(
                f"min_tokens={self.min_tokens:g}, min_tokens_per_parameter="
                f"{self.min_tokens_per_parameter:g}: none of {len(rows)} rows is left: lower them"
            )
        return kept


def check(rows: Rows) -> None:
    """Prints the doubts about a design.

    Raises:
        UserError: if it cannot carry a law of N and D.
    """
    findings = check_design(rows)
    require_design(findings)
    print_findings(findings)


def print_findings(findings: Sequence[Finding]) -> None:
    """One line each."""
    for finding in findings:
        console().print(f"{finding.severity}: {finding.text}", highlight=False, style="yellow")


def print_markdown(text: str) -> None:
    """Markdown with its tables drawn."""
    console().print(Markdown(text))


def spread(draws: np.ndarray) -> str:
    """The middle 90 % of bootstrap draws; infinite ones are "unreachable"."""
    low, high = np.quantile(draws, [0.05, 0.95], method="nearest")
    out = float(np.mean(np.isinf(draws)))
    return f"{low:.5g} to {high:.5g}" + (f" (unreachable in {100 * out:.0f} %)" if out else "")
