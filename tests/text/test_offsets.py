"""Offsets of a text's tokens, where it spells special tokens and where the tokenizer adds some."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.text.detokenizer import Vocabulary
from pilotfish.text.offsets import token_offsets
from pilotfish.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return load_tokenizer(ModelFiles("tiny", "huggingface", tiny_llama))


@given(
    st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "light", " ", "water", "\n", "é", "🐟", "<|im_"])),
    st.booleans(),
)
def test_a_text_from_a_tokens_offset_on_begins_with_the_token(
    tokenizer: Tokenizer, parts: list[str], added: bool
) -> None:
    text = "".join(parts)
    ids = tokenizer.encode(text, add_special_tokens=False)
    offsets = token_offsets(text, [0, *ids] if added else ids, Vocabulary(tokenizer))
    if added:  # <|endoftext|>, as if the tokenizer had put it before
        assert offsets.pop(0) == 0
    for id_, at in zip(ids, offsets, strict=True):
        spelled = tokenizer.token(id_)
        if "\ufffd" not in spelled:  # a part of a character
            assert text.startswith(spelled, at), (spelled, at)
    assert offsets == sorted(offsets)
