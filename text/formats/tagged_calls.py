"""Calls with a tag around each argument, whose value is text: the readers and grammars of Qwen3-Coder's and GLM's."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pilotfish.errors import ParameterError
from pilotfish.text.formats.calls import MAX_NAME, Calls
from pilotfish.text.grammar import compose
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.message import ContentText, Part

_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """What stands around the parts of a call. White space next to tags is skipped, but for that of values."""

    before_name: str = ""
    after_name: tuple[str, ...]
    """What may end a name; what is no white space belongs to what follows."""
    before_key: str
    after_key: str
    before_value: str
    """Right before a value."""
    after_value: str
    """Right after a value."""
    end: str
    """What ends a call."""
    before_end: str = ""
    """What may come before the end."""


QWEN_CODER = Tags(
    before_name="<function=",
    after_name=(">",),
    before_key="<parameter=",
    after_key=">",
    before_value="\n",
    after_value="\n</parameter>",
    before_end="</function>",
    end="</tool_call>",
)
GLM = Tags(
    after_name=("\n", "<arg_key>", "</tool_call>"),
    before_key="<arg_key>",
    after_key="</arg_key>",
    before_value="<arg_value>",
    after_value="</arg_value>",
    end="</tool_call>",
)


@dataclass(slots=True)
class TaggedCall:
    """One call up to the tag that ends it. An argument is read when its tag is closed."""

    calls: Calls
    tags: Tags
    _held: str = ""
    _types: Mapping[str, Any] | None = None
    """The schemas of its arguments, once its name is known."""
    _key: str | None = None
    _count: int = 0
    _searched: int = 0
    """Characters of the held text in which the end of a value does not begin."""

    def feed(self, text: str) -> tuple[list[Part], str | None]:
        self._held += text
        parts: list[Part] = []
        while True:
            over = self._named(parts) if self._types is None else self._read(parts)
            if over is None:
                return parts, None
            if over:
                rest, self._held = self._held, ""
                return parts, rest

    def finish(self) -> list[Part]:
        if self._types is None:
            return [ContentText(self._held)] if self._held.strip() else []
        return []

    def _named(self, parts: list[Part]) -> bool | None:
        """Read the name. Returns whether this is over, as what is no call is; None to wait."""
        tags, text = self.tags, self._held.lstrip()
        begin = tags.before_name
        if not text.startswith(begin):
            return None if begin.startswith(text) else True
        text = text[len(begin) :]
        ends = [(at, each) for each in tags.after_name if (at := text.find(each)) >= 0]
        if not ends:
            return None if len(text) < MAX_NAME else True
        at, end = min(ends)
        name = text[:at].strip()
        if not _NAME.fullmatch(name):
            return True
        self._held = text[at:] if end in (tags.before_key, tags.end) else text[at + len(end) :]
        self._types = self.calls.names.get(name, {})
        parts.append(self.calls.begin(name))
        return False

    def _read(self, parts: list[Part]) -> bool | None:
        """Read an argument, or the end."""
        tags = self.tags
        if self._key is None:
            text = self._held.lstrip()
            if tags.before_end and text.startswith(tags.before_end):
                text = text[len(tags.before_end) :].lstrip()
            if text.startswith(tags.before_key):
                at = text.find(tags.after_key, len(tags.before_key))
                if at < 0:
                    return None
                self._key = text[len(tags.before_key) : at].strip()
                self._held = text[at + len(tags.after_key) :]
                return False
            whole = text.startswith(tags.end)
            if not whole and any(each.startswith(text) for each in (tags.before_key, tags.before_end, tags.end)):
                return None
            parts.append(self.calls.arguments("}" if self._count else "{}"))
            self._held = text[len(tags.end) :] if whole else text
            return True
        at = self._held.find(tags.after_value, self._searched)
        if at < 0:
            self._searched = max(0, len(self._held) - len(tags.after_value) + 1)
            return None
        self._searched = 0
        value, self._held = self._held[:at], self._held[at + len(tags.after_value) :]
        value = _after(value, tags.before_value)
        assert self._types is not None
        written = f"{json.dumps(self._key, ensure_ascii=False)}: {as_json(value, self._types.get(self._key))}"
        parts.append(self.calls.arguments((", " if self._count else "{") + written))
        self._key, self._count = None, self._count + 1
        return False


def _after(text: str, marker: str) -> str:
    """Return what follows a marker, which may have white space before it; without one, the text."""
    found = text.lstrip() if marker.strip() else text
    return found[len(marker) :] if found.startswith(marker) else text


def as_json(text: str, schema: Any) -> str:
    """Return a value that is written as text as JSON: a string, unless its schema says otherwise."""
    types = _types(schema)
    if types != ["string"]:
        try:
            value = json.loads(text, parse_constant=_refuse)  # NaN is no JSON
        except (ValueError, RecursionError):
            value = None
            if types and "string" not in types:
                return _literal(text)
        else:
            # "7" and "true" are what a schema of strings or nothing means by them
            if not isinstance(value, str) or "string" not in types:
                return text.strip()
    return _string(text)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _string(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(text)
    return json.dumps(text, ensure_ascii=False)


def _literal(text: str) -> str:
    """Return a literal of Python, such as True, as JSON; what is none is a string."""
    try:
        return json.dumps(ast.literal_eval(text.strip()), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return _string(text)


def _types(schema: Any) -> list[str]:
    """Return the types that a schema names at its top; of an enumeration of strings, that one."""
    if not isinstance(schema, dict):
        return []
    named = schema.get("type")
    if isinstance(named, str):
        return [named]
    if isinstance(named, list):
        return [each for each in named if isinstance(each, str)]
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return ["string"] if isinstance(values, list) and values and all(isinstance(each, str) for each in values) else []


def as_text(value: Any) -> str:
    """Return a value as a model writes it in tags."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def qwen_arguments(arguments: dict[str, Any]) -> str:
    return "".join(f"<parameter={key}>\n{as_text(value)}\n</parameter>\n" for key, value in arguments.items())


def glm_arguments(arguments: dict[str, Any]) -> str:
    return "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{as_text(value)}</arg_value>\n" for key, value in arguments.items()
    )


def tagged_arguments(
    tags: Tags, schema: dict[str, Any], place: str, build: Callable[[Any, str, Any], Grammar], strict: bool
) -> Grammar:
    """Return the grammar of arguments in tags: those of the schema's properties, in their order.

    `build`: makes the grammar of a schema at a place; the last argument is a schema to fall back on. Raises
    ParameterError for a property whose name cannot be written, if the schema requires it, and with `strict` for strings
    that only JSON's grammar can hold to their schema.
    """
    properties, required = schema.get("properties"), schema.get("required")
    properties = properties if isinstance(properties, dict) else {}
    required = required if isinstance(required, list) else []
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts = []
    for key, value in properties.items():
        if not key or key != key.strip() or any(char in "<>\n" for char in key):
            if key in required:
                raise ParameterError(place, f"{place} requires {key!r}, which cannot be written in this model's calls")
            continue
        at, gap = f"{place}.properties.{key}", "\n" if tags.before_value != "\n" else ""
        begin = compose.literal(f"{tags.before_key}{key}{tags.after_key}{gap}{tags.before_value}")
        end = f"{tags.after_value}\n"
        if _types(value) == ["string"] and not (isinstance(value, dict) and "enum" in value):
            one = compose.sequence(begin, _free_text(value, at, end, build, strict))
        elif _types(value) == ["string"]:
            texts = [each for each in value["enum"] if isinstance(each, str)]
            one = compose.sequence(begin, compose.choice(texts), compose.literal(end))
        else:
            inner = value | shared if isinstance(value, dict) else value
            one = compose.sequence(begin, build(inner, at, {}), compose.literal(end))
        parts.append(one if key in required else compose.optional(one))
    return compose.sequence(*parts) if parts else compose.literal("")


def _free_text(
    schema: dict[str, Any], place: str, end: str, build: Callable[[Any, str, Any], Grammar], strict: bool
) -> Grammar:
    """Return the grammar of a string's text, and the end."""
    build(schema, place, {})  # checks it
    unheld = next((key for key in ("pattern", "format", "const") if key in schema), None)
    if unheld is not None and strict:
        message = f"{place}.{unheld} cannot be enforced with this model, which writes strings without quotes"
        raise ParameterError(f"{place}.{unheld}", message)
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if not least and most is None:
        return compose.text_until(end)
    times = f"{{{least},{'' if most is None else most}}}"
    return compose.lark(f"start: text\ntext[lazy]: TEXT\nTEXT: /(.|\\n){times}/ {json.dumps(end)}")
