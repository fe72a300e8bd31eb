"""One rule over all parsers: the same tokens, in whatever portions they come, make the same message, and the same as
their whole text does. Answers are cut into random tokens, which cut markers and characters, and end with stop strings
or early.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count

import pytest

from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Delta, Request
from pilotfish.server.generation.answer import Answer
from pilotfish.server.generation.spec import GenerationSpec
from pilotfish.server.metrics import Metrics
from pilotfish.text.detokenizer import AnswerText, Detokenizer, Vocabulary
from pilotfish.text.formats.harmony import HARMONY_CALLS, HARMONY_REASONING, MARKERS, HarmonyFormat
from pilotfish.text.formats.message_format import MessageFormat
from pilotfish.text.formats.registry import CALL_FORMATS, REASONING_FORMATS
from pilotfish.text.message import AssistantMessage, Part
from tests.text.formats.test_formats import TOOLS, WRITTEN, parse

SPECIAL = (
    "<s>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|tool_call|>",
    "<|/tool_call|>",
    "<|python_tag|>",
    "[THINK]",
    "[/THINK]",
    *MARKERS,
)
"""Special tokens, by their ids. The first is part of no format, and never shown."""
FORMATS: list[MessageFormat] = [
    MessageFormat(calls=calls, reasoning=reasoning, special={text: id_ for id_, text in enumerate(SPECIAL)})
    for calls in CALL_FORMATS.values()
    for reasoning in (None, *REASONING_FORMATS.values())
]
FORMATS += [
    HarmonyFormat(calls=HARMONY_CALLS, reasoning=reasoning, special=FORMATS[0].special)
    for reasoning in (None, *[HARMONY_REASONING] * 8)
]


class Tokens:
    """A vocabulary made for one answer: special tokens, then its pieces, one token each."""

    special_ids = frozenset(range(len(SPECIAL)))

    def __init__(self, text: str, rng: random.Random) -> None:
        self.bytes = [each.encode() for each in SPECIAL]
        self.ids: list[int] = []
        while text:
            at, spelled = min(((at, each) for each in SPECIAL if (at := text.find(each)) >= 0), default=(len(text), ""))
            data = text[:at].encode()
            while data:
                size = rng.choice((1, 1, 2, 3, 5, 12, 40))
                self.ids.append(len(self.bytes))
                self.bytes.append(data[:size])
                data = data[size:]
            if spelled:
                self.ids.append(SPECIAL.index(spelled))
            text = text[at + len(spelled) :]

    def token_bytes(self, id: int) -> bytes:
        return self.bytes[id]


def message_of(rng: random.Random, form: MessageFormat) -> str:
    """Return an answer with reasoning, content and calls, or a part of it."""
    assert form.calls is not None
    if isinstance(form, HarmonyFormat):
        return harmony_message(rng)
    begin, end = form.reasoning or ("", "")
    thought = begin + rng.choice(("", "\nWhich? é😀 </", "\n\n" + begin[:3])) + rng.choice((end, end + "\n\n", ""))
    content = rng.choice(("", "é😀 <s>so ", "I look:\n\n", "[1] {a} `b` <"))
    calls = WRITTEN[form.calls.name]
    after = rng.choice(("", "\n", " and é😀", calls))
    text = thought + content + calls + after
    return text[: rng.randrange(len(text))] if rng.random() < 0.3 else text


def harmony_message(rng: random.Random) -> str:
    """Return an answer over several channels, or a part of it."""
    bodies = ["", "Which? é😀 </", "[1] {a} <|", "I look:\n\n"]
    messages = [
        f"<|channel|>{rng.choice(('analysis', 'commentary'))}<|message|>{rng.choice(bodies)}<|end|><|start|>assistant"
        for _ in range(rng.randrange(4))
    ]
    call = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "é😀 <"}<|call|>'
    last = rng.choice((call, f"<|channel|>final<|message|>é😀 <s>so {rng.choice(bodies)}"))
    text = "".join(messages) + last
    return text[: rng.randrange(len(text))] if rng.random() < 0.3 else text


def answered(
    form: MessageFormat, tokens: Tokens, portions: Sequence[Sequence[int]], stops: Sequence[str], metrics: Metrics
) -> tuple[AssistantMessage, str, int, int]:
    """Return the message, the text, and the counts of tokens and of those of reasoning."""
    vocabulary, ids = Vocabulary(tokens), count()
    text = AnswerText(Detokenizer(vocabulary, shown=form.shown), stops)
    params = SamplingParams()
    parser = form.parser(TOOLS, new_id=lambda: f"call {next(ids)}")
    answer = Answer(
        0, 0, GenerationSpec(model="m", params=params), Request(id="r", prompt_ids=(0,), params=params), text, parser
    )
    parts: list[Part] = []
    shown = ""
    for i, portion in enumerate(portions):
        reason = "length" if i == len(portions) - 1 else None
        piece = answer.take(Delta(request_id="r", token_ids=tuple(portion), finish_reason=reason), metrics)  # type: ignore[arg-type]
        parts += piece.parts
        shown += piece.text
        if piece.finish_reason is not None:
            break
    message = AssistantMessage()
    message.add(parts)
    return message, shown, answer.tokens, answer.reasoning_tokens


def thought_tokens(form: MessageFormat, tokens: Tokens, visible: str, kept: int) -> int:
    """Return the number of tokens that begin in the reasoning of a text, found without a parser."""
    if form.reasoning is None:
        return 0
    begin, end = form.reasoning
    spans, at = [], 0
    while (at := visible.find(begin, at)) >= 0 and (at == 0 or isinstance(form, HarmonyFormat)):
        begun = at + len(begin)
        closed = visible.find(end, begun)
        at = len(visible) if closed < 0 else closed
        last = 10**9 if closed < 0 else len(visible[:closed].encode())
        spans.append(range(len(visible[:begun].encode()), last))
    starts, at = [], 0
    for id_ in tokens.ids[:kept]:
        starts.append(at)
        hidden = id_ in tokens.special_ids and id_ not in form.shown
        at += 0 if hidden else len(tokens.token_bytes(id_))
    return sum(start in span for start in starts for span in spans)


def portioned(ids: list[int], rng: random.Random) -> list[list[int]]:
    portions = []
    while ids:
        size = rng.choice((1, 1, 2, 4, 9, 100))
        portions.append(ids[:size])
        ids = ids[size:]
    return portions


@pytest.mark.parametrize("seed", range(8))
def test_a_message_does_not_depend_on_how_its_tokens_arrive(seed: int) -> None:
    rng, metrics = random.Random(seed), Metrics()
    for _ in range(120):
        form = rng.choice(FORMATS)
        text = message_of(rng, form)
        visible = text
        for id_, spelled in enumerate(SPECIAL):
            visible = visible if id_ in form.shown else visible.replace(spelled, "")
        at = rng.randrange(len(visible) + 1)
        stops = [stop] if (stop := visible[at : at + rng.randrange(1, 6)]) and rng.random() < 0.4 else []
        visible = visible.partition(stops[0])[0] if stops else visible
        tokens = Tokens(text, rng)
        if not tokens.ids:
            continue
        whole = answered(form, tokens, [tokens.ids], stops, metrics)
        assert whole[:2] == (parse(form, [visible]), visible), (form.calls, text, stops)
        assert whole[3] == thought_tokens(form, tokens, visible, whole[2]), (form.reasoning, text, stops)
        for portions in ([[id_] for id_ in tokens.ids], *(portioned(tokens.ids, rng) for _ in range(4))):
            assert answered(form, tokens, portions, stops, metrics) == whole, (form.calls, text, portions)
