import gzip
import json

import numpy as np
import pytest

from slm_jax.data.puzzles import (
    ArcPair,
    ArcTask,
    ArcVotes,
    arc_score,
    arc_test_set,
    arc_train_set,
    arc_variants,
    decode_grid,
    encode_grid,
    load_arc,
    puzzle_batches,
    without_tasks_of,
)
from slm_jax.errors import UserError

RNG = np.random.default_rng(0)


def grid(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 10, (height, width)).astype(np.uint8)


def task(n_train: int, n_test: int) -> ArcTask:
    pairs = [
        ArcPair(grid(*RNG.integers(1, 12, 2)), grid(*RNG.integers(1, 12, 2)))
        for _ in range(n_train + n_test)
    ]
    return ArcTask(tuple(pairs[:n_train]), tuple(pairs[n_train:]))


TRAINING = {"a": task(3, 1), "b": task(2, 2)}
EVALUATION = {"c": task(4, 1), "d": task(2, 3)}
TASKS = TRAINING | EVALUATION
VARIANTS = arc_variants(TASKS, 20, seed=0)


def as_json(tasks: dict[str, ArcTask]) -> dict:
    return {
        name: {
            part: [
                {k: g.tolist() for k, g in vars(pair).items() if g is not None}
                for pair in getattr(t, part)
            ]
            for part in ("test", "train")
        }
        for name, t in tasks.items()
    }


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_tasks_are_read(tmp_path, suffix: str) -> None:
    asked = ArcTask(TASKS["a"].train, (ArcPair(grid(30, 30), None),))
    file = tmp_path / f"tasks{suffix}"
    with (gzip.open if suffix.endswith("gz") else open)(file, "wt") as out:
        json.dump(as_json(TASKS | {"asked": asked}), out)
    loaded = load_arc(file)
    assert list(loaded) == [*TASKS, "asked"]
    assert loaded["asked"].test[0].output is None
    for name, want in TASKS.items():
        for got, pair in zip(loaded[name].train, want.train, strict=True):
            np.testing.assert_array_equal(got.input, pair.input)
            np.testing.assert_array_equal(got.output, pair.output)
            assert got.input.dtype == np.uint8


ONE = {"input": [[1]], "output": [[2]]}
ROWS = [[0] * 31]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must be an object of task id to task"),
        ("{}", "must be an object of task id to task"),
        ({"x": {"train": [ONE]}}, "task x has no list 'test'"),
        ({"x": []}, "task x has no list 'train'"),
        ({"x": {"train": [], "test": [ONE]}}, "task x has no list 'train'"),
        ({"x": {"train": [{"output": [[1]]}], "test": [ONE]}}, r"x, train\[0\] has no input"),
        ({"x": {"train": [ONE, {"input": [[1]]}], "test": [ONE]}}, r"train\[1\] has no output"),
        ({"x": {"train": [ONE], "test": [{"input": ROWS}]}}, r"test\[0\].input is 1 x 31"),
        ({"x": {"train": [ONE], "test": [{"input": [[1], [1, 2]]}]}}, "rows of one length"),
        ({"x": {"train": [ONE], "test": [{"input": []}]}}, "must be a list of rows"),
        ({"x": {"train": [ONE], "test": [{"input": [[]]}]}}, "input is 1 x 0"),
        ({"x": {"train": [ONE], "test": [{"input": [[10]]}]}}, "has the colour 10"),
        ({"x": {"train": [ONE], "test": [{"input": [[True]]}]}}, "has the colour True"),
        ({"x": {"train": [ONE], "test": [{"input": [["1"]]}]}}, "has the colour '1'"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        load_arc(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_encoding_is_that_of_the_reference() -> None:
    tokens = encode_grid(np.array([[0, 9, 1], [3, 4, 5]]), 2, 1).reshape(30, 30)
    np.testing.assert_array_equal(
        tokens[1:6, :6],
        [
            [0, 0, 0, 0, 0, 0],
            [0, 2, 11, 3, 1, 0],
            [0, 5, 6, 7, 1, 0],
            [0, 1, 1, 1, 0, 0],  # the corner stays padding
            [0, 0, 0, 0, 0, 0],
        ],
    )
    assert (tokens > 0).sum() == 6 + 3 + 2
    full = encode_grid(np.full((30, 30), 7))  # no room for an end
    assert (full == 9).all()
    with pytest.raises(ValueError, match="leaves 30 x 30"):
        encode_grid(np.zeros((2, 2)), 29, 0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (30, 1), (1, 30), (30, 30), (29, 30), (12, 29)])
def test_decoding_undoes_encoding(shape: tuple[int, int]) -> None:
    g = grid(*shape)
    np.testing.assert_array_equal(decode_grid(encode_grid(g)), g)


def test_decoding_takes_the_largest_rectangle() -> None:
    square = np.zeros((30, 30), int)
    square[:2, :5] = 4
    square[:6, :2] = 5  # 6 x 2 cells against 2 x 5
    assert decode_grid(square.ravel()).shape == (6, 2)
    square[4, 0] = 1
    np.testing.assert_array_equal(decode_grid(square.ravel()), [[3, 3, 2, 2, 2], [3, 3, 2, 2, 2]])
    square[0, 0] = 0
    assert decode_grid(square.ravel()).shape == (0, 0)
    # Brute force over all rectangles, for random predictions.
    for seed in range(20):
        p = np.random.default_rng(seed).choice([0, 1, 2, 11], (30, 30), p=[0.01, 0.02, 0.5, 0.47])
        areas = [(h * w, h, w) for h in range(1, 31) for w in range(1, 31) if p[:h, :w].min() > 1]
        got = decode_grid(p.ravel()).shape
        assert got[0] * got[1] == (max(areas)[0] if areas else 0)


def test_variants_are_different_and_can_be_undone() -> None:
    assert VARIANTS.n_puzzle_ids == 1 + 4 * 21
    assert [VARIANTS.ids(name)[0] for name in TASKS] == [1, 22, 43, 64]
    for name, t in TASKS.items():
        seen = set()
        for puzzle_id in VARIANTS.ids(name):
            assert VARIANTS.task_of(puzzle_id) == name
            grids = [VARIANTS.apply(puzzle_id, pair.input) for pair in t.train]
            seen.add(tuple((g.shape, g.tobytes()) for g in grids))
            for moved, pair in zip(grids, t.train, strict=True):
                np.testing.assert_array_equal(VARIANTS.undo(puzzle_id, moved), pair.input)
                assert (moved == 0).sum() == (pair.input == 0).sum()  # black stays black
        assert len(seen) == 21
        np.testing.assert_array_equal(
            VARIANTS.apply(VARIANTS.ids(name)[0], t.test[0].input), t.test[0].input
        )
    assert sorted(set(VARIANTS.symmetry.tolist())) == list(range(8))
    np.testing.assert_array_equal(np.sort(VARIANTS.colours, 1), np.tile(np.arange(10), (85, 1)))
    assert not VARIANTS.colours[:, 0].any()


def test_variants_of_a_task_do_not_depend_on_the_other_tasks() -> None:
    alone = arc_variants({"c": TASKS["c"]}, 20, seed=0)
    ids = list(VARIANTS.ids("c"))
    np.testing.assert_array_equal(alone.colours[1:], VARIANTS.colours[ids])
    np.testing.assert_array_equal(alone.symmetry[1:], VARIANTS.symmetry[ids])
    other = arc_variants({"c": TASKS["c"]}, 20, seed=1)
    assert (alone.colours != other.colours).any()
    assert arc_variants(TASKS, 0, seed=0).n_puzzle_ids == 5
    with pytest.raises(UserError, match="n_variants=-1"):
        arc_variants(TASKS, -1, seed=0)
    with pytest.raises(UserError, match="task z has no puzzle ids"):
        VARIANTS.ids("z")


def test_variants_that_look_the_same_count_once() -> None:
    # One cell of one colour: nine colours, whatever the turn. Two cells: two more ways to lie.
    dot = ArcPair(np.array([[4]]), np.array([[0]]))
    flat = ArcTask((dot,), (dot,))
    assert arc_variants({"x": flat}, 100, seed=0).n_puzzle_ids == 1 + 9
    pair = ArcPair(np.array([[4, 0]]), np.array([[0]]))
    assert arc_variants({"x": ArcTask((pair,), (pair,))}, 500, seed=0).n_puzzle_ids == 1 + 9 * 4
    # A mirror that only exchanges the two examples gives no new task.
    both = tuple(ArcPair(np.array([row]), np.array([[0]])) for row in ([4, 0], [0, 4]))
    assert arc_variants({"x": ArcTask(both, both)}, 500, seed=0).n_puzzle_ids == 1 + 9 * 2


def test_train_set_holds_no_test_of_the_evaluation() -> None:
    train = arc_train_set(TRAINING, EVALUATION, VARIANTS)
    assert len(train) == (3 + 1) + (2 + 2) + 4 + 2
    assert (train.vocab_size, train.height, train.width) == (12, 30, 30)
    assert train.n_puzzle_ids == VARIANTS.n_puzzle_ids
    inputs = {row.tobytes() for row in train.inputs}
    for name, t in TASKS.items():
        for pair in t.train:
            assert encode_grid(pair.input).tobytes() in inputs
        for pair in t.test:
            assert (encode_grid(pair.input).tobytes() in inputs) == (name in TRAINING)


def test_overlap_of_training_and_evaluation_is_refused_and_can_be_removed() -> None:
    leak = ArcTask((TASKS["d"].test[1],), TASKS["a"].test)
    shared = TRAINING | {"d": TASKS["a"], "leak": leak}
    assert list(without_tasks_of(shared, EVALUATION)) == ["a", "b"]
    with pytest.raises(UserError, match=r"training has 2 tasks of evaluation, e.g. d: remove"):
        arc_train_set(shared, EVALUATION, VARIANTS)


def test_augmented_batches_are_variants_with_their_ids() -> None:
    train = arc_train_set(TRAINING, EVALUATION, VARIANTS)
    batches = puzzle_batches(train, batch_size=len(train) * 60, seed=0, augment=True)
    batch = next(batches)
    pairs = {name: [*t.train, *(t.test if name in TRAINING else ())] for name, t in TASKS.items()}
    n_still = dict.fromkeys(TASKS, 0)
    for tokens, labels, puzzle_id in zip(*batch.values(), strict=True):
        name = VARIANTS.task_of(puzzle_id)
        square = tokens.reshape(30, 30)
        row, column = (int((square > 0).any(axis).argmax()) for axis in (1, 0))
        found = False
        for pair in pairs[name]:
            sides = (VARIANTS.apply(puzzle_id, side) for side in (pair.input, pair.output))
            try:
                want = [encode_grid(side, row, column) for side in sides]
            except ValueError:
                continue
            found |= (tokens == want[0]).all() and (labels == want[1]).all()
        assert found
        n_still[name] += row == column == 0
    assert np.bincount(batch["puzzle_ids"], minlength=85)[1:].min() > 0
    for name, n in n_still.items():  # one example in n, and the few moved by nothing
        assert 0.5 * 60 < n < 2 * 60, (name, n)


def test_test_set_is_each_test_in_each_variant() -> None:
    test = arc_test_set(EVALUATION, VARIANTS)
    assert len(test) == 21 * (1 + 3)
    np.testing.assert_array_equal(test.inputs[0], encode_grid(EVALUATION["c"].test[0].input))
    last = VARIANTS.apply(84, EVALUATION["d"].test[2].output)
    np.testing.assert_array_equal(test.labels[-1], encode_grid(last))
    assert test.puzzle_ids[-1] == 84
    assert len(arc_test_set(EVALUATION, VARIANTS, max_variants=2)) == 2 * 4
    with pytest.raises(UserError, match="max_variants=0"):
        arc_test_set(EVALUATION, VARIANTS, max_variants=0)
    asked = {"c": ArcTask(TASKS["c"].train, (ArcPair(grid(3, 3), None),))}
    assert not arc_test_set(asked, VARIANTS).labels.any()


def test_right_predictions_of_all_variants_are_one_grid() -> None:
    test = arc_test_set(EVALUATION, VARIANTS)
    votes = ArcVotes(VARIANTS)
    q = np.zeros(len(test))
    votes.add(test.puzzle_ids, test.inputs, test.labels, q)
    votes.add(np.zeros(2, int), np.zeros((2, 900)), np.zeros((2, 900)), q[:2])  # padding
    for name, t in EVALUATION.items():
        for pair in t.test:
            ranked = votes.ranked(name, pair.input)
            assert len(ranked) == 1
            np.testing.assert_array_equal(ranked[0], pair.output)
    assert arc_score(votes.attempts(EVALUATION), EVALUATION) == 1.0


def test_votes_rank_by_count_then_by_mean_confidence() -> None:
    test = arc_test_set(EVALUATION, VARIANTS).take(slice(0, 21))  # task c, one test
    grids = [np.full((2, 2), colour, np.uint8) for colour in range(4)]
    # Three votes for 0; two for 1 and for 2, the second surer in the mean; one very sure for 3.
    cast = [(0, -9.0), (1, 5.0), (2, 1.0), (0, -9.0), (1, -900.0), (2, 0.5), (0, -9.0), (3, 900.0)]
    votes = ArcVotes(VARIANTS)
    for row, (which, q) in enumerate(cast):
        predicted = encode_grid(VARIANTS.apply(test.puzzle_ids[row], grids[which]))
        votes.add(
            test.puzzle_ids[row : row + 1],
            test.inputs[row : row + 1],
            predicted[None],
            np.array([q]),
        )
    question = EVALUATION["c"].test[0].input
    ranked = [int(g[0, 0]) for g in votes.ranked("c", question)]
    assert ranked == [0, 2, 1, 3]
    two = votes.attempts(EVALUATION)
    assert [[int(g[0, 0]) for g in grids] for grids in two["c"]] == [[0, 2]]
    assert two["d"] == [[], [], []]
    assert len(votes.attempts(EVALUATION, 6)["c"][0]) == 6  # the best is repeated


def test_score_is_the_mean_over_tasks_of_the_share_of_tests() -> None:
    wrong = np.zeros((1, 1), np.uint8)
    right = {name: [pair.output for pair in t.test] for name, t in EVALUATION.items()}
    assert arc_score({}, EVALUATION) == 0.0
    attempts = {
        "c": [[wrong, right["c"][0]]],  # the second attempt counts
        "d": [[right["d"][0], wrong], [wrong, wrong], []],
    }
    assert arc_score(attempts, EVALUATION) == pytest.approx((1 + 1 / 3) / 2)
    assert arc_score({"c": attempts["c"]}, EVALUATION) == 0.5
    assert arc_score({"c": [[right["c"][0][:1]]]}, {"c": EVALUATION["c"]}) == (
        float(right["c"][0].shape[0] == 1)
    )
    with pytest.raises(UserError, match="for 1 tests, it has 3"):
        arc_score({"d": [[wrong]]}, EVALUATION)
    with pytest.raises(UserError, match="tasks is empty"):
        arc_score({}, {})
    with pytest.raises(UserError, match="task c has no test output"):
        arc_score({}, {"c": ArcTask(TASKS["c"].train, (ArcPair(wrong, None),))})
