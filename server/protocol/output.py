"""The form that a request demands of its answer, under all the names that servers have for it."""

from __future__ import annotations

from typing import Any, get_args

from pilotfish.errors import shown
from pilotfish.server.errors import ApiError, bad_parameter
from pilotfish.server.protocol.common import GenerationRequest
from pilotfish.text.grammar.output_format import ANY_OBJECT, Kind, OutputFormat

_GUIDED: dict[str, Kind] = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "grammar": "grammar",
    "json_schema": "json_schema",
}
_STRUCTURED: dict[str, Kind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "structural_tag": "structural_tag",
}
_ALSO = frozenset(
    {"disable_any_whitespace", "disable_additional_properties", "disable_fallback", "whitespace_pattern", "backend"}
)
"""Keys of structured_outputs beside the form; but for the white space they ask for what is done anyway."""


def output_of(body: GenerationRequest) -> OutputFormat | None:
    """Return what the answer must match, or None. Raises ApiError 400 for two forms, or for none that is known."""
    found = [form for form in (_response_format(body.response_format), _structured(body.structured_outputs)) if form]
    for name, kind in _GUIDED.items():
        value = getattr(body, name)
        if value not in (None, "", []):
            whitespace = body.guided_whitespace_pattern if name == "guided_json" else None
            found.append(OutputFormat(kind, value, name, whitespace, "guided_whitespace_pattern"))
    if len(found) > 1:
        raise bad_parameter(found[1].place, f"{found[0].place} and {found[1].place} are both given: give only one")
    return found[0] if found else None


def _response_format(value: Any) -> OutputFormat | None:
    place = "response_format"
    if value is None or value == {}:
        return None
    if not isinstance(value, dict):
        raise bad_parameter(
            place, f'{place} is {shown(value)}, but must be an object such as {{"type": "json_object"}}'
        )
    kind = value.get("type")
    match kind:
        case "text":
            return None
        case "json_object":
            schema = value.get("schema")  # as llama.cpp and Together have it
            return OutputFormat("json_schema", ANY_OBJECT if schema is None else schema, f"{place}.schema")
        case "json_schema":
            inner = value.get("json_schema")
            if inner is None and "schema" in value:
                return OutputFormat("json_schema", value["schema"], f"{place}.schema")
            if not isinstance(inner, dict):
                raise _missing(f"{place}.json_schema")
            if "schema" not in inner:
                raise _missing(f"{place}.json_schema.schema")
            schema = ANY_OBJECT if inner["schema"] is None else inner["schema"]
            return OutputFormat("json_schema", schema, f"{place}.json_schema.schema")
        case "structural_tag":
            return OutputFormat("structural_tag", value, place)
        case "regex" | "grammar" | "json":
            key = {"regex": "pattern", "grammar": "grammar", "json": "schema"}[kind]
            inner = value.get(key, value.get("value"))
            forms: dict[str, Kind] = {"regex": "regex", "grammar": "grammar", "json": "json_schema"}
            return OutputFormat(forms[kind], inner, f"{place}.{key}")
    raise bad_parameter(
        f"{place}.type",
        f"{place}.type is {shown(kind)}, but must be 'text', 'json_object', 'json_schema' or 'structural_tag'",
    )


def _structured(value: Any) -> OutputFormat | None:
    place = "structured_outputs"
    if value is None or value == {}:
        return None
    if not isinstance(value, dict):
        raise bad_parameter(place, f"{place} must be an object with one of {', '.join(map(repr, _STRUCTURED))}")
    given = [name for name in value if name in _STRUCTURED and value[name] not in (None, "", [])]
    if (value.get("json_object") or False) is True:
        given.append("json_object")
    for name in value:
        if name not in _STRUCTURED and name not in _ALSO and name != "json_object":
            raise bad_parameter(f"{place}.{name}", f"{place}.{name} is not known: it has {', '.join(_STRUCTURED)}")
    if not given:
        return None
    if len(given) > 1:
        raise bad_parameter(place, f"{place} has {' and '.join(given)}: give only one")
    name = given[0]
    whitespace = value.get("whitespace_pattern")
    if whitespace is not None and not isinstance(whitespace, str):
        raise bad_parameter(f"{place}.whitespace_pattern", f"{place}.whitespace_pattern must be a regular expression")
    if name == "json_object":
        return OutputFormat("json_schema", ANY_OBJECT, f"{place}.{name}", whitespace, f"{place}.whitespace_pattern")
    return OutputFormat(_STRUCTURED[name], value[name], f"{place}.{name}", whitespace, f"{place}.whitespace_pattern")


def _missing(param: str) -> ApiError:
    return bad_parameter(param, f"Missing required parameter: '{param}'.", "missing_required_parameter")


assert set(_STRUCTURED.values()) == set(get_args(Kind))
