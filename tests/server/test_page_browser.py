"""The page in a real browser, Debian's chromium: its views, streaming, stop, errors, hostile text, accessibility."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pilotfish.engine.request import Request
from pilotfish.server.config import ServerConfig
from tests.support.http_server import listening
from tests.support.running_server import RunningServer
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import say

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.process,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: apt install chromium"),
    pytest.mark.xdist_group("browser"),
]
HOSTILE = (
    "# Title\\n\\n**bold** <script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
    "[link](javascript:window.hacked=1) <a href='https://a.example' onclick='window.hacked=1'>b</a>"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def problems() -> list[str]:
    """What went wrong in the page; empty at the end."""
    return []


@pytest.fixture
def page(browser: Any, problems: list[str]) -> Iterator[Any]:
    """A page that fails its test if a script of it does, or if its policy refuses something."""
    context = browser.new_context()
    made = context.new_page()
    made.set_default_timeout(20_000)
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("console", lambda line: problems.append(line.text) if "Content Security Policy" in line.text else None)
    yield made
    context.close()
    assert problems == []


def scripted(*groups: list[int], **config: Any) -> ScriptedApp:
    def script(request: Request) -> Any:
        return say(request, *groups, drafted=3, accepted=1)

    return ScriptedApp(script, ServerConfig(**config))


def send(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def test_all_views_with_a_real_engine(server: RunningServer, page: Any) -> None:
    page.goto(server.url)
    page.get_by_text("Settings").click()
    page.get_by_label("Max tokens").fill("12")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Colour tokens by drafter").check()
    send(page, "Hello")
    page.get_by_role("button", name="Regenerate").wait_for()
    first = page.locator("article.assistant .coloured").inner_text()
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_role("button", name="Regenerate").wait_for()
    assert page.locator("article.assistant .coloured").inner_text() == first
    page.get_by_role("link", name="Race").click()
    page.get_by_label("Max tokens").fill("24")
    page.get_by_label("ngram").check()
    page.get_by_role("button", name="Race").click()
    page.get_by_text("The texts are the same").wait_for()
    assert page.locator(".lanes section").count() == 3
    page.get_by_role("link", name="Engine").click()
    page.get_by_text("blocks used").wait_for()
    page.get_by_role("link", name="Requests").click()
    page.locator("tbody tr").nth(4).wait_for()
    page.reload()
    page.locator("tbody tr").nth(4).wait_for()
    page.get_by_role("link", name="Chat").click()
    assert page.locator("article.assistant .coloured").inner_text() == first


def test_tokens_have_the_colour_of_their_drafter_and_a_word_about_it(page: Any) -> None:
    with listening(scripted([5], [6, 7, 8])) as url:
        page.goto(url)
        page.get_by_label("Colour tokens by drafter").check()
        send(page, "Hello")
        page.get_by_role("button", name="Regenerate").wait_for()
        spans = page.locator(".coloured span")
        found = [(each.inner_text().strip(), each.get_attribute("class")) for each in spans.all()]
        assert found == [("word5", "own"), ("word6", "hue1"), ("word7", "own"), ("word8", "own")]
        assert spans.nth(1).get_attribute("title") == "drafted by ngram, position 1"
        assert '2 rejected tokens of ngram: " word100 word101"' in str(spans.nth(2).get_attribute("title"))


def test_stop_ends_the_request(page: Any) -> None:
    def script(request: Request) -> Any:
        begun = say(request, [5], [6])
        return [begun[0], asyncio.Event(), begun[1]]

    app = ScriptedApp(script)
    with listening(app) as url:
        page.goto(url)
        send(page, "Hello")
        page.locator("article.assistant").get_by_text("word5").wait_for()
        page.get_by_label("Message").press("Escape")
        page.get_by_text("Stopped.").first.wait_for()
        page.locator("article.assistant").get_by_text("word5").wait_for()
        page.wait_for_timeout(100)
        assert len(app.engine.aborted) == 1


def test_another_conversation_may_be_picked_in_the_middle_of_an_answer(page: Any) -> None:
    with listening(ScriptedApp(lambda request: [say(request, [5], [6])[0], asyncio.Event()])) as url:
        page.goto(url)
        send(page, "Hello")
        page.locator("article.assistant").get_by_text("word5").wait_for()
        page.get_by_role("button", name="New").click()
        page.get_by_text("Ask something.").wait_for()
        page.wait_for_timeout(200)
        assert page.locator("article").count() == 0
        page.get_by_label("Conversation").first.select_option("Hello")
        page.locator("article.assistant").get_by_text("word5").wait_for()


def test_a_key_is_asked_for_once(page: Any) -> None:
    with listening(scripted([5], api_key=("secret",))) as url:
        page.goto(url)
        for key in ("wrong", "secret"):
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Use it").click()
            if key == "wrong":
                page.get_by_text("Incorrect API key provided.").wait_for()
        send(page, "Hello")
        page.locator("article.assistant").get_by_text("word5").wait_for()
        page.reload()
        page.get_by_label("Message").wait_for()
        assert page.get_by_label("API key").count() == 0


@pytest.mark.parametrize("fault", ["queue", "dead", "gone"])
def test_errors_are_shown_and_the_message_is_kept(page: Any, fault: str) -> None:
    app = scripted([5], max_queue=0)
    with listening(app) as url:
        page.goto(url)
        page.get_by_label("Message").wait_for()
        if fault == "queue":
            app.app.state.service.gate.in_flight = 2
        elif fault == "dead":
            app.engine.state, app.engine.error = "dead", "a test killed it"
        else:
            page.route("**/v1/chat/completions", lambda route: route.abort())
        send(page, "Hello")
        said = {"queue": "The queue is full", "dead": "The engine has ended", "gone": "cannot be reached"}[fault]
        page.get_by_role("alert").get_by_text(said).wait_for()
        app.app.state.service.gate.in_flight = 0
        page.get_by_role("button", name="Edit").click()
        assert page.get_by_label("Message").input_value() == "Hello"


def test_a_models_text_is_hostile(page: Any, problems: list[str]) -> None:
    with listening(scripted([5])) as url:
        page.goto(url)
        page.get_by_label("Message").wait_for()
        chunk = '{"choices": [{"index": 0, "delta": {"content": "%s"}, "finish_reason": "stop", "provenance": [{}]}]}'
        body = f"data: {chunk % HOSTILE}\n\ndata: [DONE]\n\n"
        page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
        send(page, "Hello")
        page.locator(".markdown strong").get_by_text("bold").wait_for()
        assert page.evaluate("window.hacked") is None
        assert page.locator(".markdown").locator("script, img, [onclick], [onerror], [href^=javascript]").count() == 0
        assert page.locator(".markdown a[href]").get_attribute("rel") == "noopener noreferrer"
    assert all("inline event handler" in problem for problem in problems)  # refused while DOMPurify reads it
    problems.clear()


def test_a_schema_that_is_no_json_is_named_before_anything_is_asked(page: Any) -> None:
    app = scripted([5])
    with listening(app) as url:
        page.goto(url)
        page.get_by_text("Settings").click()
        page.get_by_label("JSON schema of the answer").fill("{")
        send(page, "Hello")
        page.get_by_role("alert").get_by_text("JSON schema is not JSON").wait_for()
        assert app.engine.requests == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_view_has_faults_that_axe_finds_nor_is_wider_than_a_phone(page: Any, scheme: str) -> None:
    with listening(scripted([5], [6, 7, 8])) as url:
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": 360, "height": 720})
        page.goto(url)
        page.get_by_text("Settings").click()
        send(page, "Hello")
        page.get_by_role("button", name="Regenerate").wait_for()
        for view in ("Chat", "Race", "Engine", "Requests"):
            page.get_by_role("link", name=view).click()
            if view == "Engine":
                page.get_by_text("blocks used").wait_for()
            elif view == "Requests":
                page.locator("tbody tr").first.wait_for()
            found = axe.Axe().run(page).response["violations"]
            assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
            assert page.evaluate("document.documentElement.scrollWidth") <= 360


def stream(*events: dict[str, Any]) -> dict[str, str]:
    """A response of server-sent events."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return {"content_type": "text/event-stream", "body": body}


def chunk(delta: dict[str, Any], finish: str | None = None, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "provenance": fields.pop("provenance", [])}
    return {"choices": [choice]} | fields


def test_a_calls_result_is_given_back(page: Any) -> None:
    asked: list[dict[str, Any]] = []
    call = {"index": 0, "id": "call_7", "type": "function", "function": {"name": "weather", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"city": "Oslo"}'}}
    answers = [
        stream(
            chunk({"tool_calls": [call]}), chunk({"tool_calls": [more]}, "tool_calls", usage={"completion_tokens": 9})
        ),
        stream(
            chunk({"content": "It is cold."}, "stop", provenance=[{"token": "It", "drafter": None, "position": None}])
        ),
    ]

    def answer(route: Any) -> None:
        asked.append(json.loads(route.request.post_data))
        route.fulfill(**answers[len(asked) - 1])

    with listening(scripted([5])) as url:
        page.goto(url)
        page.route("**/v1/chat/completions", answer)
        send(page, "How warm is it in Oslo?")
        give = page.get_by_role("button", name="Give the result")
        give.wait_for()
        assert give.is_disabled()
        page.get_by_label("Result of weather").fill("-8 degrees")
        give.click()
        page.get_by_text("It is cold.").wait_for()
        assert page.get_by_label("Result of weather").count() == 0
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert asked[1]["messages"] == [
        {"role": "user", "content": "How warm is it in Oslo?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_7", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "-8 degrees", "tool_call_id": "call_7"},
    ]


def test_a_call_without_a_result_is_not_sent_again(page: Any) -> None:
    asked: list[dict[str, Any]] = []
    call = {"index": 0, "id": "call_7", "function": {"name": "weather", "arguments": "{}"}}

    def answer(route: Any) -> None:
        asked.append(json.loads(route.request.post_data))
        route.fulfill(
            **stream(
                chunk({"content": "Let me see.", "tool_calls": [call]}, "tool_calls", usage={"completion_tokens": 9})
            )
        )

    with listening(scripted([5])) as url:
        page.goto(url)
        page.route("**/v1/chat/completions", answer)
        send(page, "How warm is it in Oslo?")
        page.get_by_role("button", name="Give the result").wait_for()
        send(page, "Never mind.")
        page.locator("article").nth(3).get_by_role("button", name="Regenerate").wait_for()
    assert asked[1]["messages"][1] == {"role": "assistant", "content": "Let me see."}


def test_an_answers_speed_stands_beside_that_of_plain_decoding(page: Any) -> None:
    states = [
        {"steps": 0, "predicted_goodput": 0.0, "predicted_plain_goodput": 0.0},
        {"steps": 10, "predicted_goodput": 60.0, "predicted_plain_goodput": 30.0},
        {"steps": 30, "predicted_goodput": 50.0, "predicted_plain_goodput": 40.0},
    ]
    timings = {"tokens_per_second": 80.0, "accepted_tokens": 1}

    def answer(route: Any) -> None:
        time.sleep(0.3)  # the states have been read by then
        route.fulfill(**stream(chunk({"content": "Hi"}, "stop", timings=timings, usage={"completion_tokens": 3})))

    with listening(scripted([5])) as url:
        page.goto(url)
        page.route("**/page/live", lambda route: route.fulfill(**stream(*states)))
        page.route("**/v1/chat/completions", answer)
        send(page, "Hello")
        page.get_by_role("button", name="Regenerate").wait_for()
        found = page.locator(".against dd").all_inner_texts()
    assert [text.strip() for text in found] == [
        "80.0 tokens/s, 1.38×", "about 58.0 tokens/s, as the controller estimates",
    ]  # fmt: skip
