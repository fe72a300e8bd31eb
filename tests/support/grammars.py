"""A small vocabulary for grammars, and random walks under their masks."""

from __future__ import annotations

import random
from functools import cache

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from pilotfish.text.grammar.compiling import LIMITS
from pilotfish.text.grammar.grammar import Grammar

END = 256
"""The token that ends an answer; those below are the bytes, those above some words."""
THINK_END = 257
WORDS = (
    '{"',
    '": ',
    '", "',
    '"}',
    ", ",
    ": ",
    "[]",
    "{}",
    "</think>",
    "true",
    "name",
    '": "',
    "\n\n",
    "  ",
    "12",
    "}]",
    "é",
)


class _Backend:
    eos_token_id = END
    bos_token_id = None
    tokens = (
        *(bytes([byte]) for byte in range(256)),
        b"<end>",
        b"<end of thought>",
        *(word.encode() for word in WORDS),
    )
    special_token_ids = (END, THINK_END)

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


@cache
def byte_tokenizer() -> LLTokenizer:
    """Return a tokenizer of bytes and a few words that overrun what a JSON parser tells apart."""
    return LLTokenizer(TokenizerWrapper(_Backend()))


def matcher_of(grammar: Grammar) -> LLMatcher:
    matcher = LLMatcher(byte_tokenizer(), grammar.source, log_level=0, limits=LIMITS)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether a grammar allows exactly this text."""
    matcher = matcher_of(grammar)
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def begins(grammar: Grammar, text: str) -> bool:
    """Whether a grammar allows this beginning."""
    tokens = list(text.encode())
    return matcher_of(grammar).try_consume_tokens(tokens) == len(tokens)


def random_answer(grammar: Grammar, rng: random.Random, limit: int = 3000) -> str | None:
    """Draw an answer under the grammar's masks; None if it is not over after `limit` tokens.

    Tokens that close something are drawn more often the longer the answer is, so that most answers end.
    """
    matcher = matcher_of(grammar)
    drawn = bytearray()
    for count in range(limit):
        mask = matcher.compute_bitmask()
        allowed = [id_ for id_ in range(len(_Backend.tokens)) if mask[id_ >> 3] >> (id_ & 7) & 1]
        assert allowed, f"no token is allowed after {bytes(drawn)!r}"
        closing = [id_ for id_ in allowed if id_ in (END, *b'"}]')]
        id_ = rng.choice(closing if closing and rng.random() < 0.05 + count / 200 else allowed)
        assert matcher.consume_token(id_), matcher.get_error()
        if id_ == END:
            return drawn.decode()
        drawn += _Backend.tokens[id_] if id_ != THINK_END else b"<end of thought>"
        if matcher.is_stopped():
            return drawn.decode()
    return None
