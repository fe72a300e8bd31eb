"""AsyncLLM: the calls of LLM in an event loop, with the engine in a process of its own. No torch in this one."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from pilotfish.engine.completion import DEFAULT_PARAMS, Completion, empty_completions, make_requests
from pilotfish.engine.config import EngineConfig, config_of
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.process.client import AsyncEngine
from pilotfish.engine.request import Delta, EngineInfo, Request
from pilotfish.engine.stats import StepStats
from pilotfish.errors import EngineNotReadyError
from pilotfish.library.texts import (
    Message,
    Prompt,
    Texts,
    Token,
    are_ids,
    conversations_of,
    extend,
    prompts_of,
    stops_of,
    tokens_of,
)
from pilotfish.text.detokenizer import AnswerText
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.grammar.output_format import Kind
from pilotfish.text.tokenizer import Tokenizer


class AsyncLLM:
    """An engine in a process of its own, with its tokenizer in this one. Calls that run at the same time share its
    batches; the same seeds give the same tokens as those of LLM.

    `async with AsyncLLM("smollm2-135m") as llm: print((await llm.generate("Once upon a time"))[0].text)`

    Arguments as of LLM. Cancelling a call, or closing a stream, ends its requests; their memory is free before the
    engine's next step. All calls belong to one event loop. Besides what LLM's raise, they raise EngineDeadError with
    the reason, once the engine has ended: also where LLM raises ModelError for a model that cannot be loaded.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        on_stats: Callable[[StepStats], None] | None = None,
        on_loading: Callable[[str, float], None] | None = None,
        **settings: object,
    ) -> None:
        self.config = config_of(model, config, settings)
        self._engine = AsyncEngine(self.config, on_stats, on_loading)
        self._texts = Texts(self.config.model)
        self._ids = map(str, itertools.count())
        self._starting: asyncio.Future[None] | None = None

    async def start(self) -> EngineInfo:
        """Start the engine, if that has not been done yet, and wait until its model is loaded. The other calls do so
        themselves."""
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._engine.start())
        await asyncio.shield(self._starting)
        return await self._engine.wait_ready()

    @property
    def info(self) -> EngineInfo:
        """What the engine says of itself. Raises EngineNotReadyError before it has started."""
        if self._engine.info is None:
            raise EngineNotReadyError("the model is not loaded yet: await start()")
        return self._engine.info

    async def close(self) -> None:
        """End the engine and, with finish_reason "abort", what it is answering. May be called again."""
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._engine.stop()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer. Raises ModelError if it has none."""
        return await asyncio.to_thread(lambda: self._texts.tokenizer)

    async def grammar(self, kind: Kind, value: object) -> Grammar:
        """See `LLM.grammar`."""
        return await asyncio.to_thread(self._texts.grammar, kind, value, await self.start())

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        *,
        n: int = 1,
        speculation: str | Sequence[str | None] | None = None,
        adapter: str | Sequence[str] = "",
        stop: str | Sequence[str] = (),
    ) -> list[Completion]:
        """Answer one prompt or several, as `LLM.generate` does. If one fails, the others are ended, too."""
        await self.start()
        asked, stops = prompts_of(prompts), stops_of(stop)
        ids = await asyncio.to_thread(lambda: [self._texts.encode(prompt) for prompt in asked])
        requests = make_requests(
            self._ids, self._engine.draw_seed, ids, params, n=n, speculation=speculation, adapter=adapter
        )
        completions = empty_completions(requests, n)
        streams = [self._engine.generate(request) for request in requests]  # refuses before anything runs
        texts = [await asyncio.to_thread(self._texts.answer, stops) if stops else None for _ in requests]
        tasks = [asyncio.create_task(_gather(*each)) for each in zip(streams, completions, texts, strict=True)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._texts.attach(completions, asked, n, stops)
        return completions

    async def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Answer a conversation, or several, as `LLM.chat` does; `options` are those of `generate`."""
        asked = conversations_of(messages)
        rendered = await asyncio.to_thread(lambda: [self._texts.render(each, chat_template_kwargs) for each in asked])
        return await self.generate(rendered, params, **options)

    async def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams = DEFAULT_PARAMS,
        *,
        speculation: str | None = None,
        adapter: str = "",
        stop: str | Sequence[str] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[Token, None]:
        """Yield the tokens of the answer to a prompt, or to a conversation, as they come.

        A loop that is left early ends the request when the stream is closed: at once with `contextlib.aclosing`, else
        when Python finds that nobody has it any more.
        """
        await self.start()
        ids, text = await asyncio.to_thread(self._prepared, prompt, chat_template_kwargs, stops_of(stop))
        (request,) = self._requests(ids, params, speculation, adapter)
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                for token in tokens_of(delta, text):
                    yield token
                if text.stopped:
                    return

    def _prepared(
        self, prompt: Prompt | Sequence[Message], variables: Mapping[str, Any] | None, stops: tuple[str, ...]
    ) -> tuple[Sequence[int], AnswerText]:
        conversation = not isinstance(prompt, str) and bool(prompt) and not are_ids(prompt)
        asked: Any = self._texts.render(prompt, variables) if conversation else prompt  # type: ignore[arg-type]
        return self._texts.encode(asked), self._texts.answer(stops)

    def _requests(
        self, ids: Sequence[int], params: SamplingParams, speculation: str | None, adapter: str
    ) -> list[Request]:
        return make_requests(
            self._ids, self._engine.draw_seed, [ids], params, n=1, speculation=speculation, adapter=adapter
        )


async def _gather(stream: AsyncGenerator[Delta, None], completion: Completion, text: AnswerText | None) -> None:
    async with aclosing(stream) as deltas:
        async for delta in deltas:
            if text is None:
                completion.extend(delta)
                continue
            extend(completion, delta, text)
            if text.stopped:
                return
