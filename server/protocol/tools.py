"""Tools in OpenAI's chat requests and answers."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import AfterValidator, ConfigDict, Field, PlainValidator

from pilotfish.errors import shown
from pilotfish.server.protocol.common import ApiModel, unsupported, wrong

MAX_TOOLS = 512
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise wrong(f"is {shown(value)}, but must have 1 to 256 letters, digits, or characters of _ . : / -")
    return value


def _function(value: Any) -> Any:
    if value != "function":
        raise unsupported(f"is {shown(value)}, but this server knows only tools of type 'function'")
    return value


def _object(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise wrong(f"has type {shown(schema['type'])}, but a function's arguments are an object")
    return schema


ObjectSchema = Annotated[dict[str, Any], AfterValidator(_object)]
"""The JSON schema of a function's arguments."""
FunctionName = Annotated[str, AfterValidator(_name)]
FunctionType = Annotated[Literal["function"], PlainValidator(_function, json_schema_input_type=Literal["function"])]


class FunctionParam(ApiModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: FunctionName
    description: str | None = None
    parameters: ObjectSchema | None = None
    strict: bool | None = None


class ToolParam(ApiModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    type: FunctionType
    function: FunctionParam


class CalledFunction(ApiModel):
    """A call in a conversation's history."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: FunctionName
    arguments: str | dict[str, Any] | None = None


class CallParam(ApiModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    id: str = ""
    type: FunctionType = "function"
    function: CalledFunction


def _choice(value: Any) -> Any:
    """Check a tool_choice: a word, a named function, or allowed tools."""
    if value is None or value in ("none", "auto", "required"):
        return value
    form = 'must be "none", "auto", "required", or an object such as {"type": "function", "function": {"name": "f"}}'
    if isinstance(value, dict) and value.get("type") == "function":
        function = value.get("function", value)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return value
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        allowed = value.get("allowed_tools", value)
        if (
            isinstance(allowed, dict)
            and allowed.get("mode") in ("auto", "required")
            and isinstance(allowed.get("tools"), list)
        ):
            return value
    raise wrong(f"is {shown(value)}, but {form}")


ToolChoiceParam = Annotated[Any, PlainValidator(_choice, json_schema_input_type=str | dict[str, Any] | None)]
Tools = Annotated[list[ToolParam] | None, Field(max_length=MAX_TOOLS)]
Functions = Annotated[list[FunctionParam] | None, Field(max_length=MAX_TOOLS)]


def _function_call(value: Any) -> Any:
    """Check the older form of a tool_choice."""
    if value is None or value in ("none", "auto") or (isinstance(value, dict) and isinstance(value.get("name"), str)):
        return value
    raise wrong(f'is {shown(value)}, but must be "none", "auto", or an object such as {{"name": "f"}}')


FunctionChoice = Annotated[Any, PlainValidator(_function_call, json_schema_input_type=str | dict[str, str] | None)]


class Function(msgspec.Struct):
    """A call in an answer; in a chunk of a stream, the name comes once, and the arguments as they grow."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class Call(msgspec.Struct):
    id: str
    function: Function
    type: Literal["function"] = "function"


class CallDelta(msgspec.Struct):
    index: int
    function: Function
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
