"""The formats that are known by name, and how a model's is found from its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from pilotfish.errors import ModelError
from pilotfish.text.formats.calls import CallReader, Calls, JsonCalls, MistralCalls
from pilotfish.text.formats.harmony import harmony, is_harmony
from pilotfish.text.formats.message_format import CallFormat, MessageFormat
from pilotfish.text.formats.python_calls import PythonCalls, python_arguments, python_keywords
from pilotfish.text.formats.section_calls import SectionCalls
from pilotfish.text.formats.tagged_calls import (
    GLM,
    QWEN_CODER,
    TaggedCall,
    glm_arguments,
    qwen_arguments,
    tagged_arguments,
)
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.message import Tool
from pilotfish.text.tokenizer import Tokenizer

_Form = TypeVar("_Form")

_HERMES = """write a JSON object with its name and arguments within <tool_call></tool_call> tags:
<tool_call>
{"name": "function name", "arguments": {"argument": "value"}}
</tool_call>"""
_PARAMETERS = """answer with nothing but a JSON object:
{"name": "function name", "parameters": {"argument": "value"}}"""
_JSON = _PARAMETERS.replace("parameters", "arguments")
_LIST = """write a list of JSON objects:
%s[{"name": "function name", "arguments": {"argument": "value"}}]%s"""
_PYTHON = """write it in Python:
%sfunction_name(argument="value")%s"""


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _object(key: str) -> Callable[[Tool, Grammar], Sequence[Grammar | str]]:
    """Return what writes a call as {"name": ..., `key`: ...}."""

    def written(tool: Tool, arguments: Grammar) -> Sequence[Grammar | str]:
        return f'{{"name": {_quoted(tool.name)}, "{key}": ', arguments, "}"

    return written


def _tagged(tool: Tool, arguments: Grammar) -> Sequence[Grammar | str]:
    return f'\n{{"name": {_quoted(tool.name)}, "arguments": ', arguments, "}\n</tool_call>"


def _python(tool: Tool, arguments: Grammar) -> Sequence[Grammar | str]:
    return f"{tool.name}(", arguments, ")"


def _list_reader(calls: Calls) -> CallReader:
    return JsonCalls(calls, in_list=True)


_TAGGED = """write its name and arguments within tags:
<tool_call>%s
%s
</tool_call>"""
_DEEPSEEK, _KIMI = "<｜tool▁%s｜>", "<|tool_%s|>"
_DEEPSEEK_MARKS = [_DEEPSEEK % each for each in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")]
_KIMI_MARKS = [
    _KIMI % each
    for each in ("calls_section_begin", "call_begin", "call_argument_begin", "call_end", "calls_section_end")
]


def _deepseek(calls: Calls) -> CallReader:
    """Both of DeepSeek's forms: V3 and R1 write "function", the marker, and the name before a fence."""
    _, begin, middle, close, end = _DEEPSEEK_MARKS
    name = re.compile(rf"(?:function{middle})?\s*([\w.-]+)\s*(?:{middle}|```json)?\s*")
    return SectionCalls(calls, begin, close, end, name)


def _kimi(calls: Calls) -> CallReader:
    _, begin, middle, close, end = _KIMI_MARKS
    name = re.compile(rf"\s*(?:functions\.)?([\w.-]+?)(?::\d+)?\s*{re.escape(middle)}\s*")
    return SectionCalls(calls, begin, close, end, name)


CALL_FORMATS: dict[str, CallFormat] = {
    form.name: form
    for form in (
        CallFormat(
            name="hermes",
            opener="<tool_call>",
            reader=partial(JsonCalls, end="</tool_call>"),
            written=_tagged,
            instructions=_HERMES,
        ),
        CallFormat(
            name="llama3_json",
            starters=("<|python_tag|>", "{"),
            reader=partial(JsonCalls, separators=" \t\r\n;", known=True, begin="<|python_tag|>"),
            between="; ",
            written=_object("parameters"),
            instructions=_PARAMETERS,
        ),
        CallFormat(
            name="json",
            starters=("{", "```json"),
            reader=partial(JsonCalls, known=True, separators=" \t\r\n;,", begin="```json", fence="```"),
            between="\n",
            written=_object("arguments"),
            instructions=_JSON,
        ),
        CallFormat(
            name="pythonic",
            starters=("[",),
            reader=partial(PythonCalls, end="]", begin="["),
            written=_python,
            arguments=python_arguments,
            spelled=python_keywords,
            open_list="[",
            close_list="]",
            between=", ",
            instructions=_PYTHON % ("[", "]"),
        ),
        CallFormat(
            name="mistral",
            opener="[TOOL_CALLS]",
            reader=MistralCalls,
            written=lambda tool, arguments: (f"{tool.name}[ARGS]", arguments),
            id_length=9,
            instructions='write its name and arguments:\n[TOOL_CALLS]function_name[ARGS]{"argument": "value"}',
        ),
        CallFormat(
            name="mistral_list",
            opener="[TOOL_CALLS]",
            reader=MistralCalls,
            written=_object("arguments"),
            open_list="[",
            close_list="]",
            between=", ",
            id_length=9,
            instructions=_LIST % ("[TOOL_CALLS]", ""),
        ),
        CallFormat(
            name="gemma",
            opener="```tool_code",
            reader=partial(PythonCalls, end="```"),
            written=lambda tool, arguments: ("\n", *_python(tool, arguments), "\n```"),
            arguments=python_arguments,
            spelled=python_keywords,
            instructions=_PYTHON % ("```tool_code\n", "\n```"),
            result=("```tool_output\n", "\n```"),
        ),
        CallFormat(
            name="phi4_mini_json",
            opener="functools[",
            reader=_list_reader,
            written=_object("arguments"),
            close_list="]",
            between=", ",
            instructions=_LIST % ("functools", ""),
        ),
        CallFormat(
            name="phi4",
            opener="<|tool_call|>",
            reader=partial(JsonCalls, in_list=True, end="<|/tool_call|>"),
            written=_object("arguments"),
            open_list="[",
            close_list="]<|/tool_call|>",
            between=", ",
            instructions=_LIST % ("<|tool_call|>", "<|/tool_call|>"),
            result_role="tool_response",
        ),
        CallFormat(
            name="qwen3_coder",
            opener="<tool_call>",
            reader=partial(TaggedCall, tags=QWEN_CODER),
            written=lambda tool, given: (f"\n<function={tool.name}>\n", given, "</function>\n</tool_call>"),
            arguments=partial(tagged_arguments, QWEN_CODER),
            spelled=qwen_arguments,
            instructions=_TAGGED
            % ("\n<function=function_name>", "<parameter=argument>\nvalue\n</parameter>\n</function>"),
        ),
        CallFormat(
            name="glm45",
            opener="<tool_call>",
            reader=partial(TaggedCall, tags=GLM),
            written=lambda tool, given: (f"{tool.name}\n", given, "</tool_call>"),
            arguments=partial(tagged_arguments, GLM),
            spelled=glm_arguments,
            instructions=_TAGGED % ("function_name", "<arg_key>argument</arg_key>\n<arg_value>value</arg_value>"),
        ),
        CallFormat(
            name="deepseek_v3",
            opener=_DEEPSEEK % "calls▁begin",
            reader=_deepseek,
            written=lambda tool, given: (
                f"{_DEEPSEEK % 'call▁begin'}function{_DEEPSEEK % 'sep'}{tool.name}\n```json\n",
                given,
                f"\n```{_DEEPSEEK % 'call▁end'}",
            ),
            between="\n",
            close_list=_DEEPSEEK % "calls▁end",
            instructions="write it as\n{}{}function{}function_name\n```json\n{{}}\n```{}{}".format(*_DEEPSEEK_MARKS),
        ),
        CallFormat(
            name="deepseek_v31",
            opener=_DEEPSEEK % "calls▁begin",
            reader=_deepseek,
            written=lambda tool, given: (
                f"{_DEEPSEEK % 'call▁begin'}{tool.name}{_DEEPSEEK % 'sep'}",
                given,
                _DEEPSEEK % "call▁end",
            ),
            close_list=_DEEPSEEK % "calls▁end",
            instructions="write it as\n{}{}function_name{}{{}}{}{}".format(*_DEEPSEEK_MARKS),
        ),
        CallFormat(
            name="kimi_k2",
            opener=_KIMI % "calls_section_begin",
            reader=_kimi,
            written=lambda tool, given: (
                f"{_KIMI % 'call_begin'}functions.{tool.name}:0{_KIMI % 'call_argument_begin'}",
                given,
                _KIMI % "call_end",
            ),
            close_list=_KIMI % "calls_section_end",
            id_form="functions.{name}:{index}",
            instructions="write it as\n{}{}functions.function_name:0{}{{}}{}{}".format(*_KIMI_MARKS),
        ),
        CallFormat(
            name="granite",
            opener="<|tool_call|>",
            reader=_list_reader,
            written=_object("arguments"),
            open_list="[",
            close_list="]",
            between=", ",
            instructions=_LIST % ("<|tool_call|>", ""),
        ),
    )
}
REASONING_FORMATS: dict[str, tuple[str, str]] = {
    "think": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "reasoning": ("<reasoning>", "</reasoning>"),
    "thinking": ("<thinking>", "</thinking>"),
    "seed": ("<seed:think>", "</seed:think>"),
    "granite": ("Here is my thought process:", "Here is my response:"),
}
"""The markers of reasoning, by their name for --reasoning-parser."""
_CALL_ALIASES = {
    "qwen": "hermes", "qwen25": "hermes", "qwen3": "hermes", "llama3": "llama3_json", "llama4_pythonic": "pythonic",
    "qwen3_xml": "qwen3_coder", "glm47": "glm45",
}  # fmt: skip
_REASONING_ALIASES = {
    "deepseek_r1": "think", "qwen3": "think", "qwen": "think", "glm45": "think", "seed_oss": "seed",
}  # fmt: skip
"""Names that other servers have for them."""
HARMONY_NAMES = ("harmony", "openai", "gpt_oss", "openai_gptoss")
"""The names of gpt-oss's format, for calls and for reasoning."""
_TRACES = (
    ("<function=", "qwen3_coder"), ("<arg_key>", "glm45"), ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<｜tool▁sep｜>", "deepseek_v31"),
    ("[ARGS]", "mistral"), ("[TOOL_CALLS]", "mistral_list"), ("<tool_call>", "hermes"), ("<|tool|>", "phi4"),
    ("<|/tool_call|>", "phi4"), ("<|tool_call|>", "granite"), ("functools[", "phi4_mini_json"),
    ("tool_code", "gemma"), ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary', "llama3_json"), ('"name": function name, "parameters"', "llama3_json"),
    ("func_name1(params_name1", "pythonic"),
)  # fmt: skip
"""What a chat template has in it, and the format of calls that this tells; the first one counts."""


def detect(
    tokenizer: Tokenizer, tool_call_parser: str | None = None, reasoning_parser: str | None = None
) -> MessageFormat:
    """Return the format of a model, found from its chat template, or by the names of formats; "none": no such part.

    A model whose template does not know tools is shown them in a system message, and calls in Hermes' format. Raises
    ModelError for a name that is not known.
    """
    template = tokenizer.chat_template or ""
    special = {tokenizer.token(id_): id_ for id_ in tokenizer.special_ids}
    named = [name for name in (tool_call_parser, reasoning_parser) if name not in (None, "auto", "none")]
    if any(name in HARMONY_NAMES for name in named) or (not named and is_harmony(template)):
        if not all(name in HARMONY_NAMES for name in named):
            parsers = f"{tool_call_parser!r} and reasoning_parser {reasoning_parser!r}"
            raise ModelError(f"tool_call_parser {parsers} do not go together: harmony is a format of whole messages")
        return harmony(special, tool_call_parser != "none", reasoning_parser != "none")
    calls = next((name for trace, name in _TRACES if trace in template), "hermes")
    if calls == "deepseek_v31" and "```json" in template:
        calls = "deepseek_v3"
    reasoning = next((name for name, (_, end) in REASONING_FORMATS.items() if end in template), "none")
    if tool_call_parser == "mistral" and calls == "mistral_list":
        tool_call_parser = calls  # both have this name elsewhere
    return MessageFormat(
        calls=_form("tool_call_parser", tool_call_parser, calls, CALL_FORMATS, _CALL_ALIASES),
        reasoning=_form("reasoning_parser", reasoning_parser, reasoning, REASONING_FORMATS, _REASONING_ALIASES),
        special=special,
    )


def _form(setting: str, name: str | None, found: str, known: dict[str, _Form], aliases: dict[str, str]) -> _Form | None:
    name = found if name in (None, "auto") else name
    name = aliases.get(name or "", name)
    if name == "none":
        return None
    if name not in known:
        listed = ", ".join(["auto", "none", *known, HARMONY_NAMES[0]])
        raise ModelError(f"{setting} is {name!r}, but the formats that are known are {listed}")
    return known[name]
