from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from slm_jax.data import ByteTokenizer, Corpus, Stream

MakeStream = Callable[[Sequence[int]], Stream]


def make_stream_of(lengths: Sequence[int]) -> Stream:
    """Documents of these many tokens; token i of the stream has id i, so a row tells its place.

    Only the last token has to be an end of text for `Stream`, and it is whatever its id is.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    return Stream("made train", tokens, starts, int(sum(lengths)) - len(lengths), f"{lengths}")


@pytest.fixture
def make_stream() -> MakeStream:
    return make_stream_of


@pytest.fixture
def make_corpus() -> Callable[..., Corpus]:
    def make(*lengths: Sequence[int], weights: Sequence[float] = (1.0,)) -> Corpus:
        streams = tuple(make_stream_of(each) for each in lengths)
        return Corpus("made", ByteTokenizer(), streams, streams, tuple(weights))

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for every test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SLM_JAX_CACHE", str(folder))
    return folder
