"""A byte-level BPE tokenizer as the metadata of a GGUF file, and back.

llama.cpp knows the rule that cuts a text into words by name only (`tokenizer.ggml.pre`), so only
tokenizers with one of those rules can be written. A tokenizer of bytes is one without merges.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from slm_jax.errors import UserError
from slm_jax.models.hf import HFTokenizer

# llama.cpp's kinds of tokens.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_WITHOUT = "or leave the tokenizer out (--no-tokenizer)"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


_STEPS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
    "llama-bpe": [_split(_LLAMA3), _byte_level(False)],
}
"""How a text is cut, in the words of the `tokenizers` library, by llama.cpp's name."""
_WHOLE_WORDS = ("llama-bpe",)
"""Rules under which a word that is a token is never built from merges."""


@dataclass(frozen=True)
class GGUFTokenizer:
    """The tokenizer of a file.

    Attributes:
        vocab_size: every id is below this.
        eos_id: the id that ends every document.
        json: the text of its tokenizer.json.
    """

    vocab_size: int
    eos_id: int
    json: str

    def to_json(self) -> str:
        """The text of its tokenizer.json, as the `tokenizers` library writes it."""
        return self.json


def vocabulary_to_gguf(tokenizer: HFTokenizer | None, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a model.

    Args:
        tokenizer: a byte-level BPE; `None` writes a file that takes and gives ids only.
        vocab_size: of the model; ids that the tokenizer does not have are marked as unused.

    Raises:
        UserError: if llama.cpp has no word for the tokenizer, or it has more ids than the model.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is less than the tokenizer's {tokenizer.vocab_size}: "
            "give the tokenizer the model was trained with"
        )
    definition = json.loads(tokenizer.to_json())
    model = definition["model"]
    pre = _rule_of(definition)
    kinds = np.full(vocab_size, _UNUSED, np.int32)
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    for token, i in model["vocab"].items():
        tokens[i], kinds[i] = token, _NORMAL
    for added in definition["added_tokens"]:
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
        tokens[added["id"]] = added["content"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    bos = _bos_of(definition)
    out: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": np.uint32(tokenizer.eos_id if bos is None else bos),
        "tokenizer.ggml.eos_token_id": np.uint32(tokenizer.eos_id),
        "tokenizer.ggml.add_bos_token": np.bool_(bos is not None),
        "tokenizer.ggml.add_eos_token": np.bool_(False),
        "tokenizer.ggml.add_space_prefix": np.bool_(False),
    }
    return out


def _rule_of(definition: Mapping[str, Any]) -> str:
    """llama.cpp's name of how the text is cut; UserError if it has none."""
    model = definition["model"]
    plain = model["type"] == "BPE" and not any(
        model.get(key)
        for key in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    )
    cut = definition["pre_tokenizer"] or {}
    steps = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    if plain and definition["normalizer"] is None:
        for name, wanted in _STEPS.items():
            same = len(steps) == len(wanted) and all(
                {key: step.get(key) for key in want} == want
                for step, want in zip(steps, wanted, strict=True)
            )
            if same and bool(model.get("ignore_merges")) == (name in _WHOLE_WORDS):
                return name
    kind = f"{model['type']}, {' + '.join(str(s.get('type')) for s in steps)}"
    raise UserError(
        f"tokenizer ({kind}) has no GGUF form here: only byte-level BPE cut by one of "
        f"{', '.join(_STEPS)}; take such a tokenizer {_WITHOUT}"
    )


def _bos_of(definition: Mapping[str, Any]) -> int | None:
    """The id put before every text, if there is one; UserError for anything else put in."""
    inner = tokenizers.Tokenizer.from_str(json.dumps(definition))
    ids = inner.encode("").ids
    if len(ids) > 1 or (ids and inner.encode("a").ids[:1] != ids):
        raise UserError(
            f"tokenizer puts {len(ids)} tokens around a text: llama.cpp puts one before it; "
            f"take another tokenizer {_WITHOUT}"
        )
    return ids[0] if ids else None


def vocabulary_from_gguf(metadata: Mapping[str, Any], vocab_size: int) -> GGUFTokenizer:
    """The tokenizer of a file.

    Args:
        metadata: of the file.
        vocab_size: of its model.

    Raises:
        UserError: if it is none that we read, or does not fit the model.
    """
    kind = metadata.get("tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in _STEPS:
        raise UserError(
            f"tokenizer.ggml.model={str(kind)[:60]!r}, tokenizer.ggml.pre={str(pre)[:60]!r} is not "
            f"read: only gpt2 with {', '.join(_STEPS)}; take another file {_WITHOUT}"
        )
    tokens, merges = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
    kinds = metadata.get("tokenizer.ggml.token_type")
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise UserError("tokenizer.ggml.tokens and merges must be lists of texts: copy it again")
    if kinds is None:
        kinds = np.full(len(tokens), _NORMAL)
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise UserError("tokenizer.ggml.token_type must have an entry a token: copy it again")
    if len(tokens) != vocab_size:
        raise UserError(
            f"tokenizer.ggml.tokens has {len(tokens)} entries, the model {vocab_size}: "
            "take a file where they agree"
        )
    if not isinstance(eos, int | np.integer) or not 0 <= eos < vocab_size:
        raise UserError(
            f"tokenizer.ggml.eos_token_id={str(eos)[:60]} must be below {vocab_size}: copy it again"
        )
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != _UNUSED}
    if len(vocab) != np.sum(np.asarray(kinds) != _UNUSED):
        raise UserError("tokenizer.ggml.tokens has a token twice: copy it again")
    pairs = [_pair(m) for m in merges]
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": bool(kinds[i] == _CONTROL),
        }
        for i, token in enumerate(tokens)
        if kinds[i] in (_CONTROL, _USER_DEFINED)
    ]
    steps = [{**s, **({"trim_offsets": True} if s["type"] == "ByteLevel" else {})}
             for s in _STEPS[pre]]  # fmt: skip
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}
        if len(steps) > 1
        else steps[0],
        "post_processor": _template(metadata, tokens),
        "decoder": {**_byte_level(True), "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS,
            "vocab": vocab,
            "merges": pairs,
        },
    }
    try:
        inner = tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises bare Exception
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"tokenizer.ggml.* is no tokenizer ({reason}): copy it again") from error
    return GGUFTokenizer(vocab_size, int(eos), inner.to_str())


def _pair(merge: str) -> list[str]:
    """The two halves of a merge; the first may begin with a space but not hold another."""
    at = merge.find(" ", 1)
    if at < 0:
        raise UserError(
            f"tokenizer.ggml.merges holds {merge[:60]!r}, not two tokens: copy it again"
        )
    return [merge[:at], merge[at + 1 :]]


def _template(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """The post-processor that puts the beginning of text before every text, if there is one."""
    if not metadata.get("tokenizer.ggml.add_bos_token", False):
        return None
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if not isinstance(bos, int | np.integer) or not 0 <= bos < len(tokens):
        raise UserError(
            f"tokenizer.ggml.bos_token_id={str(bos)[:60]} must be below {len(tokens)}: "
            "copy it again"
        )
    token = tokens[bos]
    start = {"SpecialToken": {"id": token, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    return {
        "type": "TemplateProcessing",
        "single": [start, text[0]],
        "pair": [start, *text],
        "special_tokens": {token: {"id": token, "ids": [int(bos)], "tokens": [token]}},
    }
