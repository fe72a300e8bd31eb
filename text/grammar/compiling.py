"""Whether a grammar compiles, and if a schema does not, which part of it is at fault."""

from __future__ import annotations

import time

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from pilotfish.errors import ParameterError
from pilotfish.text.grammar.compose import json_value
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.grammar.json_schema import PreparedSchema, complete

LIMITS = LLParserLimits(verbose_errors=False)
"""llguidance's defaults: 20 ms for building a lexer, 14 ms of lexing in a step, 500,000 symbols, and so on."""
_SAID = {
    "NoExtension": "it allows no text at all",
    "oneOf constraints": "its alternatives of oneOf may overlap, which a grammar cannot rule out: use anyOf",
}
"""llguidance's messages, by how they begin, that clients would not understand."""
SLOW_SECONDS = 0.05
"""Of a processor's time for a mask, where most take tens of microseconds."""
MOST_FORCED_AT_FIRST = 16 * 1024
"""Tokens with which all answers begin. Of those that come later `matcher.MOST_FORCED` is what is looked for."""
SEARCH_SECONDS = 1.0
"""How long to look for the part of a schema that is at fault."""


def check_grammar(grammar: Grammar, tokenizer: LLTokenizer, place: str) -> None:
    """Compile the grammar that a client sent as `place`, which releases the GIL. Raises ParameterError with what
    llguidance says, if it does not compile or allows no token."""
    problem = _problem(grammar, tokenizer)
    if problem is not None:
        raise ParameterError(place, f"{place} {problem}")


def check_schema(prepared: PreparedSchema, tokenizer: LLTokenizer) -> None:
    """Compile a schema, as `check_grammar`. Raises ParameterError with the innermost place that does not compile."""
    problem = _problem(json_value(prepared.schema), tokenizer)
    if problem is None:
        return
    node, seen = prepared.root, {id(prepared.root)}
    options = prepared.options
    deadline = time.monotonic() + SEARCH_SECONDS
    while time.monotonic() < deadline:
        for child in node.children:
            if id(child) in seen or time.monotonic() > deadline:
                continue
            seen.add(id(child))
            own = _problem(json_value(complete(child.schema, prepared.definitions, options)), tokenizer)
            if own is not None:
                node, problem = child, own
                break
        else:
            break
    raise ParameterError(node.place, f"{node.place} {problem}")


def _problem(grammar: Grammar, tokenizer: LLTokenizer) -> str | None:
    """Return what is wrong with a grammar, to follow the parameter's name, or None."""
    matcher = LLMatcher(tokenizer, grammar.source, log_level=0, limits=LIMITS)
    if not matcher.is_error() and not matcher.is_accepting():
        forced = matcher.compute_ff_tokens()
        if len(forced) > MOST_FORCED_AT_FIRST or (matcher.is_error() and "ff_tokens" in matcher.get_error()):
            return f"is too large: all answers would begin with the same {MOST_FORCED_AT_FIRST} tokens and more"
        if not matcher.is_error() and _is_slow(matcher):
            return "takes too long to follow: each token would hold up others"
        if matcher.is_stopped() and not matcher.is_error():
            return "allows no text at all"
    if not matcher.is_error():
        return None
    return f"cannot be compiled: {_message(matcher.get_error())}"


def _is_slow(matcher: LLMatcher) -> bool:
    """Compute a mask, and say whether it takes long each time: the first one makes the lexer."""
    for _ in range(2):
        started = time.thread_time()
        matcher.compute_bitmask()
        if time.thread_time() - started < SLOW_SECONDS:
            return False
    return True


def _message(error: str) -> str:
    """Return the part of llguidance's message that says what is wrong, in one line."""
    lines = [line.strip() for line in error.partition("\n<state>")[0].splitlines() if line.strip(" ^")]
    last = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    text = last or " ".join(lines)
    for said, meant in _SAID.items():
        if text.startswith(said):
            return meant
    text = text.partition("; following special tokens are available")[0]
    return text if len(text) <= 300 else f"{text[:297]}..."
