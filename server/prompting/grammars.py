"""Grammars: what answers must match, made from requests, checked, and kept for the next request that has the same."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import msgspec
from llguidance import LLTokenizer

from pilotfish.engine.request import EngineInfo
from pilotfish.errors import ModelError, ParameterError
from pilotfish.server.prompting.conversation import Conversation
from pilotfish.text.formats.message_format import MessageFormat
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.grammar.matcher import vocabulary_of
from pilotfish.text.grammar.output_format import OutputFormat, build, json_schema
from pilotfish.text.tokenizer import Tokenizer

KEPT = 256
"""Grammars that are kept; their sources have some kilobytes each."""

_encode = msgspec.json.Encoder(enc_hook=repr).encode


class Grammars:
    """Makes grammars in threads of its own. The vocabulary that they are checked with is loaded by the first one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: LLTokenizer | None = None
        self._loading = Lock()
        self._kept: OrderedDict[bytes, Grammar | None] = OrderedDict()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammars")

    async def of_output(self, output: OutputFormat, info: EngineInfo) -> Grammar | None:
        """Return the grammar of an answer in this form. Raises ParameterError with the place at fault."""
        return await self._get(("output", _key(output)), output.place, self._build, output, info)

    async def of_conversation(
        self,
        conversation: Conversation,
        form: MessageFormat,
        output: OutputFormat | None,
        in_reasoning: bool,
        info: EngineInfo,
    ) -> Grammar | None:
        """Return the grammar of an answer with reasoning, calls and `output`; None if nothing is to be enforced."""
        tools = conversation.tools if conversation.tool_choice != "none" else ()
        if not tools and output is None:
            return None
        flags = (conversation.parallel_tool_calls, in_reasoning, conversation.continue_final_message)
        parts = (tools, conversation.tool_choice, flags)
        key = ("conversation", parts, None if output is None else _key(output))
        place = "tools" if output is None else output.place
        return await self._get(key, place, self._combine, conversation, form, output, in_reasoning, info)

    async def _get(self, key: Any, place: str, make: Any, *arguments: Any) -> Grammar | None:
        try:
            encoded = _encode(key)
        except UnicodeEncodeError:
            raise ParameterError(place, f"{place} is not valid Unicode text (it has a lone surrogate)") from None
        if encoded not in self._kept:
            made: Grammar | None = await asyncio.get_running_loop().run_in_executor(self._threads, make, *arguments)
            self._kept[encoded] = made
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(encoded)
        return self._kept[encoded]

    def _build(self, output: OutputFormat, info: EngineInfo) -> Grammar:
        return build(output, self._load(info, output.place))

    def _combine(
        self,
        conversation: Conversation,
        form: MessageFormat,
        output: OutputFormat | None,
        in_reasoning: bool,
        info: EngineInfo,
    ) -> Grammar | None:
        tools: Sequence[Any] = conversation.tools
        vocabulary = self._load(info, "tools" if output is None else output.place)
        return form.grammar(
            tools,
            conversation.tool_choice,
            schema=lambda schema, place: json_schema(schema, place, vocabulary),
            parallel=conversation.parallel_tool_calls,
            answer=None if output is None else build(output, vocabulary),
            in_reasoning=in_reasoning,
            begun=conversation.continue_final_message,
        )

    def _load(self, info: EngineInfo, place: str) -> LLTokenizer:
        with self._loading:
            if self._vocabulary is None:
                if self._tokenizer.folder is None:
                    raise ParameterError(place, f"{place} needs a tokenizer.json, which this model does not have")
                try:
                    self._vocabulary = vocabulary_of(self._tokenizer.folder, info.vocab_size, info.eos_token_ids)
                except ModelError as error:
                    raise ParameterError(place, f"{place} is not supported with this model: {error}") from error
            return self._vocabulary


def _key(output: OutputFormat) -> Any:
    return output.kind, output.value, output.whitespace, output.place
