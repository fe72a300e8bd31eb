"""Calls written as Python: the reader, and the grammar of a call's arguments."""

from __future__ import annotations

import ast
import json
import keyword
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pilotfish.errors import ParameterError
from pilotfish.text.formats.calls import Calls
from pilotfish.text.grammar import compose
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.message import ContentText, Part

_HEAD = re.compile(r"\s*(?:[A-Za-z_][\w.]*\s*(?:\((?s:.*))?)?")
"""What the text of a call may begin with."""
_NAMES = {"true": True, "false": False, "null": None, "none": None}


@dataclass(slots=True)
class PythonCalls:
    """Calls as Python writes them, in a list or one a line: `[f(a=1), g(b="x")]`. A call is read when it is closed."""

    calls: Calls
    end: str
    """What closes them: "]", or a fence."""
    begin: str = ""
    """What the text begins with, if the marker was left to this reader: then only names of tools are calls."""
    _text: str = ""
    _at: int = 0
    _quote: str = ""
    _depth: int = 0
    _start: int = 0
    _called: bool = False

    def feed(self, text: str) -> tuple[list[Part], str | None]:
        if not self._text:
            self._at = self._start = len(self.begin)
        self._text += text
        if self.begin and self._at < 256 and not _HEAD.fullmatch(self._text, len(self.begin)):
            return [ContentText(self._text)], ""
        parts: list[Part] = []
        while self._at < len(self._text):
            at = self._at
            char = self._text[at]
            if self._quote:
                if char == "\\":
                    self._at += 1
                elif char == self._quote[0]:
                    following = self._text[at : at + len(self._quote)]
                    if len(following) < len(self._quote) and self._quote.startswith(following):
                        return parts, None
                    if following == self._quote:
                        self._at += len(self._quote) - 1
                        self._quote = ""
            elif char in "'\"":
                following = self._text[at : at + 3]
                if len(following) < 3 and following == char * len(following):
                    return parts, None
                self._quote = following if following == char * 3 else char
                self._at += len(self._quote) - 1
            elif self._depth == 0 and self._text.startswith(self.end, at):
                over = at + len(self.end)
                if not self._called:  # none of it was a call
                    parts, self._start = [ContentText(self._text[:over])], over
                return parts, self._text[over:]
            elif self._depth == 0 and self.end.startswith(self._text[at:]):
                return parts, None
            elif char in "([{":
                self._depth += 1
            elif char in ")]}":
                self._depth -= 1
                if self._depth == 0:
                    source = self._text[self._start : at + 1]
                    found = self._call(source.lstrip(" ,\t\r\n;"))
                    if not found and self._called:
                        parts.append(ContentText(source))
                    elif not found:
                        return [ContentText(self._text[: at + 1])], self._text[at + 1 :]
                    parts += found
                    self._start, self._called = at + 1, True
            self._at += 1
        return parts, None

    def finish(self) -> list[Part]:
        left = self._text[self._start :] if self._called else self._text
        return [ContentText(left)] if left.strip(" ,\n") else []

    def _call(self, source: str) -> list[Part]:
        """Return the parts of a call; none if it is not one."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that only JSON or regular expressions know
                node = ast.parse(source, mode="eval").body
            while isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and len(node.args) == 1:
                node = node.args[0]
            if not isinstance(node, ast.Call):
                return []
            name = ast.unparse(node.func).removeprefix("default_api.")
            if self.begin and name not in self.calls.names:
                return []
            keys = list(self.calls.names.get(name, ()))
            given = [*zip(keys, node.args, strict=False), *((each.arg, each.value) for each in node.keywords)]
            if len(node.args) > len(keys) or any(key is None for key, _ in given):
                return []
            pairs = [f"{json.dumps(key)}: {_json(source, value)}" for key, value in given]
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return []
        return [self.calls.begin(name), self.calls.arguments("{" + ", ".join(pairs) + "}")]


def _json(source: str, node: ast.expr) -> str:
    """Return a literal as JSON: as it is written, if it is JSON. Raises ValueError or TypeError for what JSON lacks."""
    written = ast.get_source_segment(source, node) or ""
    try:
        json.loads(written, parse_constant=_refuse)
    except ValueError:
        value = _plain(node)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if text.isascii() or _encodable(text) else json.dumps(value)
    return written


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True


def _plain(node: ast.expr) -> Any:
    """Return the value of a literal; also true, false and null, which models write."""
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    match node:
        case ast.List(elements) | ast.Tuple(elements):
            return [_plain(each) for each in elements]
        case ast.Dict(keys, values):
            pairs = zip(keys, values, strict=True)
            return {str(ast.literal_eval(key)): _plain(value) for key, value in pairs if key is not None}
    return ast.literal_eval(node)


def python_keywords(arguments: dict[str, Any]) -> str:
    """Return arguments as Python's keyword arguments, with values as JSON."""
    return ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())


def python_arguments(
    schema: dict[str, Any], place: str, build: Callable[[Any, str, Any], Grammar], strict: bool
) -> Grammar:
    """Return the grammar of keyword arguments: those of the schema's properties, in their order, with values as JSON.

    `build`: makes the grammar of a schema at a place; the last argument is a schema to fall back on. Raises
    ParameterError for a property whose name cannot be written, if the schema requires it.
    """
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    uses, rules = [], []
    for key, value in properties.items():
        if not key.isidentifier() or not key.isascii() or keyword.iskeyword(key):
            if key in required:
                said = f"{place} requires {key!r}, which cannot be the name of an argument in Python"
                raise ParameterError(place, said)
            continue
        inner = value | shared if isinstance(value, dict) else value
        uses.append(build(inner, f"{place}.properties.{key}", {}))
        written = f'"{key}=" @{compose.name_of(uses[-1])}'
        n = len(uses)
        skip = ("", "") if key in required else (f" | later{n}", f" | first{n}")
        rules += [f'later{n - 1}: ", " {written} later{n}{skip[0]}', f"first{n - 1}: {written} later{n}{skip[1]}"]
    rules += [f'later{len(uses)}: ""', f'first{len(uses)}: ""']
    return compose.lark("\n".join(["start: first0", *rules]), *uses)
