"""OutputFormat: the form that a client demands of an answer, in terms that all endpoints share, and `build`, which
makes its grammar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLTokenizer

from pilotfish.errors import ParameterError
from pilotfish.text.grammar import compose
from pilotfish.text.grammar.compiling import check_grammar, check_schema
from pilotfish.text.grammar.ebnf import context_free
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.grammar.json_schema import prepare
from pilotfish.text.grammar.structural_tag import structural_tag

MAX_CHOICES = 10_000
MAX_CHOICE_LENGTH = 16 * 1024
MAX_PATTERN_LENGTH = 100_000

Kind = Literal["json_schema", "regex", "choice", "grammar", "structural_tag"]

ANY_OBJECT: dict[str, Any] = {"type": "object"}
"""The schema of `json_object`."""


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """What an answer must match."""

    kind: Kind
    value: Any
    """The schema, regular expression, list of strings, GBNF or Lark text, or structural tag, as the client sent it."""
    place: str
    """Where the client sent it, for errors, such as response_format.json_schema.schema."""
    whitespace: str | None = None
    """The white space to allow in JSON, as a regular expression, instead of ", " and ": "."""
    whitespace_place: str = "whitespace_pattern"


def build(form: OutputFormat, tokenizer: LLTokenizer) -> Grammar:
    """Return the checked grammar of a format. Raises ParameterError with the place at fault.

    It takes up to a second for a hostile format. Compiling is done without the GIL.
    """
    match form.kind:
        case "json_schema":
            return json_schema(form.value, form.place, tokenizer, form.whitespace, form.whitespace_place)
        case "structural_tag":
            grammar = structural_tag(
                form.value,
                form.place,
                lambda schema, place: json_schema(schema, place, tokenizer, form.whitespace, form.whitespace_place),
            )
        case "regex":
            grammar = regex(form.value, form.place)
        case "choice":
            grammar = choice(form.value, form.place)
        case "grammar":
            if not isinstance(form.value, str) or not form.value.strip():
                raise ParameterError(form.place, f"{form.place} must be the text of a grammar in GBNF or Lark")
            grammar = context_free(form.value, form.place)
    check_grammar(grammar, tokenizer, form.place)
    return grammar


def json_schema(
    schema: Any,
    place: str,
    tokenizer: LLTokenizer,
    whitespace: str | None = None,
    whitespace_place: str = "whitespace_pattern",
) -> Grammar:
    """Return the checked grammar of the JSON that a schema allows. Raises ParameterError with the place at fault."""
    prepared = prepare(schema, place, whitespace, whitespace_place)
    check_schema(prepared, tokenizer)
    return compose.json_value(prepared.schema)


def regex(pattern: Any, place: str) -> Grammar:
    """Return the grammar of the texts that a regular expression matches from end to end, with or without ^ and $."""
    if not isinstance(pattern, str) or not pattern:
        raise ParameterError(place, f"{place} must be a regular expression")
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ParameterError(place, f"{place} has {len(pattern)} characters, but may have at most {MAX_PATTERN_LENGTH}")
    return compose.pattern(pattern)


def choice(texts: Any, place: str) -> Grammar:
    """Return the grammar of any one of the strings."""
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ParameterError(place, f"{place} must be a list of strings, none of them empty")
    if len(texts) > MAX_CHOICES:
        raise ParameterError(place, f"{place} has {len(texts)} strings, but may have at most {MAX_CHOICES}")
    if (longest := max(map(len, texts))) > MAX_CHOICE_LENGTH:
        message = f"{place} has a string of {longest} characters, but each may have at most {MAX_CHOICE_LENGTH}"
        raise ParameterError(place, message)
    return compose.choice(list(dict.fromkeys(texts)))
