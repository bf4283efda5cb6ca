"""From predictions for all variants of an ARC task to two attempts and the official score.

TinyRecursiveModels, evaluators/arc.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slm_jax.data.puzzles.arc import ArcTask, decode_grid, grid_key
from slm_jax.data.puzzles.arc_variants import ArcVariants
from slm_jax.errors import UserError


class ArcVotes:
    """Collects predictions; each is one vote for a grid, once its variant is undone.

    Args:
      variants: the table of puzzle ids that the predictions are for.
    """

    def __init__(self, variants: ArcVariants):
        self._variants = variants
        self._grids: dict[bytes, np.ndarray] = {}
        # (task, key of its test input) -> key of a predicted grid -> [votes, sum of sigmoid(q)]
        self._votes: dict[tuple[str, bytes], dict[bytes, list[float]]] = {}

    def add(
        self, puzzle_ids: np.ndarray, inputs: np.ndarray, predictions: np.ndarray, q: np.ndarray
    ) -> None:
        """Counts a batch of predictions. Rows with puzzle id 0, i.e. padding, are skipped.

        Args:
          puzzle_ids: int [B].
          inputs: tokens integer [B, 900], not translated (`arc_test_set`); they say which of its
            task's tests a row is.
          predictions: tokens integer [B, 900].
          q: halting logits float [B]; their sigmoid breaks ties.
        """
        confidences = 0.5 * (1 + np.tanh(0.5 * np.asarray(q, np.float64)))  # sigmoid, no overflow
        for i, puzzle_id in enumerate(np.asarray(puzzle_ids).tolist()):
            if puzzle_id == 0:
                continue
            task = self._variants.task_of(puzzle_id)
            asked = self._variants.undo(puzzle_id, decode_grid(inputs[i]))
            grid = self._variants.undo(puzzle_id, decode_grid(predictions[i]))
            key = grid_key(grid)
            self._grids[key] = grid
            votes = self._votes.setdefault((task, grid_key(asked)), {})
            tally = votes.setdefault(key, [0.0, 0.0])
            tally[0] += 1
            tally[1] += float(confidences[i])

    def ranked(self, task: str, test_input: np.ndarray) -> list[np.ndarray]:
        """Predicted grids, best first: by number of votes, then by their mean sigmoid(q).

        Of grids equal in both, the one predicted first comes first. [] without any prediction.
        """
        votes = self._votes.get((task, grid_key(test_input)), {})
        # `sorted` keeps the order of equal items also in reverse.
        order = sorted(
            votes, key=lambda key: (votes[key][0], votes[key][1] / votes[key][0]), reverse=True
        )
        return [self._grids[key] for key in order]

    def attempts(
        self, tasks: Mapping[str, ArcTask], n_attempts: int = 2
    ) -> dict[str, list[list[np.ndarray]]]:
        """What to submit: `n_attempts` grids for each test of each task.

        With fewer different predictions the best one is repeated; without any the list is empty.
        """
        result: dict[str, list[list[np.ndarray]]] = {}
        for name, task in tasks.items():
            result[name] = []
            for pair in task.test:
                best = self.ranked(name, pair.input)[:n_attempts]
                result[name].append(best + best[:1] * (n_attempts - len(best)))
        return result


def arc_score(
    attempts: Mapping[str, list[list[np.ndarray]]], tasks: Mapping[str, ArcTask]
) -> float:
    """The official score in [0, 1]: pass@2 for two attempts a test.

    A test counts when one of its attempts is its output, shape and all cells; a task scores the
    share of its tests that count; the score is the mean over `tasks`.

    Args:
      attempts: for each task and each of its tests the grids uint8 [h, w] that are tried; a task
        that is missing scores 0.
      tasks: the tasks with their outputs.

    Raises:
      UserError: no tasks, a task whose outputs are not known, or another number of tests.
    """
    if not tasks:
        raise UserError("tasks is empty: give at least one task to score")
    scores = []
    for name, task in tasks.items():
        tries = attempts.get(name, [[]] * len(task.test))
        if len(tries) != len(task.test):
            raise UserError(
                f"attempts of task {name} are for {len(tries)} tests, it has {len(task.test)}: "
                "give one list for each test"
            )
        n_right = 0
        for pair, grids in zip(task.test, tries, strict=True):
            if pair.output is None:
                raise UserError(f"task {name} has no test output: score tasks with known outputs")
            n_right += any(np.array_equal(grid, pair.output) for grid in grids)
        scores.append(n_right / len(task.test))
    return float(np.mean(scores))
