"""JSON schemas: from what a client sends to the schema that llguidance compiles.

Each keyword is checked at its place, so an error can name it. What remains describes the same values or fewer, never
others: an answer that it allows validates against the client's schema.

- White space is ", " between items and ": " after keys, as in Python's json, so that nothing loops and keys, quotes and
  braces are forced; a client may give another pattern.
- Objects that list properties have no others unless the schema says so with additionalProperties, and their properties
  come in the schema's order.
- Annotations and unknown keywords are left out, and so are formats that llguidance does not know. Dates and times are
  those of the calendar.
- References are resolved: each schema that is referred to becomes one of `$defs`, the rest of them is left out.
- An alternative of anyOf that cannot be enforced is left out, as long as another one remains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from pilotfish.errors import ParameterError
from pilotfish.text.grammar.compose import ascii_digits
from pilotfish.text.grammar.effort import too_hard
from pilotfish.text.grammar.numbers import narrow
from pilotfish.text.grammar.overlap import disjoint

MAX_SCHEMA_BYTES = 512 * 1024
MAX_DEPTH = 50
"""Schemas within schemas, counted from the outermost."""
MAX_NODES = 20_000
MAX_WHITESPACE = 32
MAX_VALUE_BYTES = 16 * 1024
"""Of a value in `enum` or `const`, as JSON."""

_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_ANNOTATIONS = frozenset({
    "$anchor", "$comment", "$defs", "$id", "$schema", "$vocabulary", "contentEncoding", "contentMediaType",
    "contentSchema", "default", "definitions", "deprecated", "description", "examples", "id", "readOnly", "title",
    "writeOnly",
})  # fmt: skip
_NOT_ENFORCEABLE = (
    "not", "if", "dependentRequired", "dependentSchemas", "dependencies", "contains", "unevaluatedProperties",
    "unevaluatedItems", "$dynamicRef", "$recursiveRef", "propertyNames", "uniqueItems",
)  # fmt: skip
_KEYWORDS_OF_TYPE = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
    "string": ("pattern", "minLength", "maxLength", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = _KEYWORDS_OF_TYPE["number"]
_IN_PLACE = ("allOf", "anyOf", "oneOf", "$ref")
"""Keywords whose schemas describe the same value as the schema that has them."""

_LEAP_YEAR = "(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_DATE = (
    "(?:[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_OWN_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""llguidance's own know neither leap years nor an end of the fraction of a second."""
_FORMATS = frozenset({"duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
"""The others that llguidance enforces."""

_NO_LOOK_AROUND = "look-ahead and look-behind are not supported"
_LOOK_AROUND = re.compile(r"(?<!\\)\(\?(?:[=!]|<[=!])")
_WHITESPACE = re.compile(
    r"(?:\[(?P<set>(?: |\\[nrts]|\\x20|[\n\r\t])+)\]|(?P<one> |\\[nrts]))(?P<times>[*+?]|\{\d+(?:,\d*)?\})?"
)


@dataclass(slots=True)
class Node:
    """A schema as it is compiled, with its place in the client's request, to name in an error."""

    place: str
    schema: Any
    children: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PreparedSchema:
    """A schema in the form that llguidance compiles, and the places of its parts."""

    schema: dict[str, Any] | bool
    """With llguidance's options under "x-guidance"."""
    root: Node
    definitions: dict[str, Any]
    options: dict[str, Any]
    """llguidance's, for white space."""


def prepare(
    schema: Any, place: str, whitespace: str | None = None, whitespace_place: str = "whitespace_pattern"
) -> PreparedSchema:
    """Check a schema that the client sent as `place`. `whitespace`: a pattern of white space to allow instead of ours.

    Raises ParameterError that names the place in the schema at fault.
    """
    options = whitespace_options(whitespace, whitespace_place)
    if isinstance(schema, str):
        schema = _decoded(schema, place)
    if not isinstance(schema, dict | bool):
        raise _wrong(place, f"must be a JSON schema, which is an object, but is {_shown(schema)}")
    _check_size(schema, place)
    walk = _Walk(schema, place)
    root = walk.visit(schema, place, 0, False)
    walk.prove_one_ofs()
    walk.narrow_numbers()
    walk.refuse_the_hard()
    return PreparedSchema(complete(root.schema, walk.definitions, options), root, walk.definitions, options)


def complete(schema: Any, definitions: dict[str, Any], options: dict[str, Any]) -> dict[str, Any] | bool:
    """Return a prepared schema with its definitions and llguidance's options."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return {"x-guidance": options, **({"$defs": definitions} if definitions else {}), **schema}


def whitespace_options(pattern: str | None, place: str = "whitespace_pattern") -> dict[str, Any]:
    """Return llguidance's options for white space. A pattern is a set of white space characters with a quantifier,
    which is cut to MAX_WHITESPACE; "" for none at all. Raises ParameterError(place)."""
    if pattern is None:
        return {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    if pattern == "":
        return {"whitespace_flexible": False}
    match = _WHITESPACE.fullmatch(pattern)
    if match is None:
        raise _wrong(
            place, f"is {_shown(pattern)}, but must be a set of white space with a quantifier, such as '[ \\n]{{0,4}}'"
        )
    low, high = _bounds(match["times"])
    chars = match["set"] or match["one"]
    return {"whitespace_pattern": f"[{chars}]{{{min(max(low, 1), MAX_WHITESPACE)},{min(high, MAX_WHITESPACE)}}}"}


def _bounds(times: str | None) -> tuple[int, int]:
    match times:
        case None:
            return 1, 1
        case "*" | "+" | "?":
            return (1 if times == "+" else 0), (1 if times == "?" else MAX_WHITESPACE)
    low, comma, high = times.strip("{}").partition(",")
    return int(low), int(high) if high else MAX_WHITESPACE if comma else int(low)


class _Walk:
    """One pass over a schema: `visit` returns the schema to compile, and fills `definitions`."""

    def __init__(self, root: Any, place: str) -> None:
        self.definitions: dict[str, Any] = {}
        self._root, self._place = root, place
        self._nodes: dict[tuple[int, bool], tuple[str, Node]] = {}  # definitions, by the identity of their schema
        self._count = 0
        self.one_ofs: list[dict[str, Any]] = []
        self._objects: list[Node] = []  # all nodes whose schemas are objects
        self._base = root.get("$id", root.get("id", "")) if isinstance(root, dict) else ""

    def visit(self, schema: Any, place: str, depth: int, open: bool) -> Node:
        """Return the node of a schema at `place`. `open`: whether other schemas describe the same value, which may have
        properties that only they list."""
        self._count += 1
        if self._count > MAX_NODES:
            raise _wrong(self._place, f"has more than {MAX_NODES} schemas in it, which is too many")
        if depth > MAX_DEPTH:
            raise _wrong(place, f"is nested more than {MAX_DEPTH} schemas deep, which is too deep")
        if isinstance(schema, bool):
            return Node(place, schema)
        if not isinstance(schema, dict):
            raise _wrong(place, f"must be a schema (an object, or true or false), but is {_shown(schema)}")
        schema = self._named_properties(_modern(schema), place)
        self._refuse(schema, place)
        node = Node(place, {})
        open = open or self._intersects(schema)
        sub = _Sub(self, node, place, depth + 1, open)
        for key, value in schema.items():
            if key not in _ANNOTATIONS and (keyword := _KEYWORDS.get(key)) is not None:
                keyword(sub, key, value)
        _infer_type(node.schema)
        _close(node.schema, open)
        self._objects.append(node)
        return node

    def refer(self, reference: Any, place: str, depth: int, open: bool) -> tuple[str, Node]:
        """Return the name of the definition that `$ref` refers to, and its node."""
        if not isinstance(reference, str):
            raise _wrong(place, f"must be a string, but is {_shown(reference)}")
        target, path = self._resolve(reference, place)
        key = (id(target), open)
        if key not in self._nodes:
            name = f"d{len(self._nodes)}"
            node = Node(path, {})
            self._nodes[key] = (name, node)  # before it is visited: it may refer to itself
            try:
                found = self.visit(target, path, depth, open)
            except ParameterError:
                del self._nodes[key]
                raise
            node.schema, node.children = found.schema, found.children
            self.definitions[name] = found.schema
        return self._nodes[key]

    def _resolve(self, reference: str, place: str) -> tuple[Any, str]:
        """Return the schema that a reference points to, and its place."""
        pointer = reference.removeprefix(self._base) if self._base else reference
        if pointer in ("", "#"):
            return self._root, self._place
        if not pointer.startswith("#/"):
            found = _anchored(self._root, pointer.removeprefix("#")) if pointer.startswith("#") else None
            if found is None:
                raise _wrong(
                    place, f"is {_shown(reference)}, but only references within the schema are followed ('#/$defs/...')"
                )
            return found, f"{self._place}[{reference}]"
        target, path = self._root, self._place
        for part in pointer[2:].split("/"):
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(part)] if isinstance(target, list) else target[part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise _wrong(place, f"is {_shown(reference)}, which is not in the schema") from None
            path = f"{path}.{part}"
        return target, path

    def prove_one_ofs(self) -> None:
        """Write oneOf as anyOf where no value can match two of its schemas; llguidance proves that only for simple
        ones."""
        for schema in self.one_ofs:
            branches = schema["oneOf"]
            pairs = ((one, other) for i, one in enumerate(branches) for other in branches[:i])
            if "anyOf" not in schema and all(disjoint(one, other, self.definitions) for one, other in pairs):
                schema["anyOf"] = schema.pop("oneOf")

    def narrow_numbers(self) -> None:
        """Write the bounds of numbers so that they are enforced; after `prove_one_ofs`, which needs them as sent."""
        for node in self._objects:
            if (problem := narrow(node.schema)) is not None:
                raise _unsupported(f"{node.place}.{problem[0]}", problem[1])

    def refuse_the_hard(self) -> None:
        """Raise ParameterError for a schema that would take too long to compile."""
        found = too_hard([node.schema for node in self._objects], self.definitions)
        if found is not None:
            raise _unsupported(self._objects[found[0]].place, found[1])

    def _named_properties(self, schema: dict[str, Any], place: str) -> dict[str, Any]:
        """Return a schema without propertyNames, if they can be said otherwise: pydantic's dict[Literal[...], ...]."""
        names = schema.get("propertyNames")
        if isinstance(names, dict) and "$ref" in names:
            names = self._resolve(names["$ref"], f"{place}.propertyNames.$ref")[0]
        if not isinstance(names, dict) or "properties" in schema or "patternProperties" in schema:
            return schema
        rest = {key: value for key, value in schema.items() if key not in ("propertyNames", "additionalProperties")}
        values = schema.get("additionalProperties", True)
        listed = [names["const"]] if "const" in names else names.get("enum")
        if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
            return rest | {"properties": dict.fromkeys(listed, values), "additionalProperties": False}
        if isinstance(names.get("pattern"), str) and names.keys() - _ANNOTATIONS <= {"pattern", "type"}:
            return rest | {"patternProperties": {names["pattern"]: values}, "additionalProperties": False}
        return schema

    def _refuse(self, schema: dict[str, Any], place: str) -> None:
        """Raise ParameterError for keywords that no grammar of tokens enforces, unless they ask for nothing."""
        for key in _NOT_ENFORCEABLE:
            if key in schema and not _vacuous(key, schema):
                raise _unsupported(f"{place}.{key}", "is not supported, as a grammar cannot enforce it: leave it out")

    def _intersects(self, schema: dict[str, Any]) -> bool:
        """Whether schemas within this one may list other properties of the same object."""
        branches = [schema.get(key) for key in _IN_PLACE if key in schema]
        own = any(key in schema for key in ("properties", "patternProperties"))
        return len(branches) + own > 1 and (
            "allOf" in schema or "$ref" in schema or any(map(_lists_properties, branches))
        )


@dataclass(frozen=True, slots=True)
class _Sub:
    """What a keyword's function needs: where it is, and how to visit the schemas in it."""

    walk: _Walk
    node: Node
    place: str
    depth: int
    open: bool

    def visit(self, schema: Any, path: str, open: bool = False) -> Any:
        node = self.walk.visit(schema, f"{self.place}.{path}", self.depth, open)
        self.node.children.append(node)
        return node.schema

    def put(self, key: str, value: Any) -> None:
        self.node.schema[key] = value

    def wrong(self, key: str, problem: str) -> ParameterError:
        return _wrong(f"{self.place}.{key}", problem)


def _type(sub: _Sub, key: str, value: Any) -> None:
    for name in value if isinstance(value, list) and value else [value]:
        if not isinstance(name, str) or name not in _TYPES:
            raise sub.wrong(
                key, f"is {_shown(value)}, but must be one of {', '.join(map(repr, _TYPES))}, or a list of them"
            )
    sub.put(key, value)


def _count(sub: _Sub, key: str, value: Any) -> None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise sub.wrong(key, f"is {_shown(value)}, but must be a whole number, 0 or more")
    sub.put(key, value)


def _bound(sub: _Sub, key: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise sub.wrong(key, f"is {_shown(value)}, but must be a number")
    if key == "multipleOf" and value <= 0:
        raise sub.wrong(key, f"is {value}, but must be greater than 0")
    sub.put(key, value)


def _required(sub: _Sub, key: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise sub.wrong(key, f"is {_shown(value)}, but must be a list of property names")
    sub.put(key, list(dict.fromkeys(value)))


def _enum(sub: _Sub, key: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise sub.wrong(key, f"is {_shown(value)}, but must be a list of at least one value")
    for i, one in enumerate(value):
        _check_value(sub, f"{key}[{i}]", one)
    sub.put(key, value)


def _const(sub: _Sub, key: str, value: Any) -> None:
    _check_value(sub, key, value)
    sub.put(key, value)


def _check_value(sub: _Sub, key: str, value: Any) -> None:
    """Raise ParameterError for a value of a length that stalls whoever asks what a grammar forces."""
    if isinstance(value, str | list | dict) and (size := len(json.dumps(value))) > MAX_VALUE_BYTES:
        raise sub.wrong(key, f"has {size} bytes of JSON, but a value may have at most {MAX_VALUE_BYTES}")


def _pattern(sub: _Sub, key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise sub.wrong(key, f"is {_shown(value)}, but must be a regular expression")
    if _LOOK_AROUND.search(value):
        raise _unsupported(f"{sub.place}.{key}", f"is {_shown(value)}, but {_NO_LOOK_AROUND}")
    _also(sub.node.schema, ascii_digits(value))


def _format(sub: _Sub, key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise sub.wrong(key, f"is {_shown(value)}, but must be the name of a format, such as 'date'")
    if value in _FORMATS:
        sub.put(key, value)
    elif value in _OWN_FORMATS:
        _also(sub.node.schema, _OWN_FORMATS[value])


def _also(schema: dict[str, Any], pattern: str) -> None:
    """Add a pattern that a string must match beside those that it must match already."""
    if "pattern" in schema:
        schema.setdefault("allOf", []).append({"type": "string", "pattern": pattern})
    else:
        schema["pattern"] = pattern


def _map(sub: _Sub, key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise sub.wrong(key, f"is {_shown(value)}, but must be an object with a schema for each name")
    if key == "patternProperties" and (bad := next(filter(_LOOK_AROUND.search, value), None)):
        raise _unsupported(f"{sub.place}.{key}", f"has {_shown(bad)}, but {_NO_LOOK_AROUND}")
    sub.put(key, {name: sub.visit(one, f"{key}.{name}", sub.open) for name, one in value.items()})


def _one(sub: _Sub, key: str, value: Any) -> None:
    sub.put(key, sub.visit(value, key, sub.open))


def _list(sub: _Sub, key: str, value: Any) -> None:
    _check_list(sub, key, value)
    sub.put(key, [sub.visit(one, f"{key}[{i}]", sub.open) for i, one in enumerate(value)])


def _all_of(sub: _Sub, key: str, value: Any) -> None:
    _check_list(sub, key, value)
    open = sub.open or len(value) > 1
    sub.node.schema.setdefault(key, []).extend(sub.visit(one, f"{key}[{i}]", open) for i, one in enumerate(value))


def _any_of(sub: _Sub, key: str, value: Any) -> None:
    _check_list(sub, key, value)
    kept: list[Any] = []
    refused: ParameterError | None = None
    for i, one in enumerate(value):
        try:
            kept.append(sub.visit(one, f"{key}[{i}]", sub.open))
        except UnsupportedError as error:
            refused = refused or error
    if not kept and refused is not None:
        raise refused
    sub.put(key, kept)


def _one_of(sub: _Sub, key: str, value: Any) -> None:
    _list(sub, key, value)
    sub.walk.one_ofs.append(sub.node.schema)


def _ref(sub: _Sub, key: str, value: Any) -> None:
    name, node = sub.walk.refer(value, f"{sub.place}.{key}", sub.depth, sub.open)
    sub.node.children.append(node)
    sub.put(key, f"#/$defs/{name}")


_KEYWORDS: dict[str, Callable[[_Sub, str, Any], None]] = {
    "type": _type,
    "required": _required,
    "enum": _enum,
    "const": _const,
    "pattern": _pattern,
    "format": _format,
    "properties": _map,
    "patternProperties": _map,
    "additionalProperties": _one,
    "items": _one,
    "prefixItems": _list,
    "allOf": _all_of,
    "anyOf": _any_of,
    "oneOf": _one_of,
    "$ref": _ref,
    **dict.fromkeys(_COUNTS, _count),
    **dict.fromkeys(_BOUNDS, _bound),
}


def _infer_type(schema: dict[str, Any]) -> None:
    """Add the type that is meant by keywords of one type only: {"properties": ...} would allow 5, too."""
    if not schema.keys() & {"type", "enum", "const"}:
        kinds = [kind for kind, keywords in _KEYWORDS_OF_TYPE.items() if schema.keys() & set(keywords)]
        if len(kinds) == 1:
            schema["type"] = kinds[0]


def _close(schema: dict[str, Any], open: bool) -> None:
    """Allow no other properties or items than listed, unless the schema says so or other schemas may list them."""
    if open:
        return
    properties = schema.get("properties")
    if properties is not None and "additionalProperties" not in schema:
        schema["additionalProperties"] = False
        if "patternProperties" not in schema:
            for name in schema.get("required", ()):
                properties.setdefault(name, True)
    first = schema.get("prefixItems")
    if first is not None and "items" not in schema and schema.get("minItems", 0) <= len(first):
        schema["items"] = False


def _modern(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema of an older draft in the words of 2020-12."""
    if isinstance(schema.get("items"), list):
        rest = {key: value for key, value in schema.items() if key not in ("items", "additionalItems")}
        further = {"items": schema["additionalItems"]} if "additionalItems" in schema else {}
        schema = rest | {"prefixItems": schema["items"]} | further
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(schema.get(exclusive), bool):
            rest = {key: value for key, value in schema.items() if key != exclusive}
            if schema[exclusive] and bound in rest:
                rest[exclusive] = rest.pop(bound)
            schema = rest
    if schema.get("unevaluatedProperties") is False and not schema.keys() & set(_IN_PLACE):
        schema = {"additionalProperties": False, **schema, "unevaluatedProperties": True}
    return schema


def _vacuous(key: str, schema: dict[str, Any]) -> bool:
    """Whether a keyword that is not enforceable asks for nothing."""
    value = schema[key]
    match key:
        case "uniqueItems":
            return value is False or schema.get("maxItems", 2) in (0, 1)
        case "if":
            return "then" not in schema and "else" not in schema
        case "unevaluatedProperties" | "unevaluatedItems":
            return value is True or (isinstance(value, dict) and not value)
        case "propertyNames":
            return value is True or (isinstance(value, dict) and value.keys() - _ANNOTATIONS <= {"type"})
        case "dependentRequired" | "dependentSchemas" | "dependencies":
            return not value
        case "not":
            return value is False
    return False


def _lists_properties(branches: Any) -> bool:
    """Whether schemas in place (a list of them) may list properties of the object."""
    keys = {"properties", "patternProperties", "additionalProperties", *_IN_PLACE}
    return isinstance(branches, list) and any(isinstance(one, dict) and one.keys() & keys for one in branches)


def _anchored(root: Any, anchor: str) -> Any:
    """Return the schema with an anchor, or None."""
    for value in _all_values(root):
        if isinstance(value, dict) and (value.get("$anchor") == anchor or value.get("$id") == f"#{anchor}"):
            return value
    return None


def _all_values(root: Any) -> Iterator[Any]:
    stack = [root]
    while stack:
        value = stack.pop()
        yield value
        stack.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


def _decoded(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(place, f"is not valid JSON: {error}") from error


def _check_size(schema: Any, place: str) -> None:
    """Raise ParameterError for a schema that is too large, or not JSON (NaN, half of a surrogate pair)."""
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, RecursionError) as error:
        raise _wrong(place, f"is not valid JSON: {error}") from error
    if size > MAX_SCHEMA_BYTES:
        raise _wrong(place, f"has {size} bytes of JSON, but may have at most {MAX_SCHEMA_BYTES}")


def _check_list(sub: _Sub, key: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise sub.wrong(key, f"is {_shown(value)}, but must be a list of at least one schema")


class UnsupportedError(ParameterError):
    """A part of a schema is right, but no grammar enforces it."""


def _wrong(place: str, problem: str) -> ParameterError:
    place = _cut(place, 400)
    return ParameterError(place, f"{place} {problem}")


def _unsupported(place: str, problem: str) -> UnsupportedError:
    place = _cut(place, 400)
    return UnsupportedError(place, f"{place} {problem}")


def _shown(value: Any) -> str:
    return _cut(repr(value), 80)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
