"""Texts around an engine that knows token ids: prompts and conversations before it, answers behind it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from llguidance import LLTokenizer

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.completion import Completion
from pilotfish.engine.request import Delta, EngineInfo, FinishReason
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


class Texts:
    """A model's tokenizer, loaded at first use: with token ids in and out there is none. Threads may share it."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._lock = threading.RLock()
        self._tokenizer: Tokenizer | None = None
        self._vocabulary: Vocabulary | None = None
        self._grammar_tokens: LLTokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ModelError for a model that has none."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(resolve(self._model))
            return self._tokenizer

    def grammar(self, kind: Kind, value: object, info: EngineInfo) -> Grammar:
        """See `LLM.grammar`; `info` is the engine's."""
        with self._lock:
            if self._grammar_tokens is None:
                if self.tokenizer.folder is None:
                    raise ParameterError("grammar", "a grammar needs a tokenizer.json, which this model does not have")
                self._grammar_tokens = vocabulary_of(self.tokenizer.folder, info.vocab_size, info.eos_token_ids)
        return build(OutputFormat(kind, value, kind), self._grammar_tokens)

    def encode(self, prompt: Prompt) -> Sequence[int]:
        """Return the token ids of a prompt; those of a conversation that `render` has made a text of have its
        template's special tokens and no others."""
        if not isinstance(prompt, str):
            return prompt
        rendered = isinstance(prompt, _Rendered)
        return self.tokenizer.encode(prompt, add_special_tokens=not rendered) or self.tokenizer.document_start

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] | None) -> str:
        """Return the prompt for a conversation. Raises ParameterError for a model without a chat template, or messages
        that its template refuses."""
        shield = self.tokenizer.shield  # special tokens in a message's text stay text
        taken = [{**message, "content": shield(message.get("content") or "")} for message in messages]
        return _Rendered(self.tokenizer.apply_chat_template(taken, **(variables or {})))

    def answer(self, stops: Sequence[str]) -> AnswerText:
        """Return the text of an answer, to be fed its tokens."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self.tokenizer)
        return AnswerText(Detokenizer(self._vocabulary), stops)

    def attach(
        self, completions: Sequence[Completion], prompts: Sequence[Prompt], n: int, stops: Sequence[str]
    ) -> None:
        """Give completions their prompts, of which each has n, and the means to decode their texts."""
        for i, completion in enumerate(completions):
            prompt = prompts[i // n]
            completion.prompt = prompt if isinstance(prompt, str) else None
            completion.read = lambda kept: self.answer(stops).feed(kept, last=True).text


class _Rendered(str):
    """A prompt that a chat template has made."""


def tokens_of(delta: Delta, text: AnswerText) -> Iterator[Token]:
    """Yield the tokens of a delta; the last one if `text` has stopped, or has a finish_reason."""
    reason, count = delta.finish_reason, len(delta.token_ids)
    if not count:
        yield Token(text.feed((), last=True).text, None, None, reason, delta.error)
    for i, id_ in enumerate(delta.token_ids):
        ends = reason is not None and i == count - 1
        piece = text.feed((id_,), last=ends, stop_token=ends and delta.stop_token is not None)
        drafter = delta.drafter if i < delta.accepted else None
        yield Token(piece.text, id_, drafter, "stop" if text.stopped else reason if ends else None, delta.error)
        if text.stopped:
            return


def extend(completion: Completion, delta: Delta, text: AnswerText) -> None:
    """Append a delta to a completion that ends where a stop string does."""
    completion.extend(delta)
    text.feed(delta.token_ids, stop_token=delta.stop_token is not None)
    if text.stopped:
        completion.finish_reason = "stop"


def prompts_of(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return a list of prompts, of one as of several."""
    return cast(list[Prompt], [prompts] if isinstance(prompts, str) or are_ids(prompts) else list(prompts))


def conversations_of(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> Sequence[Sequence[Message]]:
    """Return a list of conversations, of one as of several."""
    many = bool(messages) and not isinstance(messages[0], Mapping)
    return cast(Sequence[Sequence[Message]], messages if many else [messages])


def stops_of(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return stop strings, of one as of several."""
    return (stop,) if isinstance(stop, str) else tuple(stop)


def are_ids(prompts: Sequence[Any]) -> bool:
    """Return whether this is a prompt of token ids, rather than several prompts or messages."""
    return bool(prompts) and isinstance(prompts[0], int)
