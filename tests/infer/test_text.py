"""Text from tokens as they come: pieces add up, and stop strings are not shown."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data import BPETokenizer, ByteTokenizer, Tokenizer, train_bpe
from slm_jax.infer import RowText

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> BPETokenizer:
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return train_bpe(["aé 世界 aé 世 so long so long"] * 3, 268, file)


def pieces(
    tokenizer: Tokenizer, prompt: np.ndarray, tokens: list[int], stop: tuple[str, ...] = ()
) -> list[str]:
    text = RowText(tokenizer, prompt, stop)
    out = [text.take()]
    for token in tokens:
        text.push(token)
        out.append(text.take())
    text.end()
    return [piece for piece in [*out, text.take()] if piece]


@settings(max_examples=60)
@given(tokens=st.lists(st.sampled_from([0xE4, 0xB8, 0x96, 0xC3, 0xA9, 0xF0, 0x9F, 0x41, 256])))
def test_pieces_of_bytes_add_up(tokens: list[int]) -> None:
    prompt = BYTES.encode("世")
    assert "".join(pieces(BYTES, prompt, tokens)) == BYTES.decode([*prompt, *tokens])


@settings(max_examples=60)
@given(tokens=st.lists(st.integers(1, 267)))
def test_pieces_of_byte_pairs_add_up(bpe: BPETokenizer, tokens: list[int]) -> None:
    prompt = bpe.encode("aé")
    assert "".join(pieces(bpe, prompt, tokens)) == bpe.decode([*prompt, *tokens])


def test_pieces_wait_for_whole_characters_only() -> None:
    got = pieces(BYTES, BYTES.encode("a"), [*"é!世".encode(), 999, 0xE4])
    assert got == ["a", "é", "!", "世", "\ufffd", "\ufffd"]


@settings(max_examples=200)
@given(
    text=st.text(alphabet="abé", max_size=12),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=2),
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    prompt = BYTES.encode("ab")  # what it ends with begins no stop string
    row = RowText(BYTES, prompt, stop)
    shown = row.take()
    stopped_at = None
    for i, token in enumerate(text.encode()):
        if row.push(token) and stopped_at is None:
            stopped_at = i
        shown += row.take()
        assert ("ab" + text).startswith(shown)  # nothing has to be taken back
    row.end()
    shown += row.take()
    found = [text.index(s) for s in stop if s in text]
    assert shown == "ab" + (text[: min(found)] if found else text)
    assert row.stopped == bool(found)
    if found:  # at the token that completes one of them
        ends = [len(text[: text.index(s) + len(s)].encode()) for s in stop if s in text]
        assert stopped_at == min(ends) - 1


def test_a_stop_string_may_span_tokens(bpe: BPETokenizer) -> None:
    ids = bpe.encode("so long so long")
    assert len(ids) < len("so long so long")
    got = pieces(bpe, bpe.encode("aé"), ids.tolist(), ("g s",))
    assert "".join(got) == "aéso lon"
    assert len(got) > 2
