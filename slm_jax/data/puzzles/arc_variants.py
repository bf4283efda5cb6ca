"""Variants of ARC tasks, each with a puzzle id of its own, and the sets to train and test on.

A variant turns or mirrors all grids of a task (8 ways) and permutes its colours, black (0) fixed
(TinyRecursiveModels, dataset/build_arc_dataset.py, `aug` and `inverse_aug`). A
puzzle id stands for a variant, not for a task: the model learns one embedding for each.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from slm_jax.data.puzzles.arc import (
    N_COLOURS,
    SIDE,
    VOCAB_SIZE,
    ArcPair,
    ArcTask,
    decode_grid,
    encode_grid,
    without_tasks_of,
)
from slm_jax.data.puzzles.dihedral import INVERSE, dihedral
from slm_jax.data.puzzles.puzzle_set import Batch, PuzzleSet
from slm_jax.data.puzzles.words import below, permutations, words
from slm_jax.errors import UserError

_RETRIES = 5  # draws for each variant that is wanted, as in the reference


@dataclasses.dataclass(frozen=True)
class ArcVariants:
    """The table of puzzle ids. Id 0 is none; the first id of a task is the task itself.

    Attributes:
      names: task ids, in the order of their puzzle ids.
      first: int64 [n_tasks + 1]; task t has the ids first[t] to first[t + 1] - 1.
      symmetry: uint8 [n_puzzle_ids], number of the turn or mirror (`dihedral`).
      colours: uint8 [n_puzzle_ids, 10], image of each colour.
    """

    names: tuple[str, ...]
    first: np.ndarray
    symmetry: np.ndarray
    colours: np.ndarray

    @property
    def n_puzzle_ids(self) -> int:
        """How many embeddings a model needs, the one of id 0 included."""
        return len(self.symmetry)

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def ids(self, name: str) -> range:
        """Puzzle ids of a task, itself first."""
        if name not in self._index:
            raise UserError(f"task {name} has no puzzle ids: pass it to `arc_variants`")
        i = self._index[name]
        return range(int(self.first[i]), int(self.first[i + 1]))

    def task_of(self, puzzle_id: int) -> str:
        """The task of a puzzle id of at least 1."""
        return self.names[int(np.searchsorted(self.first, puzzle_id, side="right")) - 1]

    def apply(self, puzzle_id: int, grid: np.ndarray) -> np.ndarray:
        """The variant of a grid of the task: colours uint8 [h, w]."""
        return dihedral(self.colours[puzzle_id][grid], int(self.symmetry[puzzle_id]))

    def undo(self, puzzle_id: int, grid: np.ndarray) -> np.ndarray:
        """The grid of the task of which the variant is `grid`: colours uint8 [h, w]."""
        inverse = np.argsort(self.colours[puzzle_id]).astype(np.uint8)
        return inverse[dihedral(grid, INVERSE[self.symmetry[puzzle_id]])]


def arc_variants(tasks: Mapping[str, ArcTask], n_variants: int, *, seed: int) -> ArcVariants:
    """Draws up to `n_variants` different variants of each task, beside the task itself.

    Variants that give the same grids (a symmetric task, colours that do not occur) count once, so a
    task may have fewer. A task's variants are a pure function of (seed, its name, its grids).

    Args:
      tasks: all tasks for training and test.
      n_variants: 1000 in the publication.
      seed: of the draws.

    Raises:
      UserError: n_variants below 0.
    """
    if n_variants < 0:
        raise UserError(f"n_variants={n_variants}: choose at least 0")
    symmetry, colours = [np.zeros(1, np.uint8)], [np.arange(N_COLOURS, dtype=np.uint8)[None]]
    for name, task in tasks.items():
        which, maps = _draw(name, n_variants * _RETRIES, seed)
        kept = _different(task, which, maps, n_variants + 1)
        symmetry.append(which[kept])
        colours.append(maps[kept])
    first = np.cumsum([len(part) for part in symmetry])
    return ArcVariants(tuple(tasks), first, np.concatenate(symmetry), np.concatenate(colours))


def _draw(name: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The identity, then n random variants: symmetries uint8 [1 + n], colours [1 + n, 10]."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    random = words(seed ^ key, 6, np.arange(n), n_words=N_COLOURS)
    symmetry = np.pad(below(random[:, 0], 8), (1, 0))
    colours = np.pad(permutations(random[:, 1:]) + 1, ((0, 0), (1, 0)))
    colours = np.concatenate([np.arange(N_COLOURS)[None], colours])
    return symmetry.astype(np.uint8), colours.astype(np.uint8)


def _different(task: ArcTask, symmetry: np.ndarray, colours: np.ndarray, n: int) -> list[int]:
    """The first n variants with different grids, whatever the order of the examples."""
    pairs = [*task.train, *task.test]
    grids = [[pair.input] + ([] if pair.output is None else [pair.output]) for pair in pairs]
    ends = np.cumsum([sum(grid.size for grid in pair) for pair in grids]).tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    # The cells of all turned grids as one row, and the shapes of each pair.
    turned: list[tuple[np.ndarray, list[bytes]]] = []
    for which in range(8):
        views = [[dihedral(grid, which) for grid in pair] for pair in grids]
        cells = np.concatenate([view.ravel() for pair in views for view in pair])
        turned.append((cells, [bytes(s for view in pair for s in view.shape) for pair in views]))
    seen: set[bytes] = set()
    kept: list[int] = []
    for i in range(len(symmetry)):
        cells, shapes = turned[symmetry[i]]
        text = colours[i][cells].tobytes()
        parts = sorted(s + text[a:b] for s, (a, b) in zip(shapes, spans, strict=True))
        key = hashlib.blake2b(b"".join(parts), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            kept.append(i)
            if len(kept) == n:
                break
    return kept


@dataclasses.dataclass(frozen=True)
class ArcAugmentation:
    """One variant of each example, drawn uniformly from its task's, at a random place.

    With probability 1 / n, n examples in the task's training set, the grids are not translated:
    the model also has to see grids where the test puts them. (The reference draws once, writes all
    variants to disk and leaves one example of each untranslated; the shares are the same.)

    Takes batches of tasks as they are, i.e. with the first puzzle id of a task and the grids in the
    top left corner, as `arc_train_set` makes them.

    Attributes:
      variants: the table of ids.
      n_examples: int64 [n_tasks], examples of each task in the training set.
    """

    variants: ArcVariants
    n_examples: np.ndarray

    n_words = 4

    def __call__(self, batch: Batch, words: np.ndarray) -> Batch:
        """The variants, with their own puzzle ids."""
        table = self.variants
        tasks = np.searchsorted(table.first, batch["puzzle_ids"], side="right") - 1
        ids = table.first[tasks] + below(words[:, 0], np.diff(table.first)[tasks])
        moved = below(words[:, 1], self.n_examples[tasks]) > 0
        inputs, labels = np.empty_like(batch["inputs"]), np.empty_like(batch["labels"])
        for row, puzzle_id in enumerate(ids.tolist()):
            grids = [
                table.apply(puzzle_id, decode_grid(batch[name][row]))
                for name in ("inputs", "labels")
            ]
            room = SIDE + 1 - np.max([grid.shape for grid in grids], axis=0)
            place = below(words[row, 2:], room) * moved[row]
            inputs[row], labels[row] = (encode_grid(grid, *place.tolist()) for grid in grids)
        return {"inputs": inputs, "labels": labels, "puzzle_ids": ids.astype(np.int32)}


def arc_train_set(
    training: Mapping[str, ArcTask], evaluation: Mapping[str, ArcTask], variants: ArcVariants
) -> PuzzleSet:
    """All examples of the training tasks and the demonstrations of the evaluation tasks.

    The model has to learn a puzzle id for each evaluation task, so their demonstrations are trained
    on (arXiv 2510.04871); their tests are not. Use with `puzzle_batches(augment=True)`.

    Raises:
      UserError: a training task is an evaluation task or holds one of its tests.
    """
    clean = without_tasks_of(training, evaluation)
    shared = [name for name in training if name not in clean]
    if shared:
        raise UserError(
            f"training has {len(shared)} tasks of evaluation, e.g. {shared[0]}: remove them with "
            "`without_tasks_of`, or the test would be trained on"
        )
    rows: list[tuple[ArcPair, int]] = []
    for name, task in training.items():
        rows += [(pair, variants.ids(name)[0]) for pair in (*task.train, *task.test)]
    for name, task in evaluation.items():
        rows += [(pair, variants.ids(name)[0]) for pair in task.train]
    rows = [(pair, puzzle_id) for pair, puzzle_id in rows if pair.output is not None]
    ids = np.array([puzzle_id for _, puzzle_id in rows])
    counts = np.bincount(ids, minlength=variants.n_puzzle_ids)[variants.first[:-1]]
    augmentation = ArcAugmentation(variants, counts)
    return _set([pair for pair, _ in rows], ids, variants, "arc-train", augmentation)


def arc_test_set(
    evaluation: Mapping[str, ArcTask], variants: ArcVariants, *, max_variants: int | None = None
) -> PuzzleSet:
    """The test inputs of the evaluation tasks, each in all variants, not translated.

    Rows of a task are side by side. Labels are 0 where the output is not published.

    Args:
      evaluation: tasks whose tests are asked.
      variants: the table of ids that the model was trained with.
      max_variants: only so many of each task, itself first; None = all.

    Raises:
      UserError: max_variants below 1, a task that is not in the table.
    """
    if max_variants is not None and max_variants < 1:
        raise UserError(f"max_variants={max_variants}: choose at least 1")
    pairs: list[ArcPair] = []
    ids: list[int] = []
    for name, task in evaluation.items():
        for puzzle_id in variants.ids(name)[:max_variants]:
            for pair in task.test:
                output = None if pair.output is None else variants.apply(puzzle_id, pair.output)
                pairs.append(ArcPair(variants.apply(puzzle_id, pair.input), output))
                ids.append(puzzle_id)
    return _set(pairs, np.array(ids, np.int64), variants, "arc-test", None)


def _set(
    pairs: Sequence[ArcPair],
    ids: np.ndarray,
    variants: ArcVariants,
    name: str,
    augmentation: ArcAugmentation | None,
) -> PuzzleSet:
    inputs = np.zeros((len(pairs), SIDE * SIDE), np.uint8)
    labels = np.zeros_like(inputs)
    for row, pair in enumerate(pairs):
        inputs[row] = encode_grid(pair.input)
        if pair.output is not None:
            labels[row] = encode_grid(pair.output)
    return PuzzleSet(
        inputs=inputs,
        labels=labels,
        puzzle_ids=ids.astype(np.int32),
        vocab_size=VOCAB_SIZE,
        height=SIDE,
        width=SIDE,
        n_puzzle_ids=variants.n_puzzle_ids,
        name=name,
        augmentation=augmentation,
    )
