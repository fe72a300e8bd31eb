"""LLM for users of the library: `engine.llm.LLM` with the model's tokenizer, so that prompts may be texts or
conversations. The calls of AsyncLLM, in `async_llm`, are the same, for use in an event loop.

Texts are decoded only where they are asked for: with token ids in and out, no tokenizer is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

from pilotfish.engine import llm as engine
from pilotfish.engine.completion import DEFAULT_PARAMS, Completion, empty_completions
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Delta, Request
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
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.grammar.output_format import Kind
from pilotfish.text.tokenizer import Tokenizer


class LLM(engine.LLM):
    """An engine in this process, with its tokenizer. As `engine.llm.LLM`, and prompts may be texts:

    `LLM("smollm2-135m").generate(["Once upon a time"], SamplingParams(max_tokens=32))[0].text`
    """

    @cached_property
    def _texts(self) -> Texts:
        return Texts(self.config.model)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ModelError if it has none."""
        return self._texts.tokenizer

    def grammar(self, kind: Kind, value: object) -> Grammar:
        """Return what answers must match, for `SamplingParams.grammar`: `grammar("json_schema", {...})`,
        `grammar("regex", "[0-9]+")`, `grammar("choice", ["yes", "no"])`. Raises ParameterError."""
        return self._texts.grammar(kind, value, self.info)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        *,
        n: int = 1,
        speculation: str | Sequence[str | None] | None = None,
        adapter: str | Sequence[str] = "",
        use_tqdm: bool = False,
        stop: str | Sequence[str] = (),
    ) -> list[Completion]:
        """Answer one prompt or several, each a text or token ids, as `engine.llm.LLM.generate` does. `stop`: texts that
        end an answer, and are not part of it."""
        asked = prompts_of(prompts)
        ids = [self._texts.encode(prompt) for prompt in asked]
        stops = stops_of(stop)
        if stops:
            requests = self.requests(ids, params, n=n, speculation=speculation, adapter=adapter)
            completions = self._until_stop(requests, n, stops)
        else:
            completions = super().generate(
                ids, params, n=n, speculation=speculation, adapter=adapter, use_tqdm=use_tqdm
            )
        self._texts.attach(completions, asked, n, stops)
        return completions

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Answer a conversation, or several; `options` are those of `generate`. Raises ParameterError for a model
        without a chat template, or messages that its template refuses."""
        rendered = [self._texts.render(each, chat_template_kwargs) for each in conversations_of(messages)]
        return self.generate(rendered, params, **options)

    @overload
    def stream(self, requests: Sequence[Request]) -> Iterator[Delta]: ...

    @overload
    def stream(
        self,
        requests: Prompt | Sequence[Message],
        params: SamplingParams = ...,
        *,
        speculation: str | None = ...,
        adapter: str = ...,
        stop: str | Sequence[str] = ...,
        chat_template_kwargs: Mapping[str, Any] | None = ...,
    ) -> Iterator[Token]: ...

    def stream(
        self,
        requests: Any,
        params: SamplingParams = DEFAULT_PARAMS,
        *,
        speculation: str | None = None,
        adapter: str = "",
        stop: str | Sequence[str] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[Any]:
        """Yield the tokens of the answer to a prompt, or to a conversation, as they come; of a list of requests the
        deltas, as `engine.llm.LLM.stream` does."""
        if not isinstance(requests, str) and (not requests or isinstance(requests[0], Request)):
            return super().stream(requests)
        if not isinstance(requests, str) and not are_ids(requests):
            requests = self._texts.render(requests, chat_template_kwargs)
        ids = self._texts.encode(requests)
        (made,) = self.requests([ids], params, speculation=speculation, adapter=adapter)
        return self._tokens(made, stops_of(stop))

    def _tokens(self, request: Request, stops: tuple[str, ...]) -> Iterator[Token]:
        text = self._texts.answer(stops)
        deltas = super().stream([request])
        for delta in deltas:
            yield from tokens_of(delta, text)
            if text.stopped:
                deltas.close()  # type: ignore[attr-defined]  # a generator
                return

    def _until_stop(self, requests: list[Request], n: int, stops: tuple[str, ...]) -> list[Completion]:
        done = {completion.request_id: completion for completion in empty_completions(requests, n)}
        texts = {request.id: self._texts.answer(stops) for request in requests}
        for delta in super().stream(requests):
            text = texts[delta.request_id]
            if text.stopped:  # the delta of its abort
                continue
            extend(done[delta.request_id], delta, text)
            if text.stopped and delta.finish_reason is None:
                self.core.abort(delta.request_id)
        return list(done.values())
