"""MessageFormat: how one model writes messages. Its parser reads an answer, its grammar demands one."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pilotfish.errors import ParameterError
from pilotfish.text.formats.calls import CallReader, Calls
from pilotfish.text.formats.parser import AnswerParser, PlainParser
from pilotfish.text.grammar import compose
from pilotfish.text.grammar.compose import Marker
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.grammar.output_format import ANY_OBJECT
from pilotfish.text.message import MessageParser, NamedTool, Tool, ToolChoice

SchemaBuilder = Callable[[Any, str], Grammar]
"""Makes and checks the grammar of a JSON schema at a place: (schema, place) -> Grammar. Raises ParameterError."""

_INSTRUCTIONS = """You have access to these functions:
<tools>
{tools}
</tools>

To call a function, {how}"""


_ARGUMENTS = Grammar("")
"""Stands for a call's arguments."""


def _json(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """How a model writes tool calls."""

    name: str
    """Its name for --tool-call-parser."""
    opener: str = ""
    """The marker before the calls, which may follow content; "" for calls that are the whole answer."""
    starters: tuple[str, ...] = ()
    """What an answer of calls begins with, where there is no opener, or besides it."""
    reader: Callable[[Calls], CallReader]
    written: Callable[[Tool, Grammar], Sequence[Grammar | str]]
    """Returns a call without its opener: of a tool, and the grammar of its arguments."""
    arguments: Callable[[dict[str, Any], str, Callable[[Any, str, Any], Grammar], bool], Grammar] | None = None
    """Makes the grammar of arguments that are not JSON, from a schema, its place, what makes the grammar of a schema
    (its last argument is one to fall back on), and whether the tool is strict; None: they are."""
    open_list: str = ""
    close_list: str = ""
    """What stands around all of the calls, behind the opener: most formats have an opener for each call instead."""
    between: str = ""
    """What stands between two calls."""
    id_length: int = 0
    """Characters of an id that templates demand (Mistral's 9); 0: call_ and 24 characters."""
    id_form: str = ""
    """The form of ids that the model's calls are named by, of `name` and `index`, the number of calls before it in the
    conversation; "": any."""
    instructions: str = ""
    """How to write a call, for a template that doesn't know tools: what follows "To call a function, "."""
    spelled: Callable[[dict[str, Any]], str] = _json
    """Returns arguments as the model writes them."""
    result: tuple[str, str] = ("<tool_response>\n", "\n</tool_response>")
    """What stands around a call's result in a user's message, for a template that doesn't know them."""
    result_role: str = ""
    """The role of results, for a template that writes any role as a token: where the model has it."""

    def text(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Return calls, each a name and its arguments, as the model writes them. Arguments that are no object are
        text."""
        bodies = []
        for name, arguments in calls:
            own = self.spelled(arguments) if isinstance(arguments, dict) else str(arguments)
            parts = self.written(Tool(name=name), _ARGUMENTS)
            bodies.append("".join(part if isinstance(part, str) else own for part in parts))
        if self.close_list or not self.opener:
            return f"{self.opener}{self.open_list}{self.between.join(bodies)}{self.close_list}"
        return "\n".join(f"{self.opener}{body}" for body in bodies)


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageFormat:
    """How one model writes reasoning and calls."""

    reasoning: tuple[str, str] | None = None
    """The markers that open and close reasoning; None: the model has none."""
    calls: CallFormat | None = None
    special: dict[str, int]
    """Special tokens by their spelling, for markers that are tokens."""

    @property
    def shown(self) -> frozenset[int]:
        """Special tokens that the parser must see spelled out, though they are not part of the text."""
        markers = list(self.reasoning or ())
        if self.calls is not None:
            literal = [self.calls.opener, *self.calls.starters, self.calls.open_list, self.calls.close_list]
            parts = self.calls.written(Tool(name="f"), compose.json_value(ANY_OBJECT))
            markers += [*literal, *(part for part in parts if isinstance(part, str))]
        return frozenset(id_ for spelling, id_ in self.special.items() if any(spelling in each for each in markers))

    @property
    def thinks_again(self) -> bool:
        """Whether reasoning may come more than once."""
        return False

    @property
    def ends(self) -> tuple[int, ...]:
        """Special tokens that end an answer, besides those of the model's configuration."""
        return ()

    def effort(self, wanted: str) -> str:
        """Return a reasoning effort in the words that the model knows."""
        return wanted

    def plain(self) -> MessageFormat:
        """Return the format of answers that are content alone."""
        return replace(self, reasoning=None, calls=None)

    def parser(
        self,
        tools: Sequence[Tool] = (),
        *,
        in_reasoning: bool = False,
        begun: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> MessageParser:
        """Return a new parser of one answer; calls are looked for only with `tools`. `in_reasoning`, `begun`: whether
        the prompt has opened reasoning, or the message."""
        call = self.calls if tools else None
        if call is None and self.reasoning is None:
            return PlainParser()
        openers, starters = [], []
        if call is not None:
            calls = Calls({tool.name: schemas_of(tool) for tool in tools}, new_id or self.new_id)

            def reader() -> CallReader:
                return call.reader(calls)

            openers = [(call.opener, reader)] if call.opener else []
            starters = [(start, reader) for start in call.starters]
        return AnswerParser([self.reasoning] if self.reasoning else [], in_reasoning, openers, starters)

    def new_id(self) -> str:
        """Return an id for a call."""
        length = self.calls.id_length if self.calls is not None else 0
        if length:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(length))
        return f"call_{secrets.token_hex(12)}"

    def grammar(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        *,
        schema: SchemaBuilder,
        parallel: bool = True,
        answer: Grammar | None = None,
        in_reasoning: bool = False,
        begun: bool = False,
        place: str = "tools",
    ) -> Grammar | None:
        """Return the grammar of a whole answer, or None where nothing is to be enforced.

        A choice that demands a call gets one, or several if `parallel`. With "auto" a call must be of one of the tools,
        with arguments that match its schema, from where the model opens it; what is not a call is free text, or
        `answer`. Reasoning is free before all of it. Raises ParameterError for the schema of a strict tool that cannot
        be enforced; `place`: where the client sent the tools. A tool that isn't strict is held to any object instead.
        """
        whole = answer
        if tools and choice != "none" and self.calls is not None:
            wanted = [tool for tool in tools if not isinstance(choice, NamedTool) or tool.name == choice.name]
            calls = [self._call(tool, f"{place}[{tools.index(tool)}]", schema) for tool in wanted]
            whole = self._with_calls(compose.either(*calls), choice, parallel, answer)
        if whole is None or self.reasoning is None:
            return whole
        begin, end = map(self._marker, self.reasoning)
        return compose.after_reasoning(whole, end, None if in_reasoning else begin)

    def instructions(self, tools: Sequence[Tool]) -> str:
        """Return a system message with the tools and how to call them, for a template that doesn't know tools."""
        if self.calls is None:
            return ""
        functions = [
            {"type": "function", "function": {"name": tool.name} | _described(tool) | _parameters(tool)}
            for tool in tools
        ]
        listed = "\n".join(json.dumps(each, ensure_ascii=False) for each in functions)
        return _INSTRUCTIONS.replace("{how}", self.calls.instructions).replace("{tools}", listed)

    def written_calls(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Return calls of the history as text, for a template that doesn't know any; see `CallFormat.text`."""
        if self.calls is not None:
            return self.calls.text(calls)
        return "\n".join(_json({"name": name, "arguments": arguments}) for name, arguments in calls)

    def written_result(self, content: str) -> tuple[str, str]:
        """Return the role and the text of a call's result, for a template that doesn't know any."""
        role = self.calls.result_role if self.calls is not None else ""
        if role and f"<|{role}|>" in self.special:
            return role, content
        begin, end = self.calls.result if self.calls is not None else ("", "")
        return "user", f"{begin}{content}{end}"

    def _with_calls(self, call: Grammar, choice: ToolChoice, parallel: bool, answer: Grammar | None) -> Grammar:
        form = self.calls
        assert form is not None
        several = parallel and not isinstance(choice, NamedTool)
        if form.close_list or not form.opener:
            some = compose.repeat(call, 1, None if several else 1, self._literal(form.between))
            listed = self._sequence(form.open_list, some, form.close_list)
            calls = self._sequence(form.opener, listed)
            rest = listed
        else:
            calls = compose.repeat(self._sequence(form.opener, call), 1, None if several else 1, compose.literal("\n"))
            rest = call
        if choice != "auto":
            return calls
        if answer is not None:
            return compose.either(answer, calls)
        if form.opener:
            return compose.text_with_calls(self._marker(form.opener), rest, parallel=parallel and not form.close_list)
        starters = [start for start in form.starters if start not in self.special]
        return compose.either(calls, compose.pattern(_other_text(starters)))

    def _call(self, tool: Tool, place: str, schema: SchemaBuilder) -> Grammar:
        form = self.calls
        assert form is not None
        wanted = tool.parameters if tool.parameters is not None else {"type": "object", "properties": {}}

        def build(schema_: Any, at: str, otherwise: Any) -> Grammar:
            try:
                return schema(schema_, at)
            except ParameterError:
                if tool.strict:
                    raise
                return schema(otherwise, at)

        at = f"{place}.function.parameters" if tool.place is None else tool.place
        if form.arguments is not None and isinstance(wanted, dict):
            arguments = form.arguments(wanted, at, build, tool.strict)
        else:
            arguments = build(wanted, at, ANY_OBJECT)
        return self._written(tool, arguments)

    def _written(self, tool: Tool, arguments: Grammar) -> Grammar:
        assert self.calls is not None
        return self._sequence(*self.calls.written(tool, arguments))

    def _sequence(self, *parts: Grammar | str) -> Grammar:
        return compose.sequence(
            *(self._literal(part) if isinstance(part, str) else part for part in parts if part != "")
        )

    def _literal(self, text: str) -> Grammar:
        """Return the grammar of a text in which special tokens may be spelled."""
        parts: list[Grammar] = []
        while text:
            found = [(at, -len(one), one) for one in self.special if (at := text.find(one)) >= 0]
            at, _, spelled = min(found, default=(len(text), 0, ""))
            if at:
                parts.append(compose.literal(text[:at]))
            if spelled:
                parts.append(compose.token(self.special[spelled]))
            text = text[at + len(spelled) :]
        return compose.sequence(*parts) if parts else compose.literal("")

    def _marker(self, text: str) -> Marker:
        return self.special.get(text, text)


def _other_text(starters: Sequence[str]) -> str:
    """Return a regular expression of the texts that begin, after white space, with none of the starters."""
    prefixes = sorted({start[:length] for start in starters for length in range(len(start))})
    ways = []
    for prefix in prefixes:
        taken = {start[len(prefix)] for start in starters if start.startswith(prefix)}
        others = "".join(f"\\{char}" if char in "[]^-\\" else char for char in sorted(taken))
        space = "" if prefix else r"\s"
        ways.append(rf"{re.escape(prefix)}([^{space}{others}](.|\n)*)?")
    return rf"\s*({'|'.join(ways)})"


def schemas_of(tool: Tool) -> dict[str, Any]:
    """Return the schemas of a tool's arguments, in their order."""
    properties = (tool.parameters or {}).get("properties")
    return properties if isinstance(properties, dict) else {}


def _described(tool: Tool) -> dict[str, str]:
    return {} if tool.description is None else {"description": tool.description}


def _parameters(tool: Tool) -> dict[str, object]:
    return {} if tool.parameters is None else {"parameters": tool.parameters}
