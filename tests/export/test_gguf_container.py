"""The GGUF container, against files of the `gguf` package and against itself."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.export.gguf.blocks import F16, F32, Q8_0
from slm_jax.export.gguf.read import GGUF, StoredTensor, read_gguf
from slm_jax.export.gguf.write import PlannedTensor, write_gguf

GOLDEN = Path(__file__).parent / "golden"
X = np.random.RandomState(0).standard_normal((3, 4, 64)).astype(np.float32)
METADATA = {
    "general.architecture": "none",
    "text": "Grüße",
    "texts": ["a", "", "b c"],
    "none": [],
    "flag": np.bool_(True),
    "number": np.int16(-3),
    "numbers": np.arange(3, dtype=np.uint64),
    "real": np.float32(0.1),
}


def planned(x: np.ndarray = X) -> dict[str, PlannedTensor]:
    return {
        "whole": PlannedTensor(x.shape, F32, lambda: [x]),
        "small": PlannedTensor((5,), F32, lambda: [np.arange(5)]),
        "parts": PlannedTensor(x.shape, Q8_0, lambda: iter(x)),
        "half": PlannedTensor(x.shape, F16, lambda: [x]),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "x.gguf", METADATA, planned())
    return tmp_path / "x.gguf"


def plan_again(tensor: StoredTensor) -> PlannedTensor:
    return PlannedTensor(tensor.shape, tensor.encoding, lambda: [tensor.values()])


def write_again(file: GGUF, path: Path) -> bytes:
    write_gguf(path, file.metadata, {n: plan_again(t) for n, t in file.tensors.items()})
    return path.read_bytes()


def test_what_was_written_is_read(path: Path) -> None:
    file = read_gguf(path)
    assert list(file.metadata) == list(METADATA)
    for key, value in METADATA.items():
        assert type(file.metadata[key]) is type(value)
        np.testing.assert_array_equal(file.metadata[key], value)
        assert getattr(file.metadata[key], "dtype", None) == getattr(value, "dtype", None)
    assert {n: t.encoding for n, t in file.tensors.items()} == {
        n: t.encoding for n, t in planned().items()
    }
    np.testing.assert_array_equal(file.tensors["whole"].values(), X)
    np.testing.assert_array_equal(file.tensors["half"].values(), X.astype(np.float16))
    for i in range(3):  # one expert is read without the others
        part = file.tensors["parts"].values(i)
        np.testing.assert_array_equal(part, file.tensors["parts"].values()[i])
        assert np.abs(part - X[i]).max() < 0.02


def test_writing_again_what_was_read_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    assert write_again(read_gguf(path), tmp_path / "y.gguf") == path.read_bytes()


def test_a_file_of_the_package_is_read_and_written_as_it_is(tmp_path: Path) -> None:
    seen = json.loads((GOLDEN / "types.json").read_text())
    file = read_gguf(GOLDEN / "types.gguf")
    assert file.metadata.keys() == seen["values"].keys()
    for key, want in seen["values"].items():
        got = file.metadata[key]
        np.testing.assert_array_equal(got, want)
        if not isinstance(got, str | list):
            assert (
                got.dtype.name.replace("int", "INT")
                .replace("float", "FLOAT")
                .replace("uINT", "UINT")
                .replace("bool", "BOOL")
                == seen["types"][key]
            )
    assert file.tensors.keys() == seen["tensors"].keys()
    for name, tensor in file.tensors.items():
        np.testing.assert_array_equal(tensor.values(), np.float32(seen["tensors"][name]))
    assert write_again(file, tmp_path / "y.gguf") == (GOLDEN / "types.gguf").read_bytes()


def test_an_interrupted_write_leaves_what_was_there(path: Path) -> None:
    before = path.read_bytes()

    def stop() -> list[np.ndarray]:
        raise KeyboardInterrupt

    tensors = planned() | {"last": PlannedTensor((3,), F32, stop)}
    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, METADATA, tensors)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(UserError, match="whole holds NaN"):
        write_gguf(path.parent / "new.gguf", {}, planned(np.full_like(X, np.nan)))
    assert list(path.parent.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_named(path: Path) -> None:
    with pytest.raises(UserError, match=r"z\.gguf cannot be written"):
        write_gguf(path / "z.gguf", {}, {})


def refused(path: Path, raw: bytes) -> str:
    broken = path.with_name("broken.gguf")
    broken.write_bytes(raw)
    with pytest.raises(UserError) as error:
        read_gguf(broken)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_truncation_is_refused(path: Path) -> None:
    raw = path.read_bytes()
    data = len(raw) - sum(t.encoding.size(t.shape) for t in planned().values()) - 3 * 32
    for n in [*range(0, data, 7), data, len(raw) // 2, len(raw) - 32]:
        refused(path, raw[:n])


def header(n_tensors: int, n_pairs: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs) + rest


def text(s: bytes) -> bytes:
    return struct.pack("<Q", len(s)) + s


def entry(name: bytes, dims: tuple[int, ...], code: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", code, offset)


HUGE = 2**63 + 5
PAD = b"\0" * 4096


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "too short"),
        (b"\x80\x04\x95" + PAD, "wrong magic"),  # a pickle: never loaded
        (b"PK\x03\x04" + PAD, "wrong magic"),  # a zip, as torch.save writes
        (header(0, 0, PAD, version=1), "version 1"),
        (header(0, 0, PAD, version=0x03000000), "big-endian"),
        (header(HUGE, 0, PAD), "counts"),
        (header(0, HUGE, PAD), "counts"),
        (header(0, 1, struct.pack("<Q", HUGE) + PAD), "a length"),
        (header(0, 1, text(b"k") + struct.pack("<I", 77) + PAD), "metadata of type 77"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 4, HUGE) + PAD), "a length"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 2**60) + PAD), "an array"),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1) + PAD), "array of type 9"),
        (header(0, 1, text(b"k") + struct.pack("<IB", 7, 2) + PAD), "truth value"),
        (header(0, 1, text(b"\xff\xfe") + struct.pack("<IB", 7, 1) + PAD), "not UTF-8"),
        (header(0, 2, (text(b"k") + struct.pack("<IB", 7, 1)) * 2 + PAD), "there twice"),
        (header(1, 0, entry(b"t", (HUGE, HUGE), 0, 0) + PAD), "ends within tensor 't'"),
        (header(1, 0, entry(b"t", (0,), 0, 0) + PAD), "the shape"),
        (header(1, 0, entry(b"t", (33,), 8, 0) + PAD), "the shape"),
        (header(1, 0, entry(b"t", (), 0, 0) + PAD), "0 dimensions"),
        (header(1, 0, entry(b"t", (1,) * 5, 0, 0) + PAD), "5 dimensions"),
        (header(1, 0, entry(b"t", (32,), 12, 0) + PAD), "ggml type 12"),
        (header(1, 0, entry(b"t", (32,), 0, 64) + PAD), "lies at 64 instead of 0"),
        (header(2, 0, entry(b"t", (8,), 0, 0) + entry(b"u", (8,), 0, 0) + PAD), "lies at 0"),
        (header(2, 0, entry(b"t", (8,), 0, 0) * 2 + PAD), "there twice"),
        (
            header(1, 1, text(b"general.alignment") + struct.pack("<II", 4, 3)
                   + entry(b"t", (8,), 0, 0) + PAD),
            "no power of two",
        ),
    ],
)  # fmt: skip
def test_lengths_and_types_are_held_against_the_file(raw: bytes, says: str, path: Path) -> None:
    assert says in refused(path, raw)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.gguf", Path("/dev/zero")):
        with pytest.raises(UserError, match="is not a file"):
            read_gguf(path)
