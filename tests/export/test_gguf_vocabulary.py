"""Tokenizers in GGUF: the ids are the same before and after."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers, processors

from slm_jax.data import ByteTokenizer, load_tokenizer, train_bpe
from slm_jax.errors import UserError
from slm_jax.export.gguf.vocabulary import vocabulary_from_gguf, vocabulary_to_gguf

TEXT = (
    "def f(x1, 2024):\n\treturn 'Grüße, 世界 🌍'  # don't\r\n\n  it's 3.14 \u0669\u2155 "
    "<|endoftext|> "
)


class Own:
    """A tokenizer as the `tokenizers` library has it."""

    def __init__(self, inner: tokenizers.Tokenizer, eos_id: int = 0) -> None:
        self.inner, self.eos_id = inner, eos_id
        self.vocab_size = inner.get_vocab_size()

    def to_json(self) -> str:
        return self.inner.to_str()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    numbers = "2024 don't " * 60  # which the rules cut in different ways
    train_bpe([Path(__file__).read_text(), numbers, TEXT], 400, path)
    return tokenizers.Tokenizer.from_file(str(path))


def ids(definition: str, text: str) -> list[int]:
    return tokenizers.Tokenizer.from_str(definition).encode(text).ids


def there_and_back(tokenizer, size: int) -> str:
    metadata = vocabulary_to_gguf(tokenizer, size)
    return vocabulary_from_gguf(metadata, size).to_json()


def test_bytes_and_merges_give_the_same_ids(bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (ByteTokenizer(), Own(bpe)):
        back = there_and_back(tokenizer, 512)  # a model with more rows than the tokenizer has ids
        for text in (TEXT, "", " ", "a" * 50):
            assert ids(back, text) == ids(tokenizer.to_json(), text)
        path = tmp_path / "tokenizer.json"
        path.write_text(back)
        again = load_tokenizer(str(path))
        assert again.eos_id == tokenizer.eos_id
        assert again.decode(again.encode(TEXT)) == TEXT
    assert ids(there_and_back(ByteTokenizer(), 257), "é") == list("é".encode())


@pytest.mark.parametrize("name", ["smollm", "llama-bpe"])
def test_rules_that_cut_words_are_told_apart(name: str, bpe: tokenizers.Tokenizer) -> None:
    definition = json.loads(bpe.to_str())
    plain = ids(bpe.to_str(), TEXT)
    inner = tokenizers.Tokenizer.from_str(bpe.to_str())
    if name == "smollm":
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
        )
    else:
        pattern = tokenizers.Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
            r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        )
        definition = json.loads(inner.to_str())
        definition["model"]["ignore_merges"] = True
        inner = tokenizers.Tokenizer.from_str(json.dumps(definition))
    metadata = vocabulary_to_gguf(Own(inner), 400)
    assert metadata["tokenizer.ggml.pre"] == name
    back = vocabulary_from_gguf(metadata, 400).to_json()
    assert ids(back, TEXT) == ids(inner.to_str(), TEXT) != plain


def test_a_beginning_of_text_stays(bpe: tokenizers.Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(bpe.to_str())
    inner.add_special_tokens(["<s>"])
    bos = inner.token_to_id("<s>")
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    metadata = vocabulary_to_gguf(Own(inner), 401)
    assert metadata["tokenizer.ggml.add_bos_token"]
    assert metadata["tokenizer.ggml.bos_token_id"] == bos
    back = vocabulary_from_gguf(metadata, 401).to_json()
    assert ids(back, "a b") == ids(inner.to_str(), "a b")
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A <s>", special_tokens=[("<s>", bos)]
    )
    with pytest.raises(UserError, match="puts 2 tokens around"):
        vocabulary_to_gguf(Own(inner), 401)


def test_tokenizers_without_a_name_in_llama_cpp_are_refused(bpe: tokenizers.Tokenizer) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    lower = tokenizers.Tokenizer.from_str(bpe.to_str())
    lower.normalizer = tokenizers.normalizers.Lowercase()
    spaced = tokenizers.Tokenizer.from_str(bpe.to_str())
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for inner in (words, lower, spaced):
        with pytest.raises(UserError, match="has no GGUF form here"):
            vocabulary_to_gguf(Own(inner), 400)
    with pytest.raises(UserError, match="vocab_size=300 is less than"):
        vocabulary_to_gguf(Own(bpe), 300)


def test_no_tokenizer_is_said_and_not_read_as_one() -> None:
    metadata = vocabulary_to_gguf(None, 5)
    with pytest.raises(UserError, match="'no_vocab'"):
        vocabulary_from_gguf(metadata, 5)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model", "llama", "is not read"),
        ("pre", "qwen9", "is not read"),
        ("tokens", ["a"], "has 1 entries"),
        ("tokens", np.arange(3), "lists of texts"),
        ("token_type", np.ones(3, np.int32), "an entry a token"),
        ("eos_token_id", np.uint32(999), "eos_token_id=999"),
        ("merges", ["ab"], "'ab', not two tokens"),
        ("merges", ["no such"], "is no tokenizer"),
        ("tokens", ["same"] * 257, "twice"),
    ],
)
def test_broken_vocabularies_are_refused(key: str, value, says: str) -> None:
    metadata = vocabulary_to_gguf(ByteTokenizer(), 257) | {f"tokenizer.ggml.{key}": value}
    if key == "tokens" and isinstance(value, list):
        metadata["tokenizer.ggml.token_type"] = np.ones(len(value), np.int32)
    with pytest.raises(UserError, match=says):
        vocabulary_from_gguf(metadata, 257)
