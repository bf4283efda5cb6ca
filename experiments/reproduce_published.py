"""Which published scaling laws come out again? One table, a verdict a number.

    python experiments/reproduce_published.py                    # make reproduce, a minute or two
    python experiments/reproduce_published.py --routing-data curves.csv.gz

Everything is computed from the tables in experiments/data; every "ours" is fitted or evaluated
here, and the verdict follows from the tolerance in its row. `--routing-data` takes the whole file
of google-deepmind/scaling_laws_for_routing (data/curves.csv.gz), whose 1.3 B models do not ship.

Expected: Besiroglu's fit of Chinchilla's figure 4, variable projection, the data-constrained law as
a formula, Gadre's three corpora, Kaplan from Chinchilla, the inference-aware optimum, the bias of
isoFLOP parabolas and the OLMo ladder are reproduced. Not reproduced, with the reason in the row:
R_D and R_N of repeated tokens (flat; not all points ship), Clark's printed coefficients (three
decimals) and the decay constants of the multi-power law (a curve does not ship).
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from published_fits import besiroglu, clark, data_constrained, gadre
from published_predictions import (
    isoflop_bias,
    kaplan_to_chinchilla,
    multi_power,
    olmo_ladder,
    sardana,
)
from reproduction_table import console, markdown, plot, print_table, summary, write_jsonl

from slm_jax import cli
from slm_jax.errors import UserError


@dataclass(frozen=True)
class ReproducePublished:
    """Fits and evaluates published scaling laws again and compares."""

    draws: int = 100
    """Bootstrap draws of an interval."""
    routing_data: Path | None = None
    """The whole curves.csv.gz of google-deepmind/scaling_laws_for_routing."""
    out: Path = Path("runs/reproduce_published")
    """Folder of report.md, report.png and report.jsonl."""

    def __post_init__(self) -> None:
        if self.draws < 20:
            raise UserError(f"draws={self.draws}: an interval needs at least 20")
        if self.routing_data is not None and not self.routing_data.is_file():
            raise UserError(f"routing_data={str(self.routing_data)!r} is not a file: download it")


def main(config: ReproducePublished) -> None:
    """Computes all rows, prints the table and writes the report."""
    screen = console()
    began = time.perf_counter()
    ladder_draws = max(20, config.draws * 2 // 5)
    checks = []
    for part in (
        lambda: besiroglu(config.draws),
        lambda: data_constrained(config.draws),
        gadre,
        lambda: clark(config.draws, config.routing_data),
        kaplan_to_chinchilla,
        sardana,
        isoflop_bias,
        # A refit of 16 ill-conditioned points takes as long as one of 240: fewer draws.
        lambda: olmo_ladder(ladder_draws),
        multi_power,
    ):
        checks += part()
    seconds = time.perf_counter() - began
    title = "Published scaling laws, computed again"
    print_table(checks, title, screen)
    notes = [
        f"{summary(checks)}; {seconds:.0f} s.",
        f"Intervals: 90 %, bootstrap of {config.draws} draws over runs (points for Chinchilla and "
        f"routing; {ladder_draws} draws for the ladder), profile likelihood for Gadre's five runs; "
        "of a ladder's accuracy, that of its task loss.",
        "'At most' rows compare with a bound. 'In interval' rows ask whether the published number "
        "lies in our interval.",
    ]
    for note in notes:
        screen.print(note, highlight=False)
    config.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(config.out / "report.jsonl", checks)
    plot(config.out / "report.png", checks, title)
    text = f"# {title}\n\n`python experiments/reproduce_published.py`\n\n{markdown(checks)}\n"
    text += "".join(f"- {note}\n" for note in notes) + "\n![deviations](report.png)\n"
    (config.out / "report.md").write_text(text)
    screen.print(f"report.md, report.png and report.jsonl are in {config.out}", highlight=False)


if __name__ == "__main__":
    sys.exit(cli.run(main, ReproducePublished, description=__doc__))
