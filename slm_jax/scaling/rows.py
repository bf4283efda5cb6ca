"""Measured runs as a table: read, checked, filtered with reasons, and identified by a hash."""

import csv
import gzip
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.errors import UserError


@dataclass(frozen=True)
class Dropped:
    """Rows that were left out, and why.

    Attributes:
        reason: in words.
        rows: the values of each, for a report.
    """

    reason: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """A table of runs.

    Attributes:
        columns: float64 arrays of one length: `N` parameters, `D` training tokens, `C` FLOPs,
            `loss` nats a token, and whatever else a law reads.
        labels: string arrays of the same length: `run` (points of one run are not independent),
            `family`, `corpus`, ...
        dropped: what was left out on the way here.
    """

    columns: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()

    def __post_init__(self) -> None:
        columns = {k: np.asarray(v, np.float64) for k, v in self.columns.items()}
        labels = {k: np.asarray(v, str) for k, v in self.labels.items()}
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "labels", labels)
        lengths = {k: len(v) for k, v in (columns | labels).items()}
        if len(set(lengths.values())) != 1:
            raise UserError(f"columns={lengths} have different lengths: give one value a row")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __contains__(self, name: str) -> bool:
        return name in self.columns or name in self.labels

    def __getitem__(self, name: str) -> np.ndarray:
        """A column or label by name; `M`, tokens a parameter, is D / N where it is no column.

        Raises:
            UserError: if there is none of that name.
        """
        if name in self.columns:
            return self.columns[name]
        if name in self.labels:
            return self.labels[name]
        if name == "M" and {"N", "D"} <= set(self.columns):
            return self.columns["D"] / self.columns["N"]
        there = ", ".join([*self.columns, *self.labels])
        raise UserError(f"column={name!r} is not in the table: it has {there}")

    def take(self, index: Any) -> "Rows":
        """The rows of an index array or mask, repeats allowed; says nothing about the others."""
        return Rows(
            {k: v[index] for k, v in self.columns.items()},
            {k: v[index] for k, v in self.labels.items()},
            self.dropped,
        )

    def keep(self, mask: np.ndarray, reason: str) -> "Rows":
        """The rows where `mask` holds; the others are noted in `dropped` under `reason`."""
        mask = np.asarray(mask, bool)
        if mask.all():
            return self
        out = tuple(self.describe(int(i)) for i in np.flatnonzero(~mask))
        kept = self.take(mask)
        return Rows(kept.columns, kept.labels, (*self.dropped, Dropped(reason, out)))

    def describe(self, i: int) -> str:
        """One row in words."""
        named = [f"{k}={v[i]}" for k, v in self.labels.items() if k == "run"]
        return " ".join([*named, *(f"{k}={v[i]:.6g}" for k, v in self.columns.items())])

    def with_columns(self, **columns: Any) -> "Rows":
        """The table with columns added or replaced."""
        return Rows({**self.columns, **columns}, self.labels, self.dropped)

    def digest(self) -> str:
        """sha256 (hex) of names and values in their order."""
        total = hashlib.sha256()
        for name in sorted(self.columns):
            total.update(name.encode() + b"\0" + self.columns[name].tobytes())
        for name in sorted(self.labels):
            total.update(name.encode() + b"\0" + "\0".join(self.labels[name]).encode())
        return total.hexdigest()


def admissible(
    rows: Rows, *, min_tokens: float = 0.0, min_tokens_per_parameter: float = 0.0
) -> Rows:
    """Leaves out runs in their early transient, where power laws do not hold yet.

    Args:
        rows: with columns N and D.
        min_tokens: smallest D.
        min_tokens_per_parameter: smallest D / N.
    """
    rows = rows.keep(rows["D"] >= min_tokens, f"D < {min_tokens:g} tokens")
    ratio = rows["D"] / rows["N"]
    return rows.keep(
        ratio >= min_tokens_per_parameter, f"D/N < {min_tokens_per_parameter:g} tokens a parameter"
    )


def read_csv(
    path: Path,
    names: Mapping[str, str] | None = None,
    *,
    labels: Sequence[str] = ("run", "family", "corpus"),
) -> Rows:
    """Reads a table of runs (.csv or .csv.gz) and refuses what cannot be fitted.

    Args:
        path: the file; its first line names the columns.
        names: our name -> the file's name; default the same. Of N, D and C two are enough: the
            third follows from C = 6 N D.
        labels: columns that are read as text, where they exist; all others named are numbers.

    Returns:
        The table with (at least) N, D, C and loss, all positive and finite.

    Raises:
        UserError: if the file or a column is missing or a value is not a positive finite number;
            the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"path={str(path)!r} is not a file: check the path")
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise UserError(f"path={str(path)!r}: {error}: the file is damaged") from error
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")))
        records = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"path={str(path)!r} is not a CSV text file ({error})") from error
    there = list(reader.fieldnames or ())
    twice = sorted({name for name in there if there.count(name) > 1})
    if twice:
        raise UserError(f"columns={twice} stand twice in {path}: rename one of each")
    if not records:
        raise UserError(f"path={str(path)!r} has no rows below its heading")
    names = dict(names or {})
    wanted = {ours: names.get(ours, ours) for ours in ("N", "D", "C", "loss")} | names
    for ours, theirs in wanted.items():
        if theirs not in there and (ours in names or ours == "loss"):
            raise UserError(
                f"column={theirs!r} ({ours}) is not in {path}: it has {', '.join(there)}"
            )
    sizes = [ours for ours in ("N", "D", "C") if wanted[ours] in there]
    if len(sizes) < 2:
        raise UserError(
            f"columns={sizes} of {path}: a law needs two of N (parameters), D (tokens), C (FLOPs): "
            f"name them; the file has {', '.join(there)}"
        )

    def number(record: Mapping[str, Any], line: int, ours: str, theirs: str) -> float:
        text = record[theirs]
        try:
            value = float(text)
        except (TypeError, ValueError):
            raise UserError(f"{path}:{line}: {theirs}={text!r} is not a number: mend it") from None
        if not np.isfinite(value) or value <= 0:
            raise UserError(
                f"{path}:{line}: {theirs}={text} ({ours}) must be positive and finite: mend or "
                "remove the line"
            )
        return value

    texts = {o: t for o, t in ((label, names.get(label, label)) for label in labels) if t in there}
    numbers = {o: t for o, t in wanted.items() if t in there and o not in texts}
    columns = {
        ours: np.array([number(r, i, ours, theirs) for i, r in enumerate(records, 2)])
        for ours, theirs in numbers.items()
    }
    if "C" not in columns:
        columns["C"] = 6 * columns["N"] * columns["D"]
    elif "D" not in columns:
        columns["D"] = columns["C"] / (6 * columns["N"])
    elif "N" not in columns:
        columns["N"] = columns["C"] / (6 * columns["D"])
    return Rows(columns, {o: np.array([r[t] or "" for r in records]) for o, t in texts.items()})
