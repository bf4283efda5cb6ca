"""The golden folders are those that cases.py describes, unchanged since write.py wrote them."""

import hashlib
import json
from pathlib import Path

import pytest

from tests.golden.cases import CASES, VARIANTS

HERE = Path(__file__).parent
FOLDERS = [f"{name}-{variant}" for name in CASES for variant in VARIANTS]


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_as_written(name: str) -> None:
    meta = json.loads((HERE / name / "meta.json").read_text())
    case = CASES[name.rpartition("-")[0]]
    assert meta["case"] == {"config": case.config, "kwargs": case.kwargs, "notes": case.notes}
    for file, digest in meta["sha256"].items():
        assert hashlib.sha256((HERE / name / file).read_bytes()).hexdigest() == digest, file


def test_no_folder_without_a_case() -> None:
    assert sorted(p.name for p in HERE.iterdir() if (p / "meta.json").is_file()) == sorted(FOLDERS)
