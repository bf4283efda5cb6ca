import json

import numpy as np
import pytest

from slm_jax.data.puzzles import (
    MazeConfig,
    OrderedBatches,
    PuzzleSet,
    generate_mazes,
    generate_sudoku,
    puzzle_batches,
    split_by_class,
    sudoku_grids,
)
from slm_jax.data.puzzles.sudoku_solver import solve
from slm_jax.data.puzzles.words import below, mix, permutations, words
from slm_jax.errors import UserError
from tests.data.batches import assert_same, take

SET = generate_sudoku(6, 10, seed=0)


def test_batches_have_the_shapes_and_types_of_the_interface() -> None:
    batch = next(puzzle_batches(SET, batch_size=4, seed=0, augment=True))
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "inputs": ((4, 36), "int32"),
        "labels": ((4, 36), "int32"),
        "puzzle_ids": ((4,), "int32"),
    }
    assert batch["inputs"].min() == 1
    assert 2 <= batch["labels"].min() <= batch["labels"].max() <= 7


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_global_batch_is_the_same_on_any_number_of_processes(augment: bool, count: int) -> None:
    kind = {"batch_size": 8, "seed": 5, "augment": augment}
    whole = take(puzzle_batches(SET, **kind), 7)
    parts = [
        take(puzzle_batches(SET, **kind, rows=rows), 7) for rows in np.split(np.arange(8), count)
    ]
    joined = [
        {name: np.concatenate([part[step][name] for part in parts]) for name in whole[0]}
        for step in range(7)
    ]
    assert_same(joined, whole)


def test_saved_state_goes_on_exactly() -> None:
    batches = puzzle_batches(SET, batch_size=4, seed=1, augment=True)
    take(batches, 13)
    state = json.loads(json.dumps(batches.get_state()))
    assert state == {"next_index": 13}
    want = take(batches, 5)
    fresh = puzzle_batches(SET, batch_size=4, seed=1, augment=True)
    fresh.set_state(state)
    assert_same(take(fresh, 5), want)
    batches.set_state(state)  # back, in the same iterator
    assert_same(take(batches, 5), want)
    other = puzzle_batches(SET, batch_size=4, seed=1, augment=True, rows=np.array([2, 3]))
    other.set_state(state)
    assert_same(take(other, 5), [{k: v[2:] for k, v in batch.items()} for batch in want])


@pytest.mark.parametrize("batch_size", [1, 4, 25])  # 25 rows span four epochs of 10 puzzles
def test_an_epoch_is_every_puzzle_once_and_orders_differ(batch_size: int) -> None:
    batches = puzzle_batches(SET, batch_size=batch_size, seed=0, augment=False)
    rows = np.concatenate([b["inputs"] for b in take(batches, 100 // batch_size)])
    which = (rows[:, None] == SET.inputs).all(2).argmax(1).reshape(-1, 10)
    np.testing.assert_array_equal(np.sort(which, 1), np.tile(np.arange(10), (10, 1)))
    assert len(np.unique(which, axis=0)) == 10
    other = next(puzzle_batches(SET, batch_size=10, seed=1, augment=False))["inputs"]
    assert (other != rows[:10]).any()


def test_every_epoch_draws_another_variant() -> None:
    one = SET.take(slice(1))
    batches = puzzle_batches(one, batch_size=50, seed=0, augment=True)
    variants = np.concatenate([b["inputs"] for b in take(batches, 4)])
    assert len(np.unique(variants, axis=0)) == 200
    batch = next(batches)
    found, counts = solve(sudoku_grids(batch["inputs"]))
    assert (counts == 1).all()
    np.testing.assert_array_equal(found, sudoku_grids(batch["labels"]))


def test_ordered_batches_pass_once_and_pad() -> None:
    batches = OrderedBatches(SET, 4)
    assert len(batches) == 3
    for _ in range(2):  # can be iterated again
        rows = list(batches)
        assert [b["inputs"].shape for b in rows] == [(4, 36)] * 3
        np.testing.assert_array_equal(np.concatenate([b["inputs"] for b in rows])[:10], SET.inputs)
        assert not rows[-1]["labels"][2:].any()
        assert rows[-1]["puzzle_ids"].shape == (4,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: choose at least 1"),
        ({"rows": [4]}, r"rows=\[4\]: choose some of the 4 rows of a batch"),
        ({"train": SET.take(slice(0))}, "has no puzzles"),
        (
            {"train": PuzzleSet(*[np.ones((2, 4), int)] * 2, np.zeros(2, int), 2, 2, 2, 1, "bare")},
            "augment=True: 'bare' has no augmentation",
        ),
    ],
)
def test_batches_refuse(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        puzzle_batches(**({"train": SET, "batch_size": 4, "seed": 0, "augment": True} | change))
    with pytest.raises(UserError, match="batch_size=0"):
        OrderedBatches(SET, 0)


def test_sets_check_their_arrays() -> None:
    good = {
        "inputs": np.ones((2, 4), int),
        "labels": np.ones((2, 4), int),
        "puzzle_ids": np.zeros(2, int),
        "vocab_size": 3,
        "height": 2,
        "width": 2,
        "n_puzzle_ids": 1,
        "name": "x",
    }
    assert len(PuzzleSet(**good)) == 2
    for change, message in (
        ({"labels": np.ones((2, 5), int)}, r"labels.shape=\(2, 5\) of x: must be \(2, 4\)"),
        ({"inputs": np.full((2, 4), 3)}, r"inputs of x is not in \[0, 3\)"),
        ({"puzzle_ids": np.array([0, 1])}, r"puzzle_ids of x is not in \[0, 1\)"),
    ):
        with pytest.raises(UserError, match=message):
            PuzzleSet(**(good | change))


def test_split_by_class_keeps_classes_whole() -> None:
    mazes = generate_mazes(MazeConfig(5, 5), 90, seed=0)
    classes = np.arange(90, dtype=np.uint64) // np.uint64(7)
    train, test = split_by_class(mazes, classes, 10, seed=0)
    assert len(test) == 10
    assert 70 <= len(train) < 80  # two classes of seven are tested, four of them left out
    assert train.augmentation is mazes.augmentation


def test_words_are_pure_and_uniform() -> None:
    rows = np.arange(20_000)
    x = words(7, 3, rows, n_words=4)
    np.testing.assert_array_equal(x[5:9], words(7, 3, rows[5:9], n_words=4))
    np.testing.assert_array_equal(x[:, :2], words(7, 3, rows, n_words=2))
    assert len(np.unique(x)) == x.size
    for other in (words(8, 3, rows, n_words=4), words(7, 4, rows, n_words=4)):
        assert not np.isin(x, other).any()
    assert words(-1, n_words=3).shape == (1, 3)
    bits = (x[:, :, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    np.testing.assert_allclose(bits.mean(0), 0.5, atol=0.02)
    numbers = below(x, 5)
    assert np.bincount(numbers.ravel(), minlength=5).min() > 0.19 * x.size
    assert numbers.max() == 4
    np.testing.assert_array_equal(below(x[:, 0], np.full(len(rows), 5)), numbers[:, 0])
    orders = np.unique(permutations(x[:, :3]), axis=0, return_counts=True)[1]
    assert len(orders) == 6
    assert orders.min() > 0.15 * len(rows)


def test_mix_is_splitmix64() -> None:
    # First outputs of SplitMix64 with seed 1234567, as published with the reference C code.
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + i * gamma) % 2**64 for i in range(1, 4)]
    assert mix(np.array(states, np.uint64)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
