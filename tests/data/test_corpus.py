import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tyro

from slm_jax.data import Corpus, DataConfig, bigram_loss, mix, open_data, train_bpe
from slm_jax.errors import UserError


def documents_of(corpus: Corpus, split: str = "train") -> list[str]:
    (stream,) = getattr(corpus, split)
    ends = [*stream.starts[1:], len(stream.tokens)]
    assert all(stream.tokens[end - 1] == corpus.tokenizer.eos_id for end in ends)
    spans = zip(stream.starts, ends, strict=True)
    return [corpus.tokenizer.decode(stream.tokens[a : b - 1]) for a, b in spans]


def write_lines(path: Path, texts: list[str], field: str = "text") -> str:
    data = "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


TEXTS = [f"document {i}: {'é日🙂x'[i % 4] * (i + 1)}" for i in range(40)]


def test_tinyshakespeare() -> None:
    corpus = open_data(DataConfig())
    assert (corpus.n_train_tokens, corpus.n_valid_tokens) == (1_003_854 + 1, 111_540 + 1)
    assert corpus.bytes_per_token == 1.0
    assert corpus.train[0].tokens.dtype == np.uint16
    assert documents_of(corpus)[0].startswith("First Citizen:\nBefore we proceed")
    assert documents_of(corpus, "valid")[0].startswith("?\n\nGREMIO:\nGood morrow")
    # The published loss of a character bigram table trained by gradient descent is 2.45 to 2.5.
    assert bigram_loss(corpus) == pytest.approx(2.485, abs=0.005)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(name: str, tmp_path: Path) -> None:
    source = write_lines(tmp_path / name, [*TEXTS, ""], field="body")
    corpus = open_data(DataConfig(source=source, text_field="body", valid_fraction=0.25))
    train, valid = documents_of(corpus), documents_of(corpus, "valid")
    assert sorted(train + valid) == sorted(TEXTS)
    assert len(valid) == 10
    assert train == [text for text in TEXTS if text in train]  # in order
    assert corpus.train[0].text_bytes == sum(len(text.encode()) for text in train)


def test_folder_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for i, text in enumerate(TEXTS):
        file = tmp_path / ("sub" if i % 2 else ".") / f"{i:02}.txt"
        file.write_bytes(text.encode())
    file.with_suffix(".txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "notes.csv").write_text("not text")
    corpus = open_data(DataConfig(source=str(tmp_path)))
    assert sorted(documents_of(corpus) + documents_of(corpus, "valid")) == sorted(
        [*TEXTS, "packed"]
    )


def test_held_out_documents_depend_on_neither_order_nor_copies(tmp_path: Path) -> None:
    one = open_data(DataConfig(source=write_lines(tmp_path / "a.jsonl", TEXTS)))
    turned = open_data(DataConfig(source=write_lines(tmp_path / "b.jsonl", TEXTS[::-1])))
    assert documents_of(turned, "valid") == documents_of(one, "valid")[::-1]
    doubled = [*TEXTS[:30], *TEXTS[::-1]]
    copies = open_data(DataConfig(source=write_lines(tmp_path / "c.jsonl", doubled)))
    train, valid = documents_of(copies), documents_of(copies, "valid")
    assert sorted(train + valid) == sorted(doubled)
    assert not set(train) & set(valid)


def test_single_document_is_cut_between_characters(tmp_path: Path) -> None:
    text = "日本語" * 10
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = open_data(DataConfig(source=str(tmp_path / "a.txt"), valid_fraction=0.35))
    (train,), (valid,) = documents_of(corpus), documents_of(corpus, "valid")
    assert train + valid == text
    assert len(train.encode()) == 57  # int(90 * 0.65) = 58 is inside a character


def test_bytes_per_token_turns_loss_into_loss_per_byte(tmp_path: Path) -> None:
    train_bpe(TEXTS, 280, tmp_path / "t.json")
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    corpus = open_data(DataConfig(source=source, tokenizer=str(tmp_path / "t.json")))
    texts = documents_of(corpus, "valid")
    n_targets = sum(len(corpus.tokenizer.encode(text)) for text in texts)
    assert corpus.valid[0].n_targets == n_targets
    assert corpus.bytes_per_token == sum(len(t.encode()) for t in texts) / n_targets > 1
    # A bigram table over bytes does not depend on the tokenizer.
    plain = open_data(DataConfig(source=source))
    assert bigram_loss(corpus) == pytest.approx(bigram_loss(plain), rel=1e-12)


def test_bigram_loss_by_hand(tmp_path: Path) -> None:
    corpus = open_data(DataConfig(source=write_lines(tmp_path / "a.jsonl", ["ab", "abab"])))
    train, valid = documents_of(corpus)[0], documents_of(corpus, "valid")[0]
    pairs = list(zip(train, [*train[1:], "end"], strict=True))
    loss = 0.0
    for pair in zip(valid, [*valid[1:], "end"], strict=True):
        after = [b for a, b in pairs if a == pair[0]]
        loss -= np.log((after.count(pair[1]) + 0.5) / (len(after) + 257 * 0.5))
    assert bigram_loss(corpus, k=0.5) == pytest.approx(loss / len(valid), rel=1e-12)


def test_mixture_from_configuration_and_from_corpora(tmp_path: Path) -> None:
    a, b = write_lines(tmp_path / "a.jsonl", TEXTS[:20]), write_lines(tmp_path / "b.jsonl", TEXTS)
    mixture = open_data(DataConfig(mixture=((a, 3.0), (b, 1.0))))
    assert mixture.weights == (0.75, 0.25)
    corpora = [open_data(DataConfig(source=source)) for source in (a, b)]
    assert mixture.fingerprint == mix(corpora, [6, 2]).fingerprint
    assert mixture.fingerprint != mix(corpora, [1, 1]).fingerprint
    assert mixture.n_train_tokens == sum(corpus.n_train_tokens for corpus in corpora)
    assert len({mixture.fingerprint, *(corpus.fingerprint for corpus in corpora)}) == 3


@pytest.mark.parametrize("weights", [(0.0, 1.0), (-1.0, 2.0), (float("nan"), 1.0)])
def test_bad_mixture_weights(weights: tuple[float, float]) -> None:
    cfg = DataConfig(mixture=(("tinyshakespeare", weights[0]), ("other", weights[1])))
    with pytest.raises(UserError, match=r"mixture weights .*: each must be a positive number"):
        open_data(cfg)


def test_other_mixture_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a source occurs twice"):
        open_data(DataConfig(mixture=(("tinyshakespeare", 1.0), ("tinyshakespeare", 1.0))))
    with pytest.raises(UserError, match=r"source='x\.txt' and a mixture are both given"):
        open_data(DataConfig(source="x.txt", mixture=(("tinyshakespeare", 1.0),)))
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    train_bpe(TEXTS, 280, tmp_path / "t.json")
    one = open_data(DataConfig())
    other = open_data(DataConfig(source=source, tokenizer=str(tmp_path / "t.json")))
    with pytest.raises(UserError, match="their tokenizers differ"):
        mix([one, other], [1, 1])
    with pytest.raises(UserError, match="1 sources and 2 weights"):
        mix([one], [1, 1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the corpus is empty"),
        ("a.jsonl", b"\n", "the corpus is empty"),
        ("a.txt", b"x", "leaves nothing on one side"),
        ("a.txt", b"ab\xff", r"a.txt: not UTF-8 at byte 2"),
        ("a.txt.gz", b"plain", r"a.txt.gz: corrupt gzip"),
        ("a.txt.gz", gzip.compress(b"some text" * 9, mtime=0)[:-9], r"a.txt.gz: corrupt gzip"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a.jsonl:3: invalid JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a.jsonl:2: a JSON list, not an object"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"a.jsonl:1: no field .*fields are body, id"),
        ("a.jsonl", b'{"text": 7}\n', r"a.jsonl:1: field 'text' is a int, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl:1: field 'text' has a lone surrogate"),
        ("a.jsonl", b'{"text": "x\xff"}\n', r"a.jsonl:1: not UTF-8"),
        ("a.jsonl", b'{"text": "same"}\n' * 3, "too few different texts"),
        ("a.csv", b"x", "unknown kind of file: use .txt"),
        ("a.gz", b"x", "unknown kind of file: use .txt"),
    ],
)
def test_broken_files(
    name: str, content: bytes, message: str, tmp_path: Path, own_cache: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_data(DataConfig(source=str(tmp_path / name)))
    assert "\n" not in str(caught.value)
    assert not [p for p in own_cache.rglob("*") if p.suffix != ".lock" and p.name != "tokens"]


def test_missing_sources(tmp_path: Path) -> None:
    missing = tmp_path / "nothing.txt"
    with pytest.raises(UserError, match=f"no such file or folder .looked at {missing}"):
        open_data(DataConfig(source=str(missing)))
    with pytest.raises(UserError, match=r"no \.txt, .* file in that folder"):
        open_data(DataConfig(source=str(tmp_path)))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_bad_valid_fraction(fraction: float) -> None:
    with pytest.raises(UserError, match=r"valid_fraction=.*between 0 and 1"):
        open_data(DataConfig(valid_fraction=fraction))


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--mixture", "a", "0.5", "b.txt", "2", "--cache-dir", "c"]
    cfg = tyro.cli(DataConfig, args=args)
    assert cfg == DataConfig(mixture=(("a", 0.5), ("b.txt", 2.0)), cache_dir="c")
    with pytest.raises(SystemExit):
        tyro.cli(DataConfig, args=["--help"])
    assert "Share of the documents to hold out" in " ".join(capsys.readouterr().out.split())


def test_made_corpora_have_fingerprints_of_their_own(make_corpus: Callable[..., Corpus]) -> None:
    prints = {make_corpus([5, 5]).fingerprint, make_corpus([4, 6]).fingerprint}
    assert len(prints) == 2
