"""Gemma 3's tokenizer from its GGUF file: SentencePiece scores as merges, byte fallback, begin-of-text token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.checkpoints.catalog import resolve
from pilotfish.errors import ParameterError
from pilotfish.text.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.real_model

# What llama.cpp's server tokenizes the same file's texts to (/tokenize with add_special and parse_special).
KNOWN: dict[str, list[int]] = {
    "": [2],
    "hello": [2, 23391],
    "The capital of France is": [2, 818, 5279, 529, 7001, 563],
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n": [2, 105, 2364, 107, 2202, 106, 107, 105, 4368, 107],
    "\x07\x7f\ufffd ᚠ 𓀀": [2, 245, 251541, 238479, 236743, 463, 392, 398, 236743, 478, 385, 366, 366],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Load the tokenizer; the first time takes half a minute."""
    return load_tokenizer(resolve("gemma-3-270m"))


@pytest.mark.parametrize("text", KNOWN)
def test_tokens_are_llama_cpps(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == KNOWN[text]
    assert tokenizer.encode(text, add_special_tokens=False) == KNOWN[text][1:]


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_bytes_of_tokens_make_up_the_text(tokenizer: Tokenizer, text: str) -> None:
    """ "▁" is a space to the model, wherever it comes from."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (2, {1}, 262144)
    assert {0, 1, 2, 105, 106} <= tokenizer.special_ids
    assert tokenizer.decode([2, 23391, 1]) == "hello"
    assert tokenizer.encode("\n\n<end_of_turn>", add_special_tokens=False) == [108, 106]
    assert 108 not in tokenizer.special_ids


def test_a_base_model_takes_no_messages(tokenizer: Tokenizer) -> None:
    assert tokenizer.chat_template is None
    with pytest.raises(ParameterError, match="no chat template, so it cannot take messages: use /v1/completions"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
