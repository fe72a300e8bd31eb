"""pydantic-ai: agents and plain requests over chat completions and over responses."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.direct import model_request, model_request_stream
from pydantic_ai.messages import ModelRequest, TextPart, ToolCallPart
from pydantic_ai.models import Model, ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition
from shared import PARAMETERS, QUESTION, Report, Weather, check_arguments

SETTINGS = ModelSettings(temperature=0, max_tokens=150)
TOOL = ToolDefinition(name="get_weather", description="Look up the weather.", parameters_json_schema=PARAMETERS)


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel], ids=["chat", "responses"])
def llm(url: str, model: str, request: pytest.FixtureRequest) -> Model:
    made: Model = request.param(model, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
    return made


async def test_a_text_and_its_stream(llm: Model) -> None:
    agent = Agent(llm, instructions="Be brief.", model_settings=SETTINGS | {"max_tokens": 24})
    whole = await agent.run(QUESTION)
    assert whole.output
    async with agent.run_stream(QUESTION) as stream:
        assert await stream.get_output() == whole.output
    again = await agent.run("And in Paris?", message_history=whole.all_messages())
    assert again.output


@pytest.mark.parametrize("wrap", [ToolOutput, NativeOutput])
@pytest.mark.parametrize("kind", [Weather, Report])
async def test_typed_output(llm: Model, kind: Any, wrap: Any) -> None:
    agent: Agent[None, Any] = Agent(llm, output_type=wrap(kind), model_settings=SETTINGS, retries=0)
    assert isinstance((await agent.run(QUESTION)).output, kind)
    async with agent.run_stream(QUESTION) as stream:
        assert isinstance(await stream.get_output(), kind)


async def test_an_agent_calls_a_tool(llm: Model) -> None:
    called = []
    agent = Agent(llm, model_settings=SETTINGS)

    @agent.tool_plain
    def get_weather(city: Literal["Oslo", "Paris"]) -> str:
        """Look up the weather of a city."""
        called.append(city)
        return "3 degrees"

    answer = await model_request(
        llm,
        [ModelRequest.user_text_prompt(QUESTION)],
        model_settings=SETTINGS,
        model_request_parameters=ModelRequestParameters(function_tools=[TOOL], allow_text_output=False),
    )
    calls = [part for part in answer.parts if isinstance(part, ToolCallPart)]
    assert calls
    for call in calls:
        check_arguments(call.args or {})
    assert (await agent.run(QUESTION)).output
    assert set(called) <= {"Oslo", "Paris"}


async def test_a_stream_of_a_call(llm: Model) -> None:
    async with model_request_stream(
        llm,
        [ModelRequest.user_text_prompt(QUESTION)],
        model_settings=SETTINGS,
        model_request_parameters=ModelRequestParameters(function_tools=[TOOL], allow_text_output=False),
    ) as stream:
        assert [event async for event in stream]
        answer = stream.get()
    for part in answer.parts:
        assert not isinstance(part, TextPart) or not part.content.strip()
        if isinstance(part, ToolCallPart):
            check_arguments(part.args or {})
