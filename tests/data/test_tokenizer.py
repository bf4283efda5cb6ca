import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data import BPETokenizer, ByteTokenizer, load_tokenizer, train_bpe
from slm_jax.errors import UserError

TEXTS = [
    "the cat sat on the mat. the cat sat on the hat.",
    "naïve café, 日本語 🙂\n\n\tthe end 123",
] * 3
VOCAB_SIZE = 290
MIXED = "the cat 日本 🙂 \x00\r\n <|endoftext|> é ﷽ end"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> BPETokenizer:
    return train_bpe(TEXTS, VOCAB_SIZE, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tokenizer.json and a folder with the same tokenizer in GPT-2's two files."""
    folder = tmp_path_factory.mktemp("gpt2")
    train_bpe(TEXTS, VOCAB_SIZE, folder / "tokenizer.json")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "encoder.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + merges)
    return folder / "tokenizer.json", folder


def test_byte_ids_are_the_bytes() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("aé🙂")
    assert ids.dtype == np.int32
    assert ids.tolist() == list("aé🙂".encode())
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.decode([97, 256, 98]) == "ab"
    assert tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_round_trip_of_any_text(bpe: BPETokenizer, text: str) -> None:
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text
    assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_written_tokenizer_gives_the_same_ids(kind: str, bpe: BPETokenizer, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer() if kind == "byte" else bpe
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer.to_json(), encoding="utf-8")
    again = load_tokenizer(str(file))
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    np.testing.assert_array_equal(again.encode(MIXED), tokenizer.encode(MIXED))
    assert again.decode(tokenizer.encode(MIXED)) == MIXED


def test_bpe_compresses_and_batches(bpe: BPETokenizer) -> None:
    ids = bpe.encode(TEXTS[0])
    assert ids.dtype == np.int32
    assert len(ids) < len(TEXTS[0]) / 2
    assert bpe.vocab_size == VOCAB_SIZE
    for one, many in zip(TEXTS, bpe.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(bpe.encode(one), many)


def test_text_cannot_forge_an_end(bpe: BPETokenizer) -> None:
    ids = bpe.encode(MIXED)
    assert bpe.eos_id not in ids
    assert bpe.decode(ids) == MIXED
    assert bpe.decode([*bpe.encode("a").tolist(), bpe.eos_id]) == "a"


def test_training_is_deterministic_and_reload_is_equal(bpe: BPETokenizer, tmp_path: Path) -> None:
    again = train_bpe(TEXTS, VOCAB_SIZE, tmp_path / "again.json")
    assert again.fingerprint == bpe.fingerprint
    loaded = load_tokenizer(str(tmp_path / "again.json"))
    assert loaded.fingerprint == bpe.fingerprint
    np.testing.assert_array_equal(loaded.encode(MIXED), bpe.encode(MIXED))


def test_fingerprint_tells_tokenizers_apart(bpe: BPETokenizer, tmp_path: Path) -> None:
    smaller = train_bpe(TEXTS, VOCAB_SIZE - 1, tmp_path / "smaller.json")
    prints = {ByteTokenizer().fingerprint, bpe.fingerprint, smaller.fingerprint}
    assert len(prints) == 3


def test_truncation_and_padding_are_switched_off(bpe: BPETokenizer, tmp_path: Path) -> None:
    train_bpe(TEXTS, VOCAB_SIZE, tmp_path / "t.json")
    definition = json.loads((tmp_path / "t.json").read_text())
    definition["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "short.json").write_text(json.dumps(definition))
    short = load_tokenizer(str(tmp_path / "short.json"))
    np.testing.assert_array_equal(short.encode(MIXED), bpe.encode(MIXED))
    assert short.fingerprint == bpe.fingerprint


def test_gpt2_files_give_the_same_ids(gpt2_files: tuple[Path, Path]) -> None:
    plain = load_tokenizer(str(gpt2_files[0]))
    gpt2 = load_tokenizer(f"gpt2:{gpt2_files[1]}")
    for text in (*TEXTS, MIXED, "", " "):
        np.testing.assert_array_equal(gpt2.encode(text), plain.encode(text))
        assert gpt2.decode(gpt2.encode(text)) == text
    assert (gpt2.eos_id, gpt2.vocab_size) == (plain.eos_id, plain.vocab_size)


def test_gpt2_files_may_be_packed(gpt2_files: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("encoder.json", "vocab.bpe"):
        packed = gzip.compress((gpt2_files[1] / name).read_bytes())
        (tmp_path / f"gpt2_{name}.gz").write_bytes(packed)
    packed_one = load_tokenizer(f"gpt2:{tmp_path}")
    assert packed_one.fingerprint == load_tokenizer(f"gpt2:{gpt2_files[1]}").fingerprint
    np.testing.assert_array_equal(packed_one.encode("the cat"), [*_known(gpt2_files[1], "the cat")])


def _known(folder: Path, text: str) -> list[int]:
    """Slow byte-pair encoding of words split at blanks, straight from the two files."""
    vocab = json.loads((folder / "encoder.json").read_text())
    merges = [tuple(line.split(" ")) for line in (folder / "vocab.bpe").read_text().split("\n")[1:]]
    ids = []
    for n, word in enumerate(text.split(" ")):
        parts = list(("Ġ" if n else "") + word)
        while pairs := [p for p in itertools.pairwise(parts) if p in merges]:
            best = min(pairs, key=merges.index)
            i = next(i for i in range(len(parts) - 1) if (parts[i], parts[i + 1]) == best)
            parts[i : i + 2] = ["".join(best)]
        ids += [vocab[part] for part in parts]
    return ids


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "tokenizer='nonsense': not \"byte\""),
        ("gpt2:nowhere", "no encoder.json or encoder.json.gz in that folder"),
    ],
)
def test_unknown_tokenizer(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tokenizer(spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[1]", "holds a JSON list"),
        (b'{"a": 1}', "not a tokenizer.json"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_broken_tokenizer_json(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path / "t.json"))


def test_tokenizer_without_end_of_text(gpt2_files: tuple[Path, Path], tmp_path: Path) -> None:
    text = gpt2_files[0].read_text().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "t.json"))


def test_corrupt_and_mismatched_gpt2_files(gpt2_files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "encoder.json.gz").write_bytes(gzip.compress(b"{}")[:-9])
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=r"encoder.json.gz: cannot be read"):
        load_tokenizer(f"gpt2:{tmp_path}")
    (tmp_path / "encoder.json.gz").unlink()
    (tmp_path / "encoder.json").write_bytes((gpt2_files[1] / "encoder.json").read_bytes())
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nx yy\nqq zz\n")
    with pytest.raises(UserError, match=r"vocab.bpe: does not fit encoder.json"):
        load_tokenizer(f"gpt2:{tmp_path}")


@pytest.mark.parametrize(
    ("size", "message"), [(256, "choose at least 257"), (10**4, "merges for only")]
)
def test_impossible_vocab_size(size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"vocab_size={size}.*{message}"):
        train_bpe(TEXTS, size, tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def test_ids_and_text_out_of_range(bpe: BPETokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        for bad in (-1, tokenizer.vocab_size):
            with pytest.raises(UserError, match=f"token id {bad} is not in"):
                tokenizer.decode([0, bad])
        with pytest.raises(UserError, match="lone surrogate"):
            tokenizer.encode("a\ud800")
