"""Schemas that llguidance would take minutes to compile: too many patterns of one string, or too large a multipleOf.

What a compiling thread has begun cannot be stopped, so they are refused before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

from pilotfish.text.grammar.numbers import feasible

MOST_PATTERNS = 16
"""Of one string: twice as many take several times as long."""
MOST_WORK = 50_000
"""Schemas that are looked at for those that describe the same value."""


def too_hard(schemas: Sequence[dict[str, Any]], definitions: dict[str, Any]) -> tuple[int, str] | None:
    """Return the first of all schemas of a document that takes too long, with those within it that describe the same
    value: its index, and the problem. None if there is no such one."""
    multiples = {Decimal(repr(schema["multipleOf"])) for schema in schemas if "multipleOf" in schema}
    patterns = sum("pattern" in schema for schema in schemas)
    by_multiples, by_patterns = not feasible(multiples), patterns > MOST_PATTERNS
    work = 0
    for i, schema in enumerate(schemas if by_multiples or by_patterns else ()):
        if by_multiples:
            group = list(_same_value(schema, definitions, ("allOf", "anyOf", "oneOf")))
            work += len(group)
            if not feasible({Decimal(repr(one["multipleOf"])) for one in group if "multipleOf" in one}):
                return i, "has too large a multipleOf, or too many, for a grammar to enforce"
        if by_patterns:
            group = list(_same_value(schema, definitions, ("allOf",)))
            work += len(group)
            if sum("pattern" in one for one in group) > MOST_PATTERNS:
                return i, f"has more than {MOST_PATTERNS} patterns, which is too many for one string"
        if work > MOST_WORK:
            return i, "has too many schemas that describe the same value"
    return None


def _same_value(schema: Any, definitions: dict[str, Any], keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a schema, those that it refers to, and those under `keys`."""
    seen, stack = set[int](), [schema]
    while stack:
        one = stack.pop()
        if not isinstance(one, dict) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        stack += [branch for key in keys for branch in one.get(key, ())]
        stack.append(definitions.get(one.get("$ref", "").rpartition("/")[2]))
