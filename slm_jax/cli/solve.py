"""`slm solve`: gives a trained recursive reasoner a puzzle and shows its answer step by step."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from slm_jax.cli.puzzle import Puzzle, read_puzzle
from slm_jax.cli.script import parse
from slm_jax.cli.show import console
from slm_jax.errors import UserError
from slm_jax.models.trm import TRM, empty_latents
from slm_jax.train.trm_experiment import load_experiment, load_model

_PAUSE = 0.3  # seconds a step stays on a terminal: the model is faster than the eye


@dataclass(frozen=True)
class Solve:
    """Solves a Sudoku or a maze with a trained run and shows the grid after every step.

    Clues are bold, cells that changed in the step yellow, cells that break a rule underlined. The
    model may change clues: then they break a rule.
    """

    run: tyro.conf.Positional[Path]
    """Folder of a run on Sudokus or mazes."""
    puzzle: str
    """The puzzle, a file with it, or - to read it from stdin. A Sudoku is its cells row by row, `.`
    or 0 = empty; a maze its rows of `#` wall, space, S and G, one a line."""
    steps: int | None = None
    """Supervision steps; default as in training, and it may be more."""
    ema: bool = True
    """Use the average of the weights, if the run keeps one."""
    halt: bool = False
    """Stop when the model says that it is done: at a positive halting logit."""
    show_solution: bool = False
    """Also print the true solution, at the end."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps={self.steps} must be at least 1")


class Step(NamedTuple):
    """What the model says after a supervision step.

    Attributes:
        tokens: `[seq_len]` int32.
        halt: logit of the answer being right.
    """

    tokens: np.ndarray
    halt: float


def command(args: Sequence[str]) -> None:
    """Loads the model, and prints the puzzle and every step of the answer."""
    config = parse(Solve, args=args, prog="slm solve")
    trained = load_experiment(config.run)
    puzzle = read_puzzle(config.puzzle, trained, config.run)
    ema = config.ema and trained.ema_decay is not None
    model, _ = load_model(config.run, ema=ema)
    n_steps = config.steps or trained.objective.n_supervision
    weights = "averaged" if ema else "raw"
    screen = console()
    screen.print(f"{config.run}, {weights} weights", highlight=False, markup=False)
    _show(screen, puzzle, _frames(puzzle, model, n_steps, config.halt))
    if config.show_solution:
        screen.print(_draw(puzzle, puzzle.solution, "solution"))


def refined(model: TRM, tokens: np.ndarray) -> Iterator[Step]:
    """What the model says about a puzzle, `[seq_len]` tokens, after 1, 2, ... supervision steps."""
    inputs, ids = jnp.asarray(tokens, jnp.int32)[None], jnp.zeros(1, jnp.int32)
    latents = model.start(jnp.ones(1, bool), empty_latents(model.config, 1))
    step = jax.jit(TRM.__call__)
    while True:
        latents, logits, halt = step(model, inputs, ids, latents)
        answer = jnp.argmax(logits[0], axis=-1).astype(jnp.int32)
        yield Step(np.asarray(answer), float(halt[0, 0]))


class Frame(NamedTuple):
    """What is shown of an answer, `[height, width]` tokens, after so many steps."""

    step: int
    tokens: np.ndarray
    drawing: Group


def _frames(puzzle: Puzzle, model: TRM, n_steps: int, halt: bool) -> Iterator[Frame]:
    """The answer after every step, to the last or until the model says that it is done."""
    shown = puzzle.tokens
    for k, step in enumerate(refined(model, puzzle.tokens.ravel()), 1):
        answer = step.tokens.reshape(shown.shape)
        probability = 0.5 * (1 + np.tanh(0.5 * step.halt))  # sigmoid, no overflow
        title = (
            f"step {k} of {n_steps}: halting probability {probability:.1%}, changed: "
            f"{(answer != shown).sum()}, breaking a rule: {puzzle.broken(answer).sum()}"
        )
        yield Frame(k, answer, _draw(puzzle, answer, title, changed=answer != shown))
        shown = answer
        if k == n_steps or (halt and step.halt > 0):
            return


def _show(screen: Console, puzzle: Puzzle, frames: Iterator[Frame]) -> None:
    """Draws the puzzle and every step: over the one before on a terminal, below it elsewhere."""
    first = _draw(puzzle, puzzle.tokens, f"puzzle: {puzzle.given.sum()} cells given")
    frame = start = Frame(0, puzzle.tokens, first)
    moving = screen.is_terminal and not screen.is_dumb_terminal
    live = Live(console=screen, auto_refresh=False) if moving else None
    with live or contextlib.nullcontext():
        for frame in itertools.chain([start], frames):
            if live:
                live.update(frame.drawing, refresh=True)
                time.sleep(_PAUSE)
            else:
                screen.print(frame.drawing)
    fault = puzzle.fault(frame.tokens)
    steps = f"{frame.step} step{'s' * (frame.step > 1)}"
    end = f"solved after {steps}" if fault is None else f"not solved after {steps}: {fault}"
    screen.print(end, highlight=False)


def _draw(
    puzzle: Puzzle, tokens: np.ndarray, title: str, *, changed: np.ndarray | None = None
) -> Group:
    """A grid under its title; with `changed`, that and what breaks a rule is marked."""
    broken = np.zeros(tokens.shape, bool) if changed is None else puzzle.broken(tokens)
    marks = {"bold": puzzle.given, "yellow": changed, "underline": broken}
    text = Text(no_wrap=True, overflow="ignore")
    height, width = puzzle.box or tokens.shape
    for r, row in enumerate(tokens.tolist()):
        if r and r % height == 0:
            rule = "-" * (2 * width - 1)
            text.append("-+-".join([rule] * (tokens.shape[1] // width)) + "\n")
        for c, token in enumerate(row):
            if c and puzzle.box:
                text.append(" " if c % width else " | ")
            styles = [name for name, where in marks.items() if where is not None and where[r, c]]
            text.append(puzzle.characters[token], " ".join(styles) or None)
        text.append("\n")
    return Group(Text(title), text)
