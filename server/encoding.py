"""Encodes response structs as JSON and describes them in OpenAPI: FastAPI does so for pydantic models only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.responses import Response

_REFERENCE = "#/components/schemas/{name}"


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def returns(response_type: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the options of a route with this response type, which must also be passed to `describe`."""
    schema = {"$ref": _REFERENCE.format(name=response_type.__name__)}
    response = {"description": "Successful Response", "content": {"application/json": {"schema": schema}}}
    return {"response_model": None, "responses": {200: response}}


def describe(app: FastAPI, response_types: Iterable[type[msgspec.Struct]]) -> None:
    """Add the response types, and the types of their fields, to the application's OpenAPI document."""
    _, schemas = msgspec.json.schema_components(response_types, ref_template=_REFERENCE)
    for schema in schemas.values():  # fields with defaults are always written, too
        fields, required = schema.get("properties", {}), schema.get("required", [])
        schema["required"] = [name for name, field in fields.items() if name in required or "default" in field]
    made_by_fastapi = app.openapi

    def openapi() -> dict[str, Any]:
        document = made_by_fastapi()  # cached by FastAPI: the same object each time
        document["components"]["schemas"] |= schemas
        return document

    app.openapi = openapi  # type: ignore[method-assign]
