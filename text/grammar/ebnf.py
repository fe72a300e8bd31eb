"""Context-free grammars as clients write them: GBNF, as llama.cpp and vLLM take it, or Lark in llguidance's dialect."""

from __future__ import annotations

import re

from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

from pilotfish.errors import ParameterError
from pilotfish.text.grammar.compose import lark
from pilotfish.text.grammar.grammar import Grammar

MAX_GRAMMAR_BYTES = 512 * 1024
MAX_WHITESPACE = 32

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
        return lark(text)
    try:
        return lark(gbnf_to_lark(_TERM.sub(_bounded, text)))
    except RecursionError:
        raise ParameterError(place, f"{place} is nested too deep") from None
    except Exception as error:  # its errors have no common type
        raise ParameterError(place, f"{place} is neither GBNF nor Lark: {error}") from error


def _bounded(term: re.Match[str]) -> str:
    """Bound the repetition of a set of white space; anything else stays as it is."""
    if term["times"] is None or not _WHITE.fullmatch(term["set"]):
        return term[0]
    return f"{term['set']}{{{int(term['times'] == '+')},{MAX_WHITESPACE}}}"
