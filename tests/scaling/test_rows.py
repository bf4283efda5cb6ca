"""Tables of runs: what is read, what is refused, what is remembered."""

import gzip

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.scaling import Rows, admissible, read_csv

TABLE = "size,flops,final,run\n1e6,6e14,4.0,a\n2e6,2.4e15,3.5,b\n"
NAMES = {"N": "size", "C": "flops", "loss": "final"}


def write(tmp_path, text, name="runs.csv"):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["runs.csv", "runs.csv.gz"])
def test_a_users_table_is_read_and_its_tokens_follow(tmp_path, name):
    rows = read_csv(write(tmp_path, TABLE, name), NAMES)
    assert rows["D"] == pytest.approx([1e8, 2e8])
    assert rows["M"] == pytest.approx([100, 100])
    assert list(rows["run"]) == ["a", "b"]
    assert rows.columns["loss"].dtype == np.float64


@pytest.mark.parametrize(
    ("text", "names", "words"),
    [
        (TABLE, {"N": "size", "C": "flops", "loss": "eval"}, "column='eval' (loss)"),
        (TABLE, {"loss": "final", "N": "size"}, "two of N"),
        (TABLE.replace("4.0", "nan"), NAMES, ":2: final=nan (loss) must be positive"),
        (TABLE.replace("3.5", "-1"), NAMES, ":3: final=-1 (loss) must be positive"),
        (TABLE.replace("3.5", "n/a"), NAMES, ":3: final='n/a' is not a number"),
        (TABLE.replace("3.5,b", ""), NAMES, ":3: final='' is not a number"),
        (TABLE.replace("size", "final"), NAMES, "stand twice"),
        ("size,flops,final\n", NAMES, "no rows"),
    ],
)
def test_what_cannot_be_fitted_is_refused_by_line_and_column(tmp_path, text, names, words):
    with pytest.raises(UserError) as error:
        read_csv(write(tmp_path, text), names)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(UserError, match="not a file"):
        read_csv(tmp_path / "none.csv")
    path = write(tmp_path, TABLE, "runs.csv.gz")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match="damaged"):
        read_csv(path, NAMES)


def test_rows_left_out_are_remembered_with_the_reason():
    rows = Rows({"N": [1e6, 1e6, 1e7], "D": [1e5, 1e7, 2e7]}, {"run": ["a", "b", "c"]})
    kept = admissible(rows, min_tokens=3e5, min_tokens_per_parameter=5)
    assert list(kept["run"]) == ["b"]
    assert [d.reason for d in kept.dropped] == ["D < 300000 tokens", "D/N < 5 tokens a parameter"]
    assert kept.dropped[0].rows == ("run=a N=1e+06 D=100000",)
    assert admissible(rows).dropped == ()


def test_the_digest_tells_tables_apart():
    rows = Rows({"N": [1.0, 2.0], "D": [3.0, 4.0]}, {"run": ["a", "b"]})
    same = Rows({"D": [3, 4], "N": [1, 2]}, {"run": ["a", "b"]})
    assert rows.digest() == same.digest()
    others = [
        rows.take([1, 0]),
        rows.with_columns(N=[1.0, 2.0000000001]),
        rows.with_columns(E=[1, 1]),
        Rows(rows.columns, {"run": ["a", "c"]}),
    ]
    assert len({rows.digest(), *(other.digest() for other in others)}) == 5


def test_columns_of_different_lengths_and_unknown_names_are_refused():
    with pytest.raises(UserError, match="different lengths"):
        Rows({"N": [1.0], "D": [1.0, 2.0]})
    with pytest.raises(UserError, match="column='U' is not in the table"):
        Rows({"N": [1.0]})["U"]
