"""The parts of grammars and how they are put together: fixed text, tokens, free text up to a marker, sequences,
alternatives and repetitions.

llguidance lexes bytes, so a token that overruns a marker is read rightly. Parts become grammars of one document that
refer to each other by name; a name is a digest of what it names, so equal parts are compiled once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from pilotfish.text.grammar.grammar import Grammar

Marker = str | int
"""What ends a stretch of free text: a string, or the id of a special token (which text cannot contain)."""

_DIGITS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]", re.DOTALL)
"""An escape, or a set of characters."""
_ANY_TEXT = r"/(.|\n)*/"


def lark(text: str, *uses: Grammar) -> Grammar:
    """Return the grammar of a Lark text in llguidance's dialect, which may refer to the grammars that it `uses` as
    `@name_of(grammar)`. Nothing is checked."""
    return _document({"lark_grammar": text}, uses)


def json_value(schema: dict[str, Any] | bool) -> Grammar:
    """Return the grammar of a JSON schema that llguidance can compile as it is. Nothing is checked."""
    return _document({"json_schema": schema}, ())


def name_of(grammar: Grammar) -> str:
    """Return the name of a grammar's start, to write `@name` in a Lark text that uses it."""
    name: str = _entries(grammar)[0]["name"]
    return name


def literal(text: str) -> Grammar:
    """Return the grammar of exactly one text."""
    return lark(f"start: {_quoted(text)}")


def token(id: int) -> Grammar:
    """Return the grammar of exactly one token, special or not."""
    return lark(f"start: <[{id}]>")


def marker(marker: Marker) -> Grammar:
    return token(marker) if isinstance(marker, int) else literal(marker)


def pattern(regex: str) -> Grammar:
    """Return the grammar of the texts that a regular expression matches from end to end; Rust's syntax, and digits are
    those of ASCII. Nothing is checked."""
    own: str = json.loads(LLMatcher.grammar_from_regex(ascii_digits(regex)))["grammars"][0]["lark_grammar"]
    return lark(own)


def choice(texts: Sequence[str]) -> Grammar:
    """Return the grammar of any one of `texts`."""
    return lark("start: " + " | ".join(map(_quoted, texts)))


def any_text() -> Grammar:
    """Return the grammar of all texts, which may end anywhere."""
    return lark(f"start: {_ANY_TEXT}")


def text_until(end: Marker) -> Grammar:
    """Return the grammar of any text up to the first `end`, and `end` itself."""
    if isinstance(end, int):
        return lark(f"start: {_ANY_TEXT} <[{end}]>")
    return lark(f"start: text\ntext[lazy]: TEXT\nTEXT: {_ANY_TEXT} {_quoted(end)}")


def sequence(*parts: Grammar) -> Grammar:
    """Return the grammar of its parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return lark("start: " + " ".join(map(_reference, parts)), *parts)


def either(*parts: Grammar) -> Grammar:
    """Return the grammar of any one of its parts."""
    if len(parts) == 1:
        return parts[0]
    return lark("start: " + " | ".join(map(_reference, parts)), *parts)


def repeat(part: Grammar, least: int = 0, most: int | None = None, separator: Grammar | None = None) -> Grammar:
    """Return the grammar of `least` to `most` parts (None: any number), with a separator between two."""
    if separator is None or most == 1:
        times = "" if least == most == 1 else _times(least, most)
        return lark(f"start: {_reference(part)}{times}", part)
    if most == 0:
        return literal("")
    further = _times(max(least - 1, 0), None if most is None else most - 1)
    some = f"{_reference(part)} ({_reference(separator)} {_reference(part)}){further}"
    return lark(f"start: {some}" if least else f"start: ({some})?", part, separator)


def optional(part: Grammar) -> Grammar:
    return repeat(part, 0, 1)


def text_with_calls(trigger: Marker, call: Grammar, *, parallel: bool = True) -> Grammar:
    """Return the grammar of free text in which the rest of a call must follow each `trigger`.

    `call` is what comes after the trigger, with the end of the call. With `parallel` any number of calls and more text
    may follow; without, the answer ends with its first call.
    """
    opened = sequence(text_until(trigger), call)
    return sequence(repeat(opened), any_text()) if parallel else either(any_text(), opened)


def after_reasoning(answer: Grammar, end: Marker, begin: Marker | None = None) -> Grammar:
    """Return the grammar of an answer after reasoning, which is any text up to `end`, and at most two newlines.

    `begin`: None if the prompt has opened the reasoning; else what opens it, and the model may leave reasoning out.
    """
    gap = pattern(r"\n{0,2}")
    if begin is None:
        return sequence(text_until(end), gap, answer)
    return either(sequence(marker(begin), text_until(end), gap, answer), answer)


def ascii_digits(regex: str) -> str:
    r"""Write `\d` as [0-9], as JSON schema and most clients mean it; Rust's would be the digits of every script. Within
    [^...] it stays, where that excludes more."""
    return _DIGITS.sub(_ascii_digits, regex)


def _ascii_digits(match: re.Match[str]) -> str:
    if match[0] == r"\d":
        return "[0-9]"
    if match[0].startswith("[") and not match[0].startswith("[^"):
        return re.sub(r"\\(.)", lambda part: "0-9" if part[1] == "d" else part[0], match[0], flags=re.DOTALL)
    return match[0]


def _document(entry: dict[str, Any], uses: Sequence[Grammar]) -> Grammar:
    """Return the grammar of a document that starts with `entry`, followed by the entries of what it uses."""
    name = f"g{hashlib.sha256(json.dumps(entry).encode()).hexdigest()[:16]}"
    entries = {name: {"name": name, **entry}}
    for used in uses:
        entries |= {other["name"]: other for other in _entries(used)}
    return Grammar(json.dumps({"grammars": list(entries.values())}))


def _entries(grammar: Grammar) -> list[dict[str, Any]]:
    """Return the named grammars of a document, its start first."""
    if not grammar.source.lstrip().startswith("{"):
        return _entries(lark(grammar.source))
    entries: list[dict[str, Any]] = json.loads(grammar.source)["grammars"]
    return entries


def _reference(grammar: Grammar) -> str:
    return f"@{name_of(grammar)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _times(least: int, most: int | None) -> str:
    match least, most:
        case 0, None:
            return "*"
        case 1, None:
            return "+"
        case 0, 1:
            return "?"
    return f"{{{least},{'' if most is None else most}}}"
