"""Every format: what its parser finds does not depend on how an answer is cut, and it reads what its grammar allows."""

from __future__ import annotations

import json
import random
from itertools import count
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.errors import ModelError, ParameterError
from pilotfish.text.formats.message_format import MessageFormat
from pilotfish.text.formats.registry import CALL_FORMATS, REASONING_FORMATS, detect
from pilotfish.text.grammar import compose
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.grammar.output_format import json_schema
from pilotfish.text.message import AssistantMessage, CallBegin, NamedTool, Part, Tool, ToolCall
from tests.support.grammars import accepts, byte_tokenizer, random_answer

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city"],
}
TOOLS = (
    Tool(name="weather", description="The weather of a city.", parameters=WEATHER, strict=True),
    Tool(name="now", description="What time it is."),
)
SCHEMAS: dict[str, Any] = {"weather": WEATHER, "now": {"type": "object", "properties": {}}}
FORMATS = {
    f"{name}-{thought}": MessageFormat(calls=calls, reasoning=REASONING_FORMATS.get(thought), special={})
    for name, calls in CALL_FORMATS.items()
    for thought in ("none", "think")
}


def schema(value: Any, place: str) -> Grammar:
    return json_schema(value, place, byte_tokenizer())


def parse(form: MessageFormat, pieces: list[str], in_reasoning: bool = False) -> AssistantMessage:
    """Parse an answer cut into pieces; checks that each call begins once, before its arguments."""
    ids = count()
    parser = form.parser(TOOLS, in_reasoning=in_reasoning, new_id=lambda: f"call {next(ids)}")
    parts: list[Part] = [part for piece in pieces for part in parser.feed(piece)] + list(parser.finish())
    begins = [part.index for part in parts if isinstance(part, CallBegin)]
    assert begins == list(range(len(begins)))
    message = AssistantMessage()
    message.add(parts)
    return message


def cut(text: str, rng: random.Random) -> list[str]:
    pieces = []
    while text:
        length = rng.choice((1, 1, 2, 3, 7, 30, 1000))
        pieces.append(text[:length])
        text = text[length:]
    return pieces


def assert_same_in_all_cuts(
    form: MessageFormat, text: str, rng: random.Random, in_reasoning: bool = False
) -> AssistantMessage:
    whole = parse(form, [text], in_reasoning)
    for pieces in (list(text), *(cut(text, rng) for _ in range(5))):
        assert parse(form, pieces, in_reasoning) == whole, pieces
    return whole


def calls_of(message: AssistantMessage) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in message.calls]


ONE = ("weather", {"city": 'Oslo {"}" ', "days": 3})
TWO: tuple[str, Any] = ("now", {})
ARGUMENTS = json.dumps(ONE[1])
LIST = f'[{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "now", "arguments": {{}}}}]'
WRITTEN = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"arguments": {}, "name": "now"}\n</tool_call>',
    "llama3_json": f'{{"name": "weather", "parameters": {ARGUMENTS}}}; {{"name": "now", "parameters": {{}}}}',
    "json": f'{{"name": "weather", "arguments": {json.dumps(ARGUMENTS)}}}\n{{"name": "now"}}',
    "pythonic": "[weather(city='Oslo {\"}\" ', days=3), now()]",
    "mistral": f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}",
    "mistral_list": f"[TOOL_CALLS] {LIST}",
    "gemma": "```tool_code\nweather(city='Oslo {\"}\" ', days=3)\nnow()\n```",
    "phi4_mini_json": f"functools{LIST}",
    "phi4": f"<|tool_call|>{LIST}<|/tool_call|>",
    "granite": f"<|tool_call|>{LIST}",
    "qwen3_coder": '<tool_call>\n<function=weather>\n<parameter=city>\nOslo {"}" \n</parameter>\n'
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "glm45": '<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo {"}" </arg_value>\n'
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    f"{ARGUMENTS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n"
    "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    f"{ARGUMENTS}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
}


@pytest.mark.parametrize("name", FORMATS)
def test_calls_as_models_write_them(name: str) -> None:
    form, rng = FORMATS[name], random.Random(1)
    written = WRITTEN[name.rpartition("-")[0]]
    before = "<think>\nWhich city? <tool\n</think>\n\n" if form.reasoning else ""
    message = assert_same_in_all_cuts(form, before + written, rng)
    assert calls_of(message) == [ONE, TWO]
    assert message.content == ""
    assert message.reasoning == ("Which city? <tool" if form.reasoning else "")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("choice", ["required", NamedTool("weather"), "auto"])
def test_what_the_grammar_allows_is_read(name: str, choice: Any) -> None:
    """Random walks under the grammar: whatever comes out is calls of known tools with arguments that match."""
    form, rng = FORMATS[name], random.Random(2)
    grammar = form.grammar(TOOLS, choice, schema=schema)
    assert grammar is not None
    answers = [random_answer(grammar, rng, 400) for _ in range(12)]
    texts = [text for text in answers if text is not None]
    assert texts
    for text in texts:
        message = assert_same_in_all_cuts(form, text, rng)
        for call in message.calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        if choice != "auto":
            assert message.calls
        if isinstance(choice, NamedTool):
            assert [call.name for call in message.calls] == ["weather"]


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_at_most(name: str) -> None:
    form = FORMATS[name]
    for choice in ("required", "auto"):
        grammar = form.grammar(TOOLS, choice, schema=schema, parallel=False)
        assert grammar is not None
        assert not accepts(grammar, WRITTEN[name.rpartition("-")[0]])


MARKERS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "```tool_code", "```", "[", "]"),
    *('{"name": "now", "arguments": {}}', '{"name"', ': "weather"', '"arguments": {', "}", "}}", "functools", "now()"),
    *(
        "<|tool_call|>",
        "<|/tool_call|>",
        " ",
        "\n",
        "\n\n",
        "text",
        'a "quote" ',
        "<",
        "</",
        "é😀",
        "\\",
        ",",
        ";",
        "```json",
        "now",
        "{",
        "weather(",
    ),
]


@given(st.lists(st.sampled_from(MARKERS), max_size=14), st.sampled_from(sorted(FORMATS)), st.booleans(), st.randoms())
def test_any_text_in_any_cuts(parts: list[str], name: str, in_reasoning: bool, rng: random.Random) -> None:
    """Also what no model should write: never an exception, and the same message however it is cut."""
    form = FORMATS[name]
    text = "".join(parts)
    message = assert_same_in_all_cuts(form, text, rng, in_reasoning and form.reasoning is not None)
    if not any(marker in text for marker in ("<", "[", "`", "{", "functools", "think")):
        assert message.content.strip() + message.reasoning.strip() == text.strip()


def test_an_answer_without_calls_is_itself() -> None:
    for form in FORMATS.values():
        for text in ("Hello.  \n", "a [1] {x} `y` <b>", " \n leading", "[1] is a reference", '{"a": 1}'):
            message = assert_same_in_all_cuts(form, text, random.Random(3))
            assert message == AssistantMessage(content=text), form.calls


def test_a_call_that_is_cut_off_keeps_what_there_is() -> None:
    form = FORMATS["hermes-none"]
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Os'
    assert assert_same_in_all_cuts(form, text, random.Random(4)).calls == [
        ToolCall("call 0", "weather", '{"city": "Os')
    ]
    for text in ("<tool_call>\nnonsense", '<tool_call>\n{"nam'):
        message = assert_same_in_all_cuts(form, text, random.Random(5))
        assert (message.calls, message.content.strip()) == ([], text)


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "kimi_k2"])
def test_long_arguments_take_linear_time(name: str) -> None:
    import time

    def seconds(length: int) -> float:
        text = FORMATS[f"{name}-none"].written_calls([("now", {"a": "x" * length})])
        start = time.perf_counter()
        parse(FORMATS[f"{name}-none"], [text[i : i + 4] for i in range(0, len(text), 4)])
        return time.perf_counter() - start

    assert min(seconds(80_000) for _ in range(3)) < 24 * min(seconds(10_000) for _ in range(3))


def test_content_streams_before_a_call() -> None:
    parser = FORMATS["hermes-none"].parser(TOOLS)
    assert [len(parser.feed(piece)) for piece in ("Let", " me", " see", " <to", "ols")] == [1, 1, 1, 0, 1]


def test_a_strict_tool_is_enforced_or_refused() -> None:
    form = FORMATS["hermes-none"]
    bad = {"type": "object", "not": {}}
    with pytest.raises(ParameterError) as caught:
        form.grammar([Tool(name="f", parameters=bad, strict=True)], "required", schema=schema)
    assert caught.value.param.startswith("tools[0].function.parameters")
    loose = form.grammar([Tool(name="f", parameters=bad)], "required", schema=schema)
    assert loose is not None
    assert accepts(loose, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>')


def test_a_schema_and_tools_together() -> None:
    form = FORMATS["hermes-think"]
    answer = compose.json_value({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    grammar = form.grammar(TOOLS, "auto", schema=schema, answer=answer)
    assert grammar is not None
    assert accepts(grammar, '<think>x</think>\n\n{"a":1}')
    assert accepts(grammar, '{"a":1}')
    assert not accepts(grammar, "free text")
    assert accepts(grammar, WRITTEN["hermes"].partition("\n<tool_call>")[0].replace('Oslo {\\"}\\" ', "Oslo"))


class _Tokenizer:
    special_ids = frozenset({5})

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def token(self, id_: int) -> str:
        return "[TOOL_CALLS]"


@pytest.mark.parametrize(
    ("template", "calls", "reasoning"),
    [
        (None, "hermes", None),
        ("{{ '<tool_call>' }} {{ '</think>' }}", "hermes", "think"),
        ("[TOOL_CALLS] [ARGS] [/THINK]", "mistral", "mistral"),
        ("[TOOL_CALLS] [", "mistral_list", None),
        ("<|python_tag|>", "llama3_json", None),
        ("<|tool|>", "phi4", None),
        ("<|tool_call|>", "granite", None),
        ("```tool_code", "gemma", None),
        ("<tool_call>\\n<function=f>", "qwen3_coder", None),
        ("<tool_call>{f}\\n<arg_key> </think>", "glm45", "think"),
        ("<｜tool▁sep｜> ```json", "deepseek_v3", None),
        ("<｜tool▁sep｜> </think> ```", "deepseek_v31", "think"),
        ("<|tool_calls_section_begin|>", "kimi_k2", None),
    ],
)
def test_detection(template: str | None, calls: str, reasoning: str | None) -> None:
    form = detect(_Tokenizer(template))  # type: ignore[arg-type]
    assert form.calls is not None
    assert form.calls.name == calls
    assert form.reasoning == (REASONING_FORMATS[reasoning] if reasoning else None)
    assert (5 in form.shown) == calls.startswith("mistral")


def test_formats_by_name() -> None:
    tokenizer: Any = _Tokenizer("<tool_call> </think>")
    form = detect(tokenizer, "qwen3", "none")
    assert (form.calls, form.reasoning) == (CALL_FORMATS["hermes"], None)
    assert detect(tokenizer, "none").calls is None
    assert detect(tokenizer, "qwen3", "qwen3").reasoning == REASONING_FORMATS["think"]
    assert detect(_Tokenizer("[TOOL_CALLS]"), "mistral").calls == CALL_FORMATS["mistral_list"]  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"tool_call_parser is 'nope', but .* hermes"):
        detect(tokenizer, "nope")


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('weather("Oslo", days=2)', '{"city": "Oslo", "days": 2}'),
        ("print(weather(city='a\\'b', days=None))", '{"city": "a\'b", "days": null}'),
        ('default_api.weather(city="""a "b" )""")', '{"city": "a \\"b\\" )"}'),
        ('weather(city="\\ud83d\\ude00\\/")', '{"city": "\\ud83d\\ude00\\/"}'),
        ("weather(city='\\ud83d')", '{"city": "\\ud83d"}'),
        ("weather(city=['\\d', True, {'a': (1, 0x10)}])", '{"city": ["\\\\d", true, {"a": [1, 16]}]}'),
    ],
)
def test_calls_in_python(written: str, arguments: str) -> None:
    message = assert_same_in_all_cuts(FORMATS["gemma-none"], f"```tool_code\n{written}\n```", random.Random(6))
    assert [(call.name, call.arguments) for call in message.calls] == [("weather", arguments)]
    assert message.content == ""


@pytest.mark.parametrize("written", ["weather(1, 2, 3)", "weather(city={1})", "weather(city=x)", "x = 1", "f(**{})"])
def test_what_is_no_call_in_python_stays_content(written: str) -> None:
    message = assert_same_in_all_cuts(FORMATS["gemma-none"], f"```tool_code\n{written}\n```", random.Random(7))
    assert message.calls == []
    assert written in message.content


def test_arguments_in_python_match_the_schema() -> None:
    form = FORMATS["pythonic-none"]
    grammar = form.grammar(TOOLS, "required", schema=schema)
    assert grammar is not None
    for text in ('[weather(city="Oslo")]', '[weather(city="Oslo", days=3), now()]'):
        assert accepts(grammar, text)
    for text in ("[weather()]", "[weather(days=3)]", '[weather(city="Oslo", days=30)]', "[now(a=1)]"):
        assert not accepts(grammar, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", 'Like so: <tool_call>{"nam": 1}</tool_call> and on'),
        ("hermes", "a <tool_call> b"),
        ("json", '```json\n{"a": 1}\n```\nand on'),
        ("json", '{"type": "function", "name": "other", "arguments": {}} and on'),
        ("json", '{"a": 1, "name": "now", "arguments": {}} and on'),
        ("llama3_json", '{"name": 3}; {"name": "now"}'),
        ("phi4_mini_json", "Use functools.partial, or functools"),
        ("mistral", "[TOOL_CALLS] I think that {x} is 1"),
        ("gemma", "```tool_code\nnothing = 1\n``` is it"),
        ("pythonic", "[other(a=1)] is it"),
        ("pythonic", "[1, 2, now()]"),
    ],
)
def test_what_is_no_call_stays_content(name: str, text: str) -> None:
    message = assert_same_in_all_cuts(FORMATS[f"{name}-none"], text, random.Random(8))
    assert message == AssistantMessage(content=text)


def test_a_list_that_is_no_call_streams() -> None:
    parser = FORMATS["pythonic-none"].parser(TOOLS)
    assert [len(parser.feed(piece)) for piece in ("[", "1", ", 2", "]")] == [0, 1, 1, 1]
    parser = FORMATS["json-none"].parser(TOOLS)
    assert [len(parser.feed(piece)) for piece in ('{"', 'a": ', '"b', 'c"', "}")] == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", CALL_FORMATS)
def test_instructions_show_a_call_that_is_read(name: str) -> None:
    """The example in the instructions is a call in this very format."""
    form = FORMATS[f"{name}-none"]
    text = form.instructions(TOOLS)
    assert '"name": "weather"' in text
    example = text.split("To call a function, ")[1].partition("\n")[2]
    example = example.replace("function name", "now").replace("function_name", "now")
    message = assert_same_in_all_cuts(form, example, random.Random(9))
    assert [call.name for call in message.calls] == ["now"]
    assert message.content == ""


def test_calls_in_a_fence_and_in_both_of_mistral_s_forms() -> None:
    rng = random.Random(10)
    fenced = f"```json\n{WRITTEN['json']}\n```"
    message = assert_same_in_all_cuts(FORMATS["json-none"], fenced, rng)
    assert (calls_of(message), message.content) == ([ONE, TWO], "")
    for name, other in (("mistral", "mistral_list"), ("mistral_list", "mistral")):
        assert calls_of(assert_same_in_all_cuts(FORMATS[f"{name}-none"], WRITTEN[other], rng)) == [ONE, TWO]
