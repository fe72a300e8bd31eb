"""A third endpoint is its request type, its response types and an adapter: here one of named events, as OpenAI's
responses and Anthropic's messages have them, with names and errors of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.errors import EngineDeadError
from pilotfish.server.errors import ApiError
from pilotfish.server.generation.answer import Answer
from pilotfish.server.generation.flow import Endpoint, Reply
from pilotfish.server.generation.spec import GenerationSpec
from pilotfish.server.protocol.common import ApiModel, Prompt
from pilotfish.server.protocol.usage import Usage
from pilotfish.server.routes import ENDPOINTS
from pilotfish.server.service import Service
from pilotfish.text.detokenizer import Piece
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import say


class StoryRequest(ApiModel):
    model: str
    opening: str
    max_words: int
    endings: int = 1
    stream: bool = False


class Story(msgspec.Struct):
    id: str
    endings: list[str]
    usage: Usage


class Began(msgspec.Struct, tag_field="type", tag="story.began"):
    id: str
    prompt_tokens: int


class Told(msgspec.Struct, tag_field="type", tag="story.told"):
    ending: int
    text: str


class Ended(msgspec.Struct, tag_field="type", tag="story.ended"):
    usage: Usage


class Interrupted(msgspec.Struct, tag_field="type", tag="error"):
    reason: str
    field: str | None


class StoryEvents:
    def __init__(self, reply: Reply[StoryRequest]) -> None:
        self.reply = reply

    def begin(self) -> Sequence[msgspec.Struct]:
        return [Began(self.reply.id, len(self.reply.answers[0].request.prompt_ids))]

    def add(self, answer: Answer, piece: Piece) -> Sequence[msgspec.Struct]:
        return [Told(answer.index, piece.text)]

    def end(self) -> Sequence[msgspec.Struct]:
        return [Ended(self.reply.usage())]


def interrupted(error: ApiError) -> Interrupted:
    return Interrupted(error.message, error.param)


class Stories(Endpoint[StoryRequest]):
    name = "tell_story"
    path = "/v1/stories"
    request_type = StoryRequest
    response_type = Story
    id_prefix = "story-"
    operation = "story"
    prompt_param = "opening"
    end_of_stream = b""
    error_form = staticmethod(interrupted)

    def spec(self, body: StoryRequest) -> GenerationSpec:
        return GenerationSpec(
            model=body.model,
            params=SamplingParams(),
            max_tokens=body.max_words,
            names={"max_tokens": "max_words"},
            answers=body.endings,
            stream=body.stream,
        )

    async def prompts(self, body: StoryRequest, service: Service) -> Sequence[Prompt]:
        return [body.opening]

    def whole(self, reply: Reply[StoryRequest], pieces: Sequence[Piece]) -> Story:
        return Story(reply.id, [piece.text for piece in pieces], reply.usage())

    def chunks(self, reply: Reply[StoryRequest]) -> StoryEvents:
        return StoryEvents(reply)


ASKED = {"model": "tiny", "opening": "once upon a time", "max_words": 3}


def app(script: Any = lambda request: say(request, [1], [2], [3])) -> ScriptedApp:
    return ScriptedApp(script, endpoints=(*ENDPOINTS, Stories()))


def named_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


async def test_its_whole_response_comes_by_the_shared_flow() -> None:
    served = app()
    response = await served.http.post("/v1/stories", json=ASKED | {"endings": 2})
    assert response.status_code == 200
    story = response.json()
    assert story["id"].startswith("story-")
    assert story["endings"] == [" word1 word2 word3"] * 2
    assert (story["usage"]["prompt_tokens"], story["usage"]["completion_tokens"]) == (4, 6)
    assert [request.params.max_tokens for request in served.engine.requests] == [3, 3]
    assert served.metric("pilotfish_requests_total", outcome="length") == 2


async def test_its_stream_is_of_named_events_with_no_other_end() -> None:
    response = await app().http.post("/v1/stories", json=ASKED | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = named_events(response.text)
    assert [name for name, _ in events] == ["story.began", *["story.told"] * 3, "story.ended"]
    assert all(name == data["type"] for name, data in events)
    assert "".join(data["text"] for _, data in events[1:4]) == " word1 word2 word3"
    assert events[0][1]["prompt_tokens"] == events[-1][1]["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize(
    ("wrong", "status", "field"),
    [({"max_words": 0}, 400, "max_words"), ({"opening": 1}, 400, "opening"), ({"model": "x"}, 404, "model")],
)
async def test_its_errors_have_its_form_and_the_names_of_its_fields(wrong: Any, status: int, field: str) -> None:
    served = app()
    response = await served.http.post("/v1/stories", json=ASKED | wrong)
    assert (response.status_code, response.json()["type"], response.json()["field"]) == (status, "error", field)
    assert field in response.json()["reason"]
    assert served.metric("pilotfish_requests_total", outcome="refused") == 1
    completion = await served.complete(model="x")
    assert set(completion.json()["error"]) == {"message", "type", "param", "code"}


async def test_an_error_in_its_stream_is_a_named_event() -> None:
    def dying(request: Request) -> list[Any]:
        return [*say(request, [1], [2])[:1], EngineDeadError("by a test")]

    response = await app(dying).http.post("/v1/stories", json=ASKED | {"stream": True})
    assert [name for name, _ in named_events(response.text)] == ["story.began", "story.told", "error"]


async def test_it_is_counted_and_logged_as_the_others_are(caplog: pytest.LogCaptureFixture) -> None:
    served = app()
    with caplog.at_level("INFO"):
        await served.http.post("/v1/stories", json=ASKED)
    assert served.metric("pilotfish_http_requests_total", route="/v1/stories", status="200") == 1
    (line,) = [record for record in caplog.records if record.name == "server.requests"]
    assert line.fields["tokens"] == 3  # type: ignore[attr-defined]


async def test_openapi_describes_all_types_that_it_refers_to() -> None:
    document = (await app().http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert {"Story", "StoryRequest", "ChatCompletion", "Completion", "Timings"} <= set(schemas)
    assert schemas["ChatMessage"]["required"] == ["role", "content", "refusal"]  # it is always sent whole
    references: list[str] = []

    def collect(part: Any) -> None:
        if isinstance(part, dict):
            references.extend([part["$ref"]] if "$ref" in part else [])
            part = list(part.values())
        if isinstance(part, list):
            for one in part:
                collect(one)

    collect(document)
    assert {reference.rpartition("/")[2] for reference in references} <= set(schemas)
