"""AsyncLLM: the same answers as LLM's, many at once, and nothing left of those that nobody waits for."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from pilotfish import LLM, AsyncLLM, SamplingParams
from pilotfish.engine.completion import Completion
from pilotfish.engine.stats import StepStats
from pilotfish.errors import ConfigError, EngineDeadError, EngineNotReadyError, ParameterError

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("async_llm")]

SETTINGS: dict[str, Any] = {"kv_cache_memory": 4 << 20, "num_threads": 1, "seed": 3}
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=1900, ignore_eos=True)
PROMPTS = ["The sea was calm", "and the light on the water"]
MESSAGES = [{"role": "user", "content": "Hi <|im_end|>"}]

Steps = list[StepStats]
Served = tuple[AsyncLLM, Steps]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served(tiny_llama: Path) -> AsyncIterator[Served]:
    steps: Steps = []
    async with AsyncLLM(str(tiny_llama), on_stats=steps.append, **SETTINGS) as llm:
        yield llm, steps


def said(completions: list[Completion]) -> list[tuple[Any, ...]]:
    """What must not differ."""
    names = ("prompt", "prompt_ids", "index", "token_ids", "text", "finish_reason")
    return [tuple(getattr(each, name) for name in names) for each in completions]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def idle(served: Served) -> None:
    """Wait until the engine has nothing left."""
    llm, steps = served
    await until(lambda: not llm._engine.in_flight and not (steps and steps[-1].running))


async def test_calls_say_what_those_of_llm_say(served: Served, tiny_llama: Path) -> None:
    asynchronous, _ = served
    seeded = SamplingParams(seed=1, max_tokens=24, ignore_eos=True)
    with LLM(str(tiny_llama), **SETTINGS) as llm:
        expected = llm.generate(PROMPTS, PARAMS, n=2)  # seeds are drawn in the same order
        stop = llm.generate(PROMPTS[0], seeded)[0].text[4:7]
        cut = llm.generate(PROMPTS, seeded, n=2, stop=stop)
        (asked,) = llm.chat(MESSAGES, seeded)
        streamed = list(llm.stream(PROMPTS[0], PARAMS, speculation="ngram"))
    assert cut[0].finish_reason == "stop"
    assert said(await asynchronous.generate(PROMPTS, PARAMS, n=2)) == said(expected)
    assert said(await asynchronous.generate(PROMPTS, seeded, n=2, stop=stop)) == said(cut)
    assert said(await asynchronous.chat(MESSAGES, seeded)) == said([asked])
    tokens = [token async for token in asynchronous.stream(PROMPTS[0], PARAMS, speculation="ngram")]
    assert [(each.text, each.token_id, each.finish_reason) for each in tokens] == [
        (each.text, each.token_id, each.finish_reason) for each in streamed
    ]


async def test_calls_at_the_same_time_share_steps(served: Served) -> None:
    llm, steps = served
    del steps[:]
    params = SamplingParams(seed=1, max_tokens=200, ignore_eos=True)
    alone = await llm.generate(PROMPTS[0], params)
    answers = await asyncio.gather(*(llm.generate(PROMPTS[0], params) for _ in range(4)))
    assert [each[0].token_ids for each in answers] == [alone[0].token_ids] * 4
    assert max(step.running for step in steps) == 4


async def test_a_stream_comes_while_it_is_made_and_stops_at_a_stop_string(served: Served) -> None:
    llm, _ = served
    seen = 0
    async with aclosing(llm.stream(MESSAGES, ENDLESS)) as tokens:
        async for _ in tokens:
            seen += 1
            if seen == 3:
                assert llm._engine.in_flight == 1
                break
    await idle(served)
    (whole,) = await llm.generate(PROMPTS[0], SamplingParams(seed=7, max_tokens=24, ignore_eos=True))
    stop = whole.text[4:7]
    params = SamplingParams(seed=7, max_tokens=1900, ignore_eos=True)
    cut = [token async for token in llm.stream(PROMPTS[0], params, stop=stop)]
    assert "".join(token.text for token in cut) == whole.text.partition(stop)[0]
    assert cut[-1].finish_reason == "stop"
    await idle(served)


async def asks_for_ever(llm: AsyncLLM) -> None:
    await llm.generate(PROMPTS, ENDLESS, n=2)


async def asks_until_a_stop(llm: AsyncLLM) -> None:
    await llm.generate(PROMPTS, ENDLESS, stop="\0never")


async def reads_for_ever(llm: AsyncLLM) -> None:
    async for _ in llm.stream(PROMPTS[0], ENDLESS):
        pass


@pytest.mark.parametrize("call", [asks_for_ever, asks_until_a_stop, reads_for_ever])
async def test_a_cancelled_call_leaves_nothing_behind(
    served: Served, call: Callable[[AsyncLLM], Awaitable[None]]
) -> None:
    llm, steps = served
    del steps[:]
    task = asyncio.ensure_future(call(llm))
    await until(lambda: any(step.running for step in steps))
    before = len(steps)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(served)
    assert len(steps) - before < 20  # not the hundreds that the answers would have taken
    assert steps[-1].blocks_used == 0
    assert len(await llm.generate(PROMPTS, PARAMS)) == 2


async def test_a_request_that_cannot_be_served_is_refused_before_any_runs(served: Served) -> None:
    llm, steps = served
    del steps[:]
    with pytest.raises(ParameterError, match="speculation is 'nobody'"):
        await llm.generate(PROMPTS, PARAMS, speculation=["off", "nobody"])
    with pytest.raises(ParameterError, match="params has 1 entries"):
        await llm.generate(PROMPTS, [PARAMS])
    with pytest.raises(ParameterError, match="no tokens"):
        _ = [token async for token in llm.stream([], PARAMS)]
    assert llm._engine.in_flight == 0
    assert steps == []


async def test_an_answer_keeps_to_a_grammar(served: Served) -> None:
    llm, _ = served
    fields = {"a": {"type": "boolean"}}
    grammar = await llm.grammar(
        "json_schema", {"type": "object", "properties": fields, "required": ["a"], "additionalProperties": False}
    )
    (answer,) = await llm.generate(PROMPTS[0], SamplingParams(seed=1, max_tokens=64, grammar=grammar))
    assert json.loads(answer.text)["a"] in (True, False)


async def test_closing_ends_what_runs_and_an_engine_that_dies_says_so(tiny_llama: Path) -> None:
    llm = AsyncLLM(str(tiny_llama), **SETTINGS)
    with pytest.raises(EngineNotReadyError, match=r"await start\(\)"):
        _ = llm.info
    await llm.start()
    running = asyncio.ensure_future(llm.generate([[5, 6]], ENDLESS))
    await until(lambda: llm._engine.in_flight == 1)
    await llm.close()
    (ended,) = await running
    assert ended.finish_reason == "abort"
    await llm.close()
    with pytest.raises(EngineDeadError, match="stopped"):
        await llm.generate(PROMPTS, PARAMS)


async def test_settings_and_models_that_are_wrong_are_named() -> None:
    with pytest.raises(ConfigError, match="kv_cache_memoryy"):
        AsyncLLM("tiny", kv_cache_memoryy=1)
    with pytest.raises(EngineDeadError, match="no-such-folder"):
        async with AsyncLLM("./no-such-folder"):
            pass
