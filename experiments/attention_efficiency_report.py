"""What `attention_efficiency` leaves behind: tables, report.md, report.png and report.jsonl."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from comparison import show_tables
from rich.console import Console

from slm_jax.cli.show import count, nbytes


@dataclass(frozen=True)
class Sizes:
    """What a model has.

    Attributes:
        arm: its mixer.
        parameters: of all layers and the embedding.
        d_ff: width of its MLPs.
        per_token: bytes that one more token adds to the state of a row, while no window is full.
        constant: bytes of a row's state whatever its length.
    """

    arm: str
    parameters: int
    d_ff: int
    per_token: int
    constant: int


@dataclass(frozen=True)
class MeasuredCell:
    """A model timed here.

    Attributes:
        arm: its mixer.
        phase: decode or prefill.
        context: tokens of the prompt, or before the step.
        batch: rows.
        cache: bytes of the caches behind it, counted.
        data: what `attention_efficiency_cells.median_of` says.
    """

    arm: str
    phase: str
    context: int
    batch: int
    cache: int
    data: Mapping[str, float]

    @property
    def speed(self) -> float:
        """Tokens a second."""
        tokens = self.context if self.phase == "prefill" else 1
        return self.batch * tokens / self.data["seconds"]


@dataclass(frozen=True)
class CompiledCell:
    """A program of generation compiled for a slice.

    Attributes:
        arm: the mixer.
        context: tokens.
        batch: rows.
        cache: bytes of the caches of all devices, counted.
        data: what `attention_efficiency_cells.compiled` says.
    """

    arm: str
    context: int
    batch: int
    cache: int
    data: Mapping[str, Any]

    @property
    def bound(self) -> tuple[str, float]:
        """What bounds a run of the program, and its least seconds."""
        bounds: Mapping[str, float] = self.data["bounds"]
        name = max(bounds, key=lambda n: bounds[n])
        return name, bounds[name]

    @property
    def tokens(self) -> int:
        """That one run of the program reads."""
        return self.batch * (self.context if self.data["phase"] == "prefill" else 1)


def in_words(measured: Sequence[MeasuredCell], found: Sequence[CompiledCell]) -> list[str]:
    """What was found, a sentence for what was measured and one a slice, made of the numbers."""
    by = {(c.arm, c.context): c for c in measured if c.phase == "decode"}
    (first, last), arms = _ends(by), list(dict.fromkeys(arm for arm, _ in by))
    kept = ", ".join(f"{a} {100 * by[a, last].speed / by[a, first].speed:.3g}" for a in arms)
    ratios = ", ".join(
        f"{a} {by[a, last].speed / by['mha', last].speed:.3g} times ({_share(by, a, last)} of "
        "its cache)"
        for a in arms
        if a != "mha"
    )
    out = [
        f"Measured here, from {first:,} to {last:,} tokens of context decode keeps {kept} % of "
        f"its tokens/s; at {last:,} it is, against mha, {ratios}."
    ]
    for on in dict.fromkeys(c.data["on"] for c in found):
        of = {
            c.arm: c
            for c in found
            if c.data["on"] == on and c.data["phase"] == "decode" and "bounds" in c.data
        }  # of each arm the longest context
        if "mha" not in of:
            continue
        mha = of["mha"]
        others = ", ".join(
            f"{a} {mha.bound[1] / c.bound[1]:.2f} times"
            for a, c in of.items()
            if a != "mha" and c.context == mha.context
        )
        text = (
            f"Compiled for {on}, the large model reads for a token behind {mha.context:,} at least "
            f"{mha.data['bytes'] / 1e9:.1f} GB a device with mha, "
            f"{mha.data['state'] / mha.data['bytes']:.0%} of it cache, "
            f"{mha.bound[1] * 1e3:.1f} ms; the least times of the others are shorter: {others}"
        )
        estimated = [c.data["estimate"] / c.bound[1] for c in of.values() if c.data["estimate"]]
        if estimated:
            text += (
                f"; XLA expects its own programs to take {min(estimated):.1f} to "
                f"{max(estimated):.1f} times the least"
            )
        out.append(text + ".")
    return out


def _ends(by: Mapping[tuple[str, int], MeasuredCell]) -> tuple[int, int]:
    contexts = [context for _, context in by]
    return min(contexts), max(contexts)


def _share(by: Mapping[tuple[str, int], MeasuredCell], arm: str, context: int) -> str:
    return f"{by[arm, context].cache / by['mha', context].cache:.2g}"


def write_report(
    out: Path,
    measured: Sequence[MeasuredCell],
    found: Sequence[CompiledCell],
    *,
    small: Sequence[Sizes],
    large: Sequence[Sizes],
    cores: int,
    console: Console,
    command: str,
) -> None:
    """Prints the tables and writes report.md, report.png and report.jsonl to `out`.

    Args:
        out: folder.
        measured: arms timed here, shortest context first.
        found: programs compiled.
        small: the models that were timed.
        large: the models that were compiled.
        cores: that this process may use.
        console: where the tables are printed.
        command: what makes this report again.
    """
    rounds = round(measured[0].data["rounds"])
    spread = max(c.data["range"] for c in measured)
    decoded, read = ([c for c in measured if c.phase == p] for p in ("decode", "prefill"))
    tables = [
        ("Models (counted)", *_size_table(small, large)),
        ("Decode here, tokens/s (measured)", *_grid(decoded, lambda c: f"{c.speed:,.1f}")),
        ("Prefill here, tokens/s (measured)", *_grid(read, lambda c: f"{c.speed:,.0f}")),
        ("Cache here (counted)", *_grid(decoded, lambda c: nbytes(c.cache))),
    ]
    for on in dict.fromkeys(c.data["on"] for c in found):
        for phase in ("decode", "prefill"):
            if of := [c for c in found if (c.data["on"], c.data["phase"]) == (on, phase)]:
                title = f"Large model, {phase} on {on} (counted, compiled)"
                tables.append((title, *_compiled_table(of)))
    notes = [
        f"Measured: {rounds} rounds, the mixers in turn, on {_cores(cores)} that other work may "
        "share; medians of the rounds, of a round its fastest decode step. The slowest and the "
        f"fastest round of a cell lie up to {spread:.0%} of the median apart, half of the cells at "
        f"most {median(c.data['range'] for c in measured):.0%}.",
        "Counted: parameters, bytes of caches (positions of slots left out), bytes that a program "
        "must read or leave behind (weights and caches, once), operations (causal). A least time "
        "is the larger of bytes over bandwidth and operations over peak, of one device.",
        "The compiler's: memory (arguments, results, temporaries, program) and, on TPUs, the "
        "estimate: simulated cycles of XLA's operations plus Pallas kernels at their own roofline, "
        "collectives left out. GPUs are simulated by nothing: there is no estimate. Nothing has "
        "run there.",
        "Prefill is compiled as one program over the whole prompt; here it goes in chunks.",
    ]
    said = in_words(measured, found)
    out.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "model", "at": "here", **asdict(s)} for s in small]
    lines += [{"kind": "model", "at": "large", **asdict(s)} for s in large]
    lines += [{"kind": "measured", "speed": c.speed, **asdict(c)} for c in measured]
    lines += [{"kind": "compiled", **asdict(c)} for c in found]
    (out / "report.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _plot(out / "report.png", measured, found)
    text = show_tables(console, tables)
    for sentence in said:
        console.print(sentence, highlight=False)
    (out / "report.md").write_text(
        "# What a mixer costs when text is generated\n\n"
        + "".join(f"{line}\n\n" for line in [*said, *notes])
        + f"![tokens/s, caches and least times](report.png)\n{text}\n`{command}`\n"
    )
    console.print(f"report: {out / 'report.md'}", highlight=False)


def _cores(n: int) -> str:
    return "one CPU core" if n == 1 else f"{n} CPU cores"


def _size_table(
    small: Sequence[Sizes], large: Sequence[Sizes]
) -> tuple[list[str], list[list[str]]]:
    heads = ["mixer"]
    for where in ("here", "large"):
        heads += [f"{where}: parameters", "MLP width", "bytes a token", "bytes of a row"]
    return heads, [
        [s.arm, *(text for of in (s, big) for text in _size_row(of))]
        for s, big in zip(small, large, strict=True)
    ]


def _size_row(of: Sizes) -> list[str]:
    return [
        count(of.parameters),
        f"{of.d_ff:,}",
        nbytes(of.per_token) if of.per_token else "0",
        nbytes(of.constant) if of.constant else "0",
    ]


def _grid(
    cells: Sequence[MeasuredCell], show: Callable[[MeasuredCell], str]
) -> tuple[list[str], list[list[str]]]:
    """A row an arm, a column a context."""
    contexts = list(dict.fromkeys(c.context for c in cells))
    rows = {arm: [arm] for arm in dict.fromkeys(c.arm for c in cells)}
    for c in cells:
        rows[c.arm].append(show(c))
    return ["mixer", *(f"{n:,}" for n in contexts)], list(rows.values())


def _compiled_table(cells: Sequence[CompiledCell]) -> tuple[list[str], list[list[str]]]:
    heads = ["mixer", "context", "cache, all devices", "bytes, a device", "operations", "least ms"]
    heads += ["by", "tokens/s at that", "estimate ms", "memory, a device"]
    rows = []
    for c in cells:
        row = [c.arm, f"{c.context:,}", nbytes(c.cache)]
        if "bounds" not in c.data:
            rows.append([*row, *[""] * 6, f"refused: {c.data['refusal'][:60]}"])
            continue
        name, seconds = c.bound
        estimate = c.data["estimate"]
        rows.append(
            [
                *row,
                nbytes(c.data["bytes"]),
                count(c.data["flops"]),
                f"{seconds * 1e3:,.2f}",
                name,
                f"{c.tokens / seconds:,.0f}",
                "" if estimate is None else f"{estimate * 1e3:,.2f}",
                nbytes(c.data["memory"]) + (", does not fit" if c.data["refusal"] else ""),
            ]
        )
    return heads, rows


def _plot(path: Path, measured: Sequence[MeasuredCell], found: Sequence[CompiledCell]) -> None:
    slices = list(dict.fromkeys(c.data["on"] for c in found))
    figure, axes = plt.subplots(
        1, 3 + len(slices), figsize=(4.2 * (3 + len(slices)), 4.2), constrained_layout=True
    )
    arms = list(dict.fromkeys(c.arm for c in measured))
    panels: list[tuple[str, str, Callable[[MeasuredCell], float]]] = [
        ("decode here, tokens/s", "decode", lambda c: c.speed),
        ("prefill here, tokens/s", "prefill", lambda c: c.speed),
        ("cache here, bytes", "decode", lambda c: c.cache),
    ]
    for ax, (title, phase, value) in zip(axes, panels, strict=False):
        for i, arm in enumerate(arms):
            of = [c for c in measured if (c.arm, c.phase) == (arm, phase)]
            ax.plot([c.context for c in of], [value(c) for c in of], "o-", color=f"C{i}", label=arm)
        ax.set(title=title, yscale="log")
    for ax, on in zip(axes[3:], slices, strict=True):
        for i, arm in enumerate(arms):
            of_arm = [
                c
                for c in found
                if (c.arm, c.data["on"], c.data["phase"]) == (arm, on, "decode")
                and "bounds" in c.data
            ]
            contexts = [c.context for c in of_arm]
            ax.plot(contexts, [c.bound[1] * 1e3 for c in of_arm], "o-", color=f"C{i}", label=arm)
            told = [c for c in of_arm if c.data["estimate"]]
            ax.plot(
                [c.context for c in told], [c.data["estimate"] * 1e3 for c in told], "x:",
                color=f"C{i}",
            )  # fmt: skip
        ax.set(title=f"{on}, least ms a token\n(x: XLA's estimate)", yscale="log")
    for ax in axes:
        ax.set(xscale="log", xlabel="tokens of context")
        ax.set_xscale("log", base=2)
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
