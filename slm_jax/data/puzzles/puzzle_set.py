"""What all puzzles share: a set of token grids, its batches, a split that does not leak.

A batch is a dict of `inputs` int32 [B, L], `labels` int32 [B, L] (0 = cell not scored) and
`puzzle_ids` int32 [B] (0 = none), L = height * width in rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from slm_jax.data.pipeline import check_rows
from slm_jax.data.puzzles.words import mix, permutations, words
from slm_jax.errors import UserError

Batch = dict[str, np.ndarray]


class Augmentation(Protocol):
    """A random symmetry of a kind of puzzle, for many rows at once."""

    @property
    def n_words(self) -> int:
        """Random words that a row needs."""
        ...

    def __call__(self, batch: Batch, words: np.ndarray) -> Batch:
        """Applies to each row of `batch` the symmetry that its words uint64 [B, n_words] pick."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)  # arrays: equal means the same object
class PuzzleSet:
    """Puzzles with their solutions.

    Attributes:
      inputs: integer [N, L] tokens; loaders keep uint8 (ARC has 400,000 rows of 900), batches are
        int32.
      labels: integer [N, L] tokens; 0 = cell not scored.
      puzzle_ids: int32 [N]; 0 = none.
      vocab_size: tokens are in [0, vocab_size); 0 is padding.
      height: rows of a grid.
      width: columns of a grid; L = height * width.
      n_puzzle_ids: puzzle ids are in [0, n_puzzle_ids).
      name: for messages and logs.
      augmentation: the symmetries of this kind of puzzle, or None.
    """

    inputs: np.ndarray
    labels: np.ndarray
    puzzle_ids: np.ndarray
    vocab_size: int
    height: int
    width: int
    n_puzzle_ids: int
    name: str
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        shape = (len(self.inputs), self.height * self.width)
        for name, array, want in (
            ("inputs", self.inputs, shape),
            ("labels", self.labels, shape),
            ("puzzle_ids", self.puzzle_ids, shape[:1]),
        ):
            limit = self.n_puzzle_ids if name == "puzzle_ids" else self.vocab_size
            if array.shape != want:
                raise UserError(f"{name}.shape={array.shape} of {self.name}: must be {want}")
            if array.size and (array.min() < 0 or array.max() >= limit):
                raise UserError(f"{name} of {self.name} is not in [0, {limit}): check the tokens")

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: np.ndarray | slice) -> PuzzleSet:
        """The set of these rows only (indices, a mask or a slice), in this order."""
        return dataclasses.replace(
            self,
            inputs=self.inputs[rows],
            labels=self.labels[rows],
            puzzle_ids=self.puzzle_ids[rows],
        )

    def batch(self, rows: np.ndarray | slice) -> Batch:
        """These rows as a batch, not augmented."""
        return {
            "inputs": self.inputs[rows].astype(np.int32),
            "labels": self.labels[rows].astype(np.int32),
            "puzzle_ids": self.puzzle_ids[rows].astype(np.int32),
        }


def puzzle_batches(
    train: PuzzleSet,
    *,
    batch_size: int,
    seed: int,
    augment: bool,
    rows: np.ndarray | None = None,
) -> PuzzleBatches:
    """Endless shuffled training batches.

    An epoch is every puzzle once, in an order of its own, each in one variant drawn anew, as in
    TinyRecursiveModels. Row r of step s is a pure function of
    (seed, s, r), so the number of processes does not change the global batch and a run resumes at
    any step.

    Args:
      train: what to draw from.
      batch_size: rows of the global batch.
      seed: decides orders and variants.
      augment: apply `train.augmentation`.
      rows: int [n], the rows of each global batch to read, for a process that needs no others
        (`parallel.local_rows`); all by default.

    Returns:
      Iterator over batches of n rows. Its `get_state()` is JSON,
      `{"next_index": step}`, the same on every process; `set_state` goes to any step.

    Raises:
      UserError: an empty set, batch_size below 1, a row that is not in the batch, augment without
        an augmentation.
    """
    rows = check_rows(batch_size, rows)
    if not len(train):
        raise UserError(f"train={train.name!r} has no puzzles: give at least one")
    if augment and train.augmentation is None:
        raise UserError(f"augment=True: {train.name!r} has no augmentation: set augment=False")
    return PuzzleBatches(train, batch_size, seed, train.augmentation if augment else None, rows)


class PuzzleBatches:
    """The iterator of `puzzle_batches`."""

    def __init__(
        self,
        train: PuzzleSet,
        batch_size: int,
        seed: int,
        augmentation: Augmentation | None,
        rows: np.ndarray,
    ):
        self._train = train
        self._batch_size = batch_size
        self._seed = seed
        self._augmentation = augmentation
        self._rows = rows  # of the global batch, those of this process
        self._step = 0

    def __iter__(self) -> PuzzleBatches:
        return self

    def __next__(self) -> Batch:
        index = self._step * self._batch_size + self._rows
        epochs, positions = np.divmod(index, len(self._train))
        rows = np.empty_like(index)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            rows[mine] = _epoch_order(self._seed, int(epoch), len(self._train))[positions[mine]]
        batch = self._train.batch(rows)
        if self._augmentation is not None:
            # The constant keeps these words apart from those of `_epoch_order`.
            key = (self._seed, 1, self._step, self._rows)
            batch = self._augmentation(batch, words(*key, n_words=self._augmentation.n_words))
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """JSON position, `{"next_index": step}`, the same on every process."""
        return {"next_index": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to any step, on any number of processes."""
        self._step = int(state["next_index"])


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    order = permutations(words(seed, 0, epoch, np.arange(n), n_words=1)[:, 0])
    order.flags.writeable = False  # shared by every caller
    return order


@dataclasses.dataclass(frozen=True)
class OrderedBatches:
    """One pass over a set in order, for evaluation; can be iterated again.

    The last batch is padded with rows of zeros: no label, puzzle id 0.

    Attributes:
      puzzles: what to read.
      batch_size: rows a batch.
    """

    puzzles: PuzzleSet
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: choose at least 1")

    def __len__(self) -> int:
        return -(-len(self.puzzles) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for i in range(0, len(self.puzzles), self.batch_size):
            batch = self.puzzles.batch(slice(i, i + self.batch_size))
            missing = self.batch_size - len(batch["inputs"])
            yield {
                name: np.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1)))
                for name, array in batch.items()
            }


def split_by_class(
    puzzles: PuzzleSet, classes: np.ndarray, n_test: int, *, seed: int
) -> tuple[PuzzleSet, PuzzleSet]:
    """Splits so that no class has puzzles on both sides.

    Whole classes, in an order that `seed` decides, go to the test side until it has `n_test`
    puzzles. What these classes have beyond `n_test` goes to neither side.

    Args:
      puzzles: what to split.
      classes: uint64 [N], equal for puzzles that an augmentation can turn into each other
        (`sudoku_classes`, `maze_classes`).
      n_test: puzzles of the test set.
      seed: decides which classes are tested.

    Returns:
      (train, test), each in the order of `puzzles`.

    Raises:
      UserError: n_test not in [1, N), or too few classes to leave any for training.
    """
    if not 1 <= n_test < len(puzzles):
        raise UserError(f"n_test={n_test} is not in [1, {len(puzzles)}), the size of the set")
    keys = mix(classes ^ words(seed, 2, n_words=1)[0])
    order = np.argsort(keys, kind="stable")  # equal classes side by side
    last = keys[order[n_test - 1]]
    test = np.sort(order[:n_test])
    train = np.sort(order[keys[order] > last])
    if not len(train):
        raise UserError(
            f"n_test={n_test}: {puzzles.name} has {len(np.unique(classes))} classes of equivalent "
            "puzzles, too few to keep some for training: choose fewer test puzzles or a larger grid"
        )
    return puzzles.take(train), puzzles.take(test)
