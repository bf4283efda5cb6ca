"""What an evaluation found, for programs (JSON) and for people (Markdown)."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slm_jax.evaluate.perplexity import TextScore
from slm_jax.evaluate.questions import TaskScore
from slm_jax.models.files import whole_file

JSON, MARKDOWN = "evaluation.json", "evaluation.md"


def write_report(
    folder: Path,
    *,
    about: Mapping[str, Any],
    texts: Mapping[str, TextScore],
    tasks: Mapping[str, TaskScore],
) -> None:
    """Writes evaluation.json and evaluation.md, in place of those of an earlier evaluation.

    Args:
        folder: where to; made with its parents.
        about: JSON: the model, and how it was asked.
        texts: scores by name of the text.
        tasks: scores by name of the file.
    """
    found = {
        "about": dict(about),
        "texts": {name: asdict(score) for name, score in texts.items()},
        "tasks": {name: asdict(score) for name, score in tasks.items()},
    }
    for name, content in (
        (JSON, json.dumps(found, indent=1) + "\n"),
        (MARKDOWN, markdown(about, texts, tasks)),
    ):
        with whole_file(folder / name) as file:
            file.write(content.encode("utf-8"))


def markdown(
    about: Mapping[str, Any], texts: Mapping[str, TextScore], tasks: Mapping[str, TaskScore]
) -> str:
    """The tables of a report."""
    lines = ["# Evaluation", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    if texts:
        lines += ["", "| text | nats/token | perplexity | bits/byte | tokens | window | stride |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for name, s in texts.items():
            lines.append(
                f"| {name} | {s.nats:.4f} | {s.perplexity:.3f} | {s.bits_per_byte:.4f} | "
                f"{s.tokens:,} | {s.window} | {s.stride} |"
            )
    if tasks:
        lines += ["", "| task | metric | value | questions |", "| --- | --- | --- | --- |"]
        for name, task in tasks.items():
            for metric, value in task.metrics.items():
                lines.append(
                    f"| {name} | {metric} | {value:.4f}{_margin(task, metric)} | {task.questions} |"
                )
    for name, task in tasks.items():
        if task.groups:
            metrics = list(task.metrics)
            lines += [
                "",
                f"| {name} | {' | '.join(metrics)} |",
                "| --- " * (len(metrics) + 1) + "|",
            ]
            for group, values in task.groups.items():
                shown = " | ".join(f"{values[m]:.4f}" for m in metrics)
                lines.append(f"| {group} | {shown} |")
    return "\n".join(lines) + "\n"


def _margin(task: TaskScore, metric: str) -> str:
    return f" ± {task.stderr[metric]:.4f}" if metric in task.stderr else ""
