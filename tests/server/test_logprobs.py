"""OpenAI's forms of log-probabilities, for tokens that are parts of characters and values that are not finite."""

from __future__ import annotations

import msgspec

from pilotfish.engine.request import TokenLogprobs
from pilotfish.server.generation.logprobs import chat_logprobs, completion_logprobs
from pilotfish.text.detokenizer import TokenEntry, Vocabulary


class Halves:
    """A tokenizer with the first byte of a character, and with all of it."""

    special_ids: frozenset[int] = frozenset()

    def token_bytes(self, id: int, /) -> bytes:
        return {5: "é".encode()[:1], 7: "é".encode()}[id]


VOCABULARY = Vocabulary(Halves())
HALF = TokenEntry(5, 1, TokenLogprobs(5, float("-inf"), ((7, -0.25), (5, float("-inf")))))


def test_completions_spell_a_part_of_a_character_in_bytes_and_infinity_as_a_number() -> None:
    form = completion_logprobs([TokenEntry(7, 0, None), HALF], VOCABULARY)
    assert msgspec.to_builtins(form) == {
        "tokens": ["é", "bytes:\\xc3"],
        "token_logprobs": [None, -9999.0],
        "top_logprobs": [None, {"é": -0.25, "bytes:\\xc3": -9999.0}],
        "text_offset": [0, 1],
    }


def test_a_chat_has_the_bytes_of_a_part_of_a_character_beside_its_replacement() -> None:
    half = {"token": "\ufffd", "logprob": -9999.0, "bytes": [0xC3]}
    whole = {"token": "é", "logprob": -0.25, "bytes": list("é".encode())}
    form = msgspec.to_builtins(chat_logprobs([HALF], VOCABULARY))
    assert form == {"content": [half | {"top_logprobs": [whole, half]}], "refusal": None}
