"""Structural tags: free text in which tags follow grammars of their own, as vLLM takes them from xgrammar.

Both forms are read: the older one with `structures` and `triggers`, and the newer one with a `format`, which is a tree
of sequences, alternatives, tags and texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pilotfish.errors import ParameterError
from pilotfish.text.grammar import compose
from pilotfish.text.grammar.ebnf import context_free
from pilotfish.text.grammar.grammar import Grammar

MAX_DEPTH = 30

SchemaBuilder = Callable[[Any, str], Grammar]
"""Makes and checks the grammar of a JSON schema at a place."""


def structural_tag(value: Any, place: str, schema: SchemaBuilder) -> Grammar:
    """Return the grammar of a structural tag (an object, or its JSON) that a client sent as `place`. Raises
    ParameterError with the place at fault."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ParameterError(place, f"{place} is not valid JSON: {error}") from error
    reader = _Reader(schema)
    if isinstance(value, dict) and "structures" in value:
        return reader.older(value, place)
    if isinstance(value, dict) and "format" in value:
        return reader.read(value["format"], f"{place}.format", 0)
    raise ParameterError(
        place, f'{place} must be an object with "format", or with "structures" and "triggers", of structural tags'
    )


class _Reader:
    """Reads the parts of a structural tag. Places are those of errors."""

    def __init__(self, schema: SchemaBuilder) -> None:
        self._schema = schema
        self._kinds: dict[str, Callable[[dict[str, Any], str, int], Grammar]] = {
            "const_string": self._const,
            "json_schema": self._json_schema,
            "any_text": lambda form, place, depth: compose.any_text(),
            "grammar": lambda form, place, depth: context_free(_text(form, "grammar", place), f"{place}.grammar"),
            "regex": lambda form, place, depth: compose.pattern(_text(form, "pattern", place)),
            "sequence": self._sequence,
            "or": self._or,
            "tag": self._tag,
            "triggered_tags": self._triggered,
            "tags_with_separator": self._separated,
            "optional": lambda form, place, depth: compose.optional(self._content(form, place, depth)),
            "star": lambda form, place, depth: compose.repeat(self._content(form, place, depth)),
            "plus": lambda form, place, depth: compose.repeat(self._content(form, place, depth), 1),
        }

    def older(self, value: dict[str, Any], place: str) -> Grammar:
        """Return the grammar of {"structures": [{"begin", "schema", "end"}], "triggers": [...]}."""
        structures = _list(value, "structures", place)
        tags = []
        for i, tag in enumerate(structures):
            where = f"{place}.structures[{i}]"
            if not isinstance(tag, dict):
                raise ParameterError(where, f'{where} must be an object with "begin", "schema" and "end"')
            content = {"type": "json_schema", "json_schema": tag.get("schema", {})}
            tags.append({"type": "tag", "begin": tag.get("begin"), "content": content, "end": tag.get("end")})
        form = {"type": "triggered_tags", "triggers": value.get("triggers"), "tags": tags}
        return self._triggered(form, place, 0)

    def read(self, form: Any, place: str, depth: int) -> Grammar:
        if depth > MAX_DEPTH:
            raise ParameterError(place, f"{place} is nested more than {MAX_DEPTH} formats deep")
        kind = form.get("type") if isinstance(form, dict) else None
        if not isinstance(kind, str) or kind not in self._kinds:
            known = ", ".join(map(repr, self._kinds))
            raise ParameterError(place, f"{place} must be an object whose type is one of {known}, but it is {kind!r}")
        return self._kinds[kind](form, place, depth)

    def _content(self, form: dict[str, Any], place: str, depth: int) -> Grammar:
        return self.read(form.get("content"), f"{place}.content", depth + 1)

    def _const(self, form: dict[str, Any], place: str, depth: int) -> Grammar:
        return compose.literal(_text(form, "value", place))

    def _json_schema(self, form: dict[str, Any], place: str, depth: int) -> Grammar:
        if form.get("style", "json") != "json":
            raise ParameterError(f"{place}.style", f"{place}.style is {form['style']!r}, but must be 'json'")
        return self._schema(form.get("json_schema", True), f"{place}.json_schema")

    def _sequence(self, form: dict[str, Any], place: str, depth: int) -> Grammar:
        elements = _list(form, "elements", place)
        return compose.sequence(
            *(self.read(one, f"{place}.elements[{i}]", depth + 1) for i, one in enumerate(elements))
        )

    def _or(self, form: dict[str, Any], place: str, depth: int) -> Grammar:
        elements = _list(form, "elements", place)
        return compose.either(*(self.read(one, f"{place}.elements[{i}]", depth + 1) for i, one in enumerate(elements)))

    def _tag(self, form: Any, place: str, depth: int) -> Grammar:
        begin = _text(form, "begin", place)
        return compose.sequence(compose.literal(begin), self._rest(form, place, depth))

    def _rest(self, form: dict[str, Any], place: str, depth: int) -> Grammar:
        """Return what follows the beginning of a tag: its content and its end, any one of several ends."""
        end = form.get("end")
        ends = [one for one in (end if isinstance(end, list) else [end]) if isinstance(one, str)]
        if not ends or (isinstance(end, list) and len(ends) < len(end)):
            raise ParameterError(f"{place}.end", f"{place}.end must be a string or a list of strings")
        content = form.get("content")
        if isinstance(content, dict) and content.get("type") == "any_text" and all(ends):
            return compose.either(*map(compose.text_until, ends))
        return compose.sequence(self._content(form, place, depth), compose.choice(ends))

    def _triggered(self, form: dict[str, Any], place: str, depth: int) -> Grammar:
        """Return free text in which the rest of a tag must follow each trigger."""
        triggers = _list(form, "triggers", place)
        if not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise ParameterError(f"{place}.triggers", f"{place}.triggers must be a list of strings, none empty")
        opened: dict[str, list[Grammar]] = {trigger: [] for trigger in triggers}
        whole = []
        for i, tag in enumerate(_list(form, "tags", place)):
            where = f"{place}.tags[{i}]"
            begin, rest = _text(tag, "begin", where), self._rest(tag, where, depth + 1)
            trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
            if trigger is None:
                raise ParameterError(
                    f"{where}.begin", f"{where}.begin is {begin!r}, but must begin with one of the triggers"
                )
            opened[trigger].append(compose.sequence(compose.literal(begin[len(trigger) :]), rest))
            whole.append(compose.sequence(compose.literal(begin), rest))
        calls = [
            compose.sequence(compose.text_until(trigger), compose.either(*rests))
            for trigger, rests in opened.items()
            if rests
        ]
        call = compose.either(*calls)
        if form.get("stop_after_first"):
            return compose.either(*whole) if form.get("at_least_one") else compose.either(compose.any_text(), call)
        further = (compose.repeat(call), compose.any_text())
        return (
            compose.sequence(compose.either(*whole), *further)
            if form.get("at_least_one")
            else compose.sequence(*further)
        )

    def _separated(self, form: dict[str, Any], place: str, depth: int) -> Grammar:
        tags = [self._tag(tag, f"{place}.tags[{i}]", depth + 1) for i, tag in enumerate(_list(form, "tags", place))]
        least = int(bool(form.get("at_least_one")))
        most = 1 if form.get("stop_after_first") else None
        return compose.repeat(compose.either(*tags), least, most, compose.literal(_text(form, "separator", place)))


def _text(form: Any, key: str, place: str) -> str:
    value = form.get(key) if isinstance(form, dict) else None
    if not isinstance(value, str):
        raise ParameterError(f"{place}.{key}", f"{place}.{key} must be a string, but is {value!r:.80}")
    return value


def _list(form: dict[str, Any], key: str, place: str) -> list[Any]:
    value = form.get(key)
    if not isinstance(value, list) or not value:
        raise ParameterError(f"{place}.{key}", f"{place}.{key} must be a list that is not empty, but is {value!r:.80}")
    return value
