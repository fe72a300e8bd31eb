"""The fewest tokens that a text can have, without tokenizing it: so that a text that cannot fit is refused at once.

Each byte is worth 1/n of a token, where n is the length in bytes of the longest token with that byte in it. The bytes
of a token are then worth at most one token together, whichever they are, and a text is at least as many tokens as its
bytes are worth. A long run of spaces in the vocabulary thus says nothing about letters. Bytes that may vanish on the
way to the model are worth nothing; a tokenizer that may drop or merge any text has no bound but 0.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

_SLICE = 2**18
"""Characters that are looked at without letting another thread run."""
_AT_A_CUT = 32
"""Bytes that normalization may compose across the cut between two slices; four would be many."""
_SPACE = "▁"
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_WHITE = "".join(char for char in map(chr, range(0x3001)) if char.isspace())

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]


class LengthBound:
    """The bound for the texts of one tokenizer. `token_bytes` returns the bytes that a token stands for; `byte_level`:
    its decoder has GPT-2's byte alphabet."""

    def __init__(self, backend: Backend, token_bytes: Callable[[int], bytes], byte_level: bool) -> None:
        self._forms: tuple[Form, ...] = ()
        self._worth: npt.NDArray[np.float64] = np.zeros(256)
        state = json.loads(backend.to_str())
        kept = _kept_bytes(state, byte_level)
        if kept:
            self._forms = cast("tuple[Form, ...]", tuple(_kinds(state["normalizer"], "normalizers", _FORMS)))
            longest = _longest(map(token_bytes, backend.get_vocab(with_added_tokens=True).values()))
            for byte in kept:
                self._worth[byte] = 1 / longest[byte] if longest[byte] else 0

    def at_least(self, text: str, enough: int) -> int:
        """Return a number of tokens that `text` has at least, without special tokens put around it; counting ends where
        it reaches `enough`."""
        sure = 0.0
        if not self._worth.any():
            return 0
        for start in range(0, len(text), _SLICE):
            part = text[start : start + _SLICE]
            if all(unicodedata.is_normalized(form, part) for form in self._forms):
                data = np.frombuffer(part.encode("utf-8", "ignore"), np.uint8)
                sure += float(np.bincount(data, minlength=256) @ self._worth)
            if self._forms:
                sure -= _AT_A_CUT
            if sure >= enough + 1:
                break
        return max(0, int(sure - 1e-3))


def _longest(tokens: Iterable[bytes]) -> list[int]:
    """Return, for each byte, the length of the longest token that has it; 0 if none has."""
    longest = [0] * 256
    missing = set(range(256))
    for token in sorted(tokens, key=len, reverse=True):
        if found := missing.intersection(token):
            for byte in found:
                longest[byte] = len(token)
            missing -= found
            if not missing:
                break
    return longest


def _kept_bytes(state: dict[str, Any], byte_level: bool) -> frozenset[int]:
    """Return the bytes that always arrive in tokens that spell them, as tokenizer.json says; none if that is unsure."""
    model, vocabulary = state["model"], state["model"].get("vocab")
    if model["type"] == "Unigram":
        vocabulary = {token for token, _ in vocabulary}
    elif model["type"] != "BPE" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return frozenset()
    try:
        normalizers = _kinds(state["normalizer"], "normalizers", (*_FORMS, "Prepend", "Replace"))
        steps = _kinds(
            state["pre_tokenizer"], "pretokenizers", ("ByteLevel", "Digits", "Split", "Punctuation", "Metaspace")
        )
    except ValueError:
        return frozenset()
    if byte_level != ("ByteLevel" in steps):
        return frozenset()
    if byte_level:
        kept = {byte for char, byte in byte_alphabet().items() if char in vocabulary}
    elif all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)) and model.get("byte_fallback"):
        kept = set(range(256))
    else:
        kept = {byte for byte in range(128) if (_SPACE if byte == 0x20 else chr(byte)) in vocabulary}
    if "Replace" in normalizers or "Metaspace" in steps or not byte_level:
        kept -= set(_SPACE.encode())  # three bytes of text that may be one of the token's
    if any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"]):
        kept -= set(_WHITE.encode())  # white space beside such a token is part of it
    return frozenset(kept)


def _kinds(step: dict[str, Any] | None, parts: str, known: tuple[str, ...]) -> list[str]:
    """Return the types of a step and of its parts that are in `known`. Raises ValueError for one that may drop text;
    with only normal forms in `known`, others are left out."""
    if step is None:
        return []
    kinds = []
    for part in step[parts] if step["type"] == "Sequence" else [step]:
        if part["type"] == "Sequence":
            kinds += _kinds(part, parts, known)
        elif part["type"] in known and _keeps_text(part):
            kinds.append(part["type"])
        elif known is not _FORMS:
            raise ValueError(part["type"])
    return kinds


def _keeps_text(part: dict[str, Any]) -> bool:
    if part["type"] == "Replace":
        return bool(part["pattern"] == {"String": " "} and part["content"] == _SPACE)
    if part["type"] == "Metaspace":
        return bool(part["replacement"] == _SPACE)
    return part.get("behavior") != "Removed"


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's spelling of bytes: printable Latin-1 stands for itself, U+0100 and on for the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
