"""Numbers and tables for people."""

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

# Wide enough for every table: without a terminal there is nothing to fit.
_FILE_WIDTH = 140


def console() -> Console:
    """Prints to stdout; into a file or pipe, in full width."""
    return Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)


def count(n: float) -> str:
    """Three digits and a decimal prefix: `1.24 G`."""
    return _scaled(n, 1000.0, ("", " k", " M", " G", " T", " P", " E"))


def nbytes(n: float) -> str:
    """Three digits and a binary prefix: `1.24 MiB`."""
    return _scaled(n, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(n: float, base: float, units: tuple[str, ...]) -> str:
    unit = 0
    while unit + 1 < len(units) and abs(n) >= 999.5:
        n, unit = n / base, unit + 1
    if n == int(n) and unit == 0:
        return f"{int(n)}{units[0]}"
    return f"{n:.{max(0, 2 - (abs(n) >= 9.995) - (abs(n) >= 99.95))}f}{units[unit]}"


def facts(rows: Mapping[str, str]) -> Table:
    """Names and values below each other."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(f"[bold]{name}", value)
    return table
