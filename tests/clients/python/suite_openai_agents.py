"""openai-agents: agents over responses, which are its default, and over chat completions."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from agents.items import ToolCallItem, ToolCallOutputItem
from shared import QUESTION, Report, Weather

set_tracing_disabled(True)
SETTINGS = ModelSettings(temperature=0, max_tokens=100)


@function_tool
def get_weather(city: Literal["Oslo", "Paris"], unit: Literal["celsius", "fahrenheit"]) -> str:
    """Look up the weather of a city."""
    return f"3 degrees {unit} in {city}"


@pytest.fixture(params=[OpenAIResponsesModel, OpenAIChatCompletionsModel], ids=["responses", "chat"])
def llm(async_client: openai.AsyncOpenAI, model: str, request: pytest.FixtureRequest) -> Model:
    made: Model = request.param(model=model, openai_client=async_client)
    return made


async def test_a_text_and_its_stream(llm: Model) -> None:
    settings = ModelSettings(temperature=0, max_tokens=600)  # an answer that is cut is an error there
    agent = Agent("brief", instructions="Be brief.", model=llm, model_settings=settings)
    hello = "Say hello."
    whole = await Runner.run(agent, hello)
    assert whole.final_output
    streamed = Runner.run_streamed(agent, hello)
    kinds = {event.type async for event in streamed.stream_events()}
    assert "raw_response_event" in kinds
    assert streamed.final_output == whole.final_output
    again = await Runner.run(agent, [*whole.to_input_list(), {"role": "user", "content": "Hello!"}])
    assert again.final_output


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_is_called(llm: Model, stream: bool) -> None:
    settings = ModelSettings(temperature=0, max_tokens=100, tool_choice="required")
    agent = Agent("caller", model=llm, model_settings=settings, tools=[get_weather])
    result: Any
    if stream:
        result = Runner.run_streamed(agent, QUESTION, max_turns=6)
        async for _ in result.stream_events():
            pass
    else:
        result = await Runner.run(agent, QUESTION, max_turns=6)
    assert any(isinstance(item, ToolCallItem) for item in result.new_items)
    outputs = [item.output for item in result.new_items if isinstance(item, ToolCallOutputItem)]
    assert outputs
    assert all(output.startswith("3 degrees") for output in outputs)


@pytest.mark.parametrize("kind", [Weather, Report])
async def test_typed_output(llm: Model, kind: Any) -> None:
    agent = Agent("typed", model=llm, model_settings=SETTINGS, output_type=kind)
    assert isinstance((await Runner.run(agent, QUESTION)).final_output, kind)
    streamed = Runner.run_streamed(agent, QUESTION)
    async for _ in streamed.stream_events():
        pass
    assert isinstance(streamed.final_output, kind)
