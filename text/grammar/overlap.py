"""Whether two prepared schemas certainly have no value in common, so that oneOf means what anyOf does."""

from __future__ import annotations

import json
from typing import Any

_MAX_REFERENCES = 50
"""How many references are followed from one to the next."""


def disjoint(one: Any, other: Any, definitions: dict[str, Any], depth: int = 0) -> bool:
    """Whether it is certain that no value matches both of two prepared schemas."""
    one, other = _resolved(one, definitions), _resolved(other, definitions)
    if one is False or other is False:
        return True
    if depth > 3 or not isinstance(one, dict) or not isinstance(other, dict):
        return False
    values, others = _values(one), _values(other)
    if values is not None and others is not None:
        return not values & others
    types, other_types = _types_of(one), _types_of(other)
    if types is not None and other_types is not None and not types & other_types:
        return True
    if types == other_types == {"object"}:
        both = set(one.get("required", ())) | set(other.get("required", ()))
        mine, others_ = one.get("properties", {}), other.get("properties", {})
        return any(
            name in mine and name in others_ and disjoint(mine[name], others_[name], definitions, depth + 1)
            for name in both
        )
    return False


def _resolved(schema: Any, definitions: dict[str, Any]) -> Any:
    """Follow references that have nothing beside them."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, dict) or schema.keys() != {"$ref"}:
            break
        schema = definitions.get(schema["$ref"].rpartition("/")[2], True)
    return schema


def _values(schema: dict[str, Any]) -> set[str] | None:
    """Return the only values that a schema allows, as JSON, or None if it does not list them."""
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    return None if listed is None else {json.dumps(_canonical(value), sort_keys=True) for value in listed}


def _canonical(value: Any) -> Any:
    """Return the value with floats that are whole as integers: JSON schema does not tell 1 from 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _types_of(schema: dict[str, Any]) -> set[str] | None:
    """Return the types that a schema allows, numbers and integers as one; None: unknown."""
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return {"number" if name == "integer" else name for name in types}
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    return None if listed is None else {_type_of(value) for value in listed}


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"
