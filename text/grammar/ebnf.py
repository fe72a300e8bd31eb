"""Context-free grammars as clients write them: GBNF, as llama.cpp and vLLM take it, or Lark in llguidance's dialect."""

from __future__ import annotations

import json
import re

from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

from pilotfish.errors import ParameterError
from pilotfish.text.grammar.compose import lark
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.grammar.json_schema import prepare

MAX_GRAMMAR_BYTES = 512 * 1024
MAX_WHITESPACE = 32

_JSON = re.compile(r"%json\s*")
_TERM = re.compile(
    r"""(?P<literal>"(?:\\.|[^"\\])*")|(?P<comment>[#][^\n]*)|(?P<set>\[(?:\\.|[^]\\])*\])(?P<times>[*+])?""", re.DOTALL
)
_WHITE = re.compile(r"\[(?: |\\[tnr]|\\x(?:20|09|0[aA]|0[dD])|[\t\n\r])+\]")


def context_free(text: str, place: str) -> Grammar:
    """Return the grammar that a client wrote as `place`: Lark if it has a rule `start:`, else GBNF.

    Repetitions of white space in GBNF end after MAX_WHITESPACE. Raises ParameterError for GBNF that cannot be read;
    whether the grammar compiles is not checked.
    """
    if len(text) > MAX_GRAMMAR_BYTES:
        raise ParameterError(place, f"{place} has {len(text)} characters, but may have at most {MAX_GRAMMAR_BYTES}")
    if is_lark_syntax(text):
        return lark(_checked_schemas(text, place))
    try:
        return lark(gbnf_to_lark(_TERM.sub(_bounded, text)))
    except RecursionError:
        raise ParameterError(place, f"{place} is nested too deep") from None
    except Exception as error:  # its errors have no common type
        raise ParameterError(place, f"{place} is neither GBNF nor Lark: {error}") from error


def _checked_schemas(text: str, place: str) -> str:
    """Return a Lark text in which the JSON schemas (`%json {...}`) are those of `json_schema.prepare`. Raises
    ParameterError."""
    parts, at = [], 0
    for found in _JSON.finditer(text):
        if found.start() < at:
            continue
        try:
            schema, end = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError) as error:
            raise ParameterError(
                place, f"{place} has a %json without a valid JSON schema behind it: {error}"
            ) from error
        parts += [text[at : found.end()], json.dumps(prepare(schema, f"{place}.%json").schema)]
        at = end
    return "".join([*parts, text[at:]])


def _bounded(term: re.Match[str]) -> str:
    """Bound the repetition of a set of white space; anything else stays as it is."""
    if term["times"] is None or not _WHITE.fullmatch(term["set"]):
        return term[0]
    return f"{term['set']}{{{int(term['times'] == '+')},{MAX_WHITESPACE}}}"
