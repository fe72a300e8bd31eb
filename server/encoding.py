"""Encodes response structs as JSON and describes them in OpenAPI: FastAPI does so for pydantic models only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.responses import Response


class ErrorFields(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """An error in OpenAI's form."""

    error: ErrorFields


_REFERENCE = "#/components/schemas/{name}"


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def returns(
    response_type: type[msgspec.Struct], error_type: type[msgspec.Struct] = ErrorBody, streams: bool = False
) -> dict[str, Any]:
    """Return the options of a route with these types of its responses, which must also be passed to `describe`.
    `streams`: it may answer with server-sent events instead."""
    response = described("Successful Response", response_type)
    if streams:
        response["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {"response_model": None, "responses": {200: response, "default": described("An error", error_type)}}


def described(what: str, response_type: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the OpenAPI description of a response."""
    schema = {"$ref": _REFERENCE.format(name=response_type.__name__)}
    return {"description": what, "content": {"application/json": {"schema": schema}}}


def describe(app: FastAPI, response_types: Iterable[type[msgspec.Struct]]) -> None:
    """Add the response types, and the types of their fields, to the application's OpenAPI document."""
    _, schemas = msgspec.json.schema_components(response_types, ref_template=_REFERENCE)
    for schema in schemas.values():  # fields with defaults are always written, too
        fields, required = schema.get("properties", {}), schema.get("required", [])
        schema["required"] = [name for name, field in fields.items() if name in required or "default" in field]
    made_by_fastapi = app.openapi

    def openapi() -> dict[str, Any]:
        document = made_by_fastapi()  # cached by FastAPI: the same object each time
        known = document["components"]["schemas"]
        known |= schemas
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)  # FastAPI's own: wrong requests get a 400
        for name in ("HTTPValidationError", "ValidationError"):
            known.pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
