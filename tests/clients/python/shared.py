"""What the suites ask for. The model is small, so answers are forced to be short: what is tested is the protocol."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, Field

QUESTION = "What is the weather like in Oslo?"
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Paris"]
    sky: Literal["sunny", "cloudy", "rain"]
    windy: bool


class Report(BaseModel):
    """Nested, with a list."""

    title: Literal["Today", "Tomorrow"]
    cities: list[Weather] = Field(min_length=1, max_length=2)


class GetWeather(BaseModel):
    """Look up the weather of a city."""

    city: Literal["Oslo", "Paris"]
    unit: Literal["celsius", "fahrenheit"]


PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Paris"]},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Paris"]}, "windy": {"type": "boolean"}},
    "required": ["city", "windy"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {
    "name": "get_weather",
    "description": "Look up the weather of a city.",
    "parameters": PARAMETERS,
}
TOOLS: list[Any] = [
    {"type": "function", "function": FUNCTION},
    {
        "type": "function",
        "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
    },
]


def check_arguments(arguments: str | dict[str, Any]) -> None:
    """Fail unless these are arguments of get_weather."""
    GetWeather.model_validate(json.loads(arguments) if isinstance(arguments, str) else arguments, strict=True)
