"""instructor: its modes for OpenAI's API and for Anthropic's, whole, partial and as a list."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import instructor
import openai
import pytest
from instructor import Mode
from instructor.core.exceptions import IncompleteOutputException, InstructorRetryException
from shared import MESSAGES, QUESTION, Report, Weather

ASKED: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 150, "temperature": 0, "max_retries": 0}


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA])
@pytest.mark.parametrize("kind", [Weather, Report])
def test_an_object(client: openai.OpenAI, model: str, kind: Any, mode: Mode) -> None:
    made = instructor.from_openai(client, mode=mode)
    assert isinstance(made.chat.completions.create(model=model, response_model=kind, **ASKED), kind)


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_partial_objects_in_a_stream(client: openai.OpenAI, model: str, mode: Mode) -> None:
    made = instructor.from_openai(client, mode=mode)
    parts = list(made.chat.completions.create_partial(model=model, response_model=Report, **ASKED))
    assert parts
    assert Report.model_validate(parts[-1].model_dump())


def test_many_objects(client: openai.OpenAI, model: str) -> None:
    """They come one by one. The model does not know when to stop, so only the first are waited for."""
    made = instructor.from_openai(client, mode=Mode.TOOLS)
    found = made.chat.completions.create_iterable(model=model, response_model=Weather, **ASKED)
    first = list(itertools.islice(found, 2))
    assert first
    assert all(isinstance(each, Weather) for each in first)


def test_json_mode_is_served(client: openai.OpenAI, model: str) -> None:
    """Any JSON object is asked for, and the schema is hoped for."""
    made = instructor.from_openai(client, mode=Mode.JSON)
    with contextlib.suppress(InstructorRetryException, IncompleteOutputException):  # not valid, or without an end
        assert isinstance(made.chat.completions.create(model=model, response_model=Weather, **ASKED), Weather)


async def test_asynchronously(async_client: openai.AsyncOpenAI, model: str) -> None:
    made = instructor.from_openai(async_client, mode=Mode.TOOLS)
    assert isinstance(await made.chat.completions.create(model=model, response_model=Weather, **ASKED), Weather)


def test_responses(client: openai.OpenAI, model: str) -> None:
    made = instructor.from_openai(client, mode=Mode.RESPONSES_TOOLS)
    found = made.responses.create(model=model, input=QUESTION, response_model=Weather, max_retries=0)
    assert isinstance(found, Weather)


def test_anthropics_tools(url: str, model: str) -> None:
    import anthropic

    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        made = instructor.from_anthropic(client, mode=Mode.ANTHROPIC_TOOLS)
        found = made.messages.create(
            model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=150, response_model=Weather,
            max_retries=0,
        )  # fmt: skip
    assert isinstance(found, Weather)
