"""LLM for users of the library: `engine.llm.LLM` with the model's tokenizer, so that prompts may be texts or
conversations.

Texts are decoded only where they are asked for: with token ids in and out, no tokenizer is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast, overload

from llguidance import LLTokenizer

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine import llm as engine
from pilotfish.engine.llm import DEFAULT_PARAMS, Completion
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Delta, FinishReason, Request
from pilotfish.errors import ParameterError
from pilotfish.text.detokenizer import AnswerText, Detokenizer, Vocabulary
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.grammar.matcher import vocabulary_of
from pilotfish.text.grammar.output_format import Kind, OutputFormat, build
from pilotfish.text.tokenizer import Tokenizer, load_tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
"""A message in OpenAI's form, with text as content."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a streamed answer."""

    text: str
    """What it adds to the text: whole characters only, and no part of a stop string."""
    token_id: int | None
    """None only at an end without a token, such as an error."""
    drafter: str | None
    """The drafter that proposed it; None for the target's own."""
    finish_reason: FinishReason | None = None
    """Why the answer ended; in the last one."""
    error: str | None = None


class LLM(engine.LLM):
    """An engine in this process, with its tokenizer. As `engine.llm.LLM`, and prompts may be texts:

    `LLM("smollm2-135m").generate(["Once upon a time"], SamplingParams(max_tokens=32))[0].text`
    """

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ModelError if it has none."""
        return load_tokenizer(resolve(self.config.model))

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer)

    @cached_property
    def _grammar_tokens(self) -> LLTokenizer:
        if self.tokenizer.folder is None:
            raise ParameterError("grammar", "a grammar needs a tokenizer.json, which this model does not have")
        return vocabulary_of(self.tokenizer.folder, self.info.vocab_size, self.info.eos_token_ids)

    def grammar(self, kind: Kind, value: object) -> Grammar:
        """Return what answers must match, for `SamplingParams.grammar`: `grammar("json_schema", {...})`,
        `grammar("regex", "[0-9]+")`, `grammar("choice", ["yes", "no"])`. Raises ParameterError."""
        return build(OutputFormat(kind, value, kind), self._grammar_tokens)

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
        found = [prompts] if isinstance(prompts, str) or _are_ids(prompts) else list(prompts)
        asked = cast(list[Prompt], found)
        ids = [self._encode(prompt) for prompt in asked]
        stops = _stops(stop)
        if stops:
            requests = self.requests(ids, params, n=n, speculation=speculation, adapter=adapter)
            completions = self._until_stop(requests, n, stops)
        else:
            completions = super().generate(
                ids, params, n=n, speculation=speculation, adapter=adapter, use_tqdm=use_tqdm
            )
        for i, completion in enumerate(completions):
            prompt = asked[i // n]
            completion.prompt = prompt if isinstance(prompt, str) else None
            completion.read = lambda kept: self._text(stops).feed(kept, last=True).text
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
        many = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Sequence[Message]], messages if many else [messages])
        return self.generate([self._render(each, chat_template_kwargs) for each in conversations], params, **options)

    @overload
    def stream(self, requests: Sequence[Request]) -> Iterator[Delta]: ...

    @overload
    def stream(
        self,
        requests: Prompt | Sequence[Message],
        params: SamplingParams = ...,
        *,
        speculation: str | None = ...,
        stop: str | Sequence[str] = ...,
    ) -> Iterator[Token]: ...

    def stream(
        self,
        requests: Any,
        params: SamplingParams = DEFAULT_PARAMS,
        *,
        speculation: str | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Any]:
        """Yield the tokens of the answer to a prompt, or to a conversation, as they come; of a list of requests the
        deltas, as `engine.llm.LLM.stream` does."""
        if not isinstance(requests, str) and (not requests or isinstance(requests[0], Request)):
            return super().stream(requests)
        if not isinstance(requests, str) and not _are_ids(requests):
            requests = self._render(requests, None)
        made = self.requests([self._encode(requests)], params, speculation=speculation)
        return self._tokens(made[0], _stops(stop))

    def _tokens(self, request: Request, stops: tuple[str, ...]) -> Iterator[Token]:
        text = self._text(stops)
        deltas = super().stream([request])
        for delta in deltas:
            last, count = delta.finish_reason, len(delta.token_ids)
            if not count:
                yield Token(text.feed((), last=True).text, None, None, last, delta.error)
            for i, id_ in enumerate(delta.token_ids):
                ends = last is not None and i == count - 1
                piece = text.feed((id_,), last=ends, stop_token=ends and delta.stop_token is not None)
                reason = "stop" if text.stopped else last if ends else None
                yield Token(piece.text, id_, delta.drafter if i < delta.accepted else None, reason, delta.error)
                if text.stopped:
                    deltas.close()  # type: ignore[attr-defined]  # a generator
                    return

    def _until_stop(self, requests: list[Request], n: int, stops: tuple[str, ...]) -> list[Completion]:
        done = {
            request.id: Completion(request_id=request.id, index=i % n, prompt_ids=request.prompt_ids)
            for i, request in enumerate(requests)
        }
        texts = {request.id: self._text(stops) for request in requests}
        for delta in super().stream(requests):
            completion, text = done[delta.request_id], texts[delta.request_id]
            if text.stopped:  # the delta of its abort
                continue
            completion.extend(delta)
            text.feed(delta.token_ids, stop_token=delta.stop_token is not None)
            if text.stopped and completion.finish_reason is None:
                completion.finish_reason = "stop"
                self.core.abort(delta.request_id)
        return list(done.values())

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        rendered = isinstance(prompt, _Rendered)  # its template has written the special tokens
        return self.tokenizer.encode(prompt, add_special_tokens=not rendered) or self.tokenizer.document_start

    def _render(self, messages: Sequence[Message], variables: Mapping[str, Any] | None) -> _Rendered:
        shield = self.tokenizer.shield  # special tokens in a message's text stay text
        taken = [{**message, "content": shield(message.get("content") or "")} for message in messages]
        return _Rendered(self.tokenizer.apply_chat_template(taken, **(variables or {})))

    def _text(self, stops: tuple[str, ...]) -> AnswerText:
        return AnswerText(Detokenizer(self._vocabulary), stops)


class _Rendered(str):
    """A prompt that a chat template has made."""


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _are_ids(prompts: Sequence[Any]) -> bool:
    return bool(prompts) and isinstance(prompts[0], int)
