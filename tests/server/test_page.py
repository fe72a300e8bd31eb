"""The page at / and what it asks for, without a browser; in one: test_page_browser.py."""

from __future__ import annotations

import asyncio
import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from pilotfish.engine.stats import StepStats
from pilotfish.errors import ConfigError
from pilotfish.server.config import ServerConfig
from pilotfish.server.telemetry.live import LiveSums
from pilotfish.server.telemetry.recent import KEPT
from tests.support.paths import ROOT
from tests.support.scripted_app import ScriptedApp
from tests.support.scripted_engine import say

PAGE = ROOT / "server" / "page"
HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
SECRET = {"authorization": "Bearer secret"}


def served(**config: Any) -> ScriptedApp:
    return ScriptedApp(lambda request: say(request, [5], [6, 7], drafted=3, accepted=1), ServerConfig(**config))


def hash_of(paths: list[Path], base: Path) -> str:
    """As web/vite.config.js has it."""
    digest = sha256()
    for name in sorted(path.relative_to(base).as_posix() for path in paths):
        digest.update(f"{name}\0".encode() + (base / name).read_bytes() + b"\0")
    return digest.hexdigest()


def test_the_built_files_are_current() -> None:
    """If this fails: make web, and commit server/page."""
    web = ROOT / "web"
    sources = [path for path in web.rglob("*") if path.is_file() and "node_modules" not in path.parts]
    built = [path for path in PAGE.iterdir() if path.name != "build.json"]
    recorded = json.loads((PAGE / "build.json").read_text())
    assert recorded == {"sources": hash_of(sources, web), "built": hash_of(built, PAGE)}


def test_the_page_has_nothing_inline_and_nothing_of_elsewhere() -> None:
    html = (PAGE / "index.html").read_text()
    assert re.findall(r"<script(.*?)>(.*?)</script>", html) == [(' type="module" crossorigin src="/page/app.js"', "")]
    assert "<style" not in html
    assert " style=" not in html
    assert "eval(" not in (PAGE / "app.js").read_text()
    assert re.findall(r"url\(|@import", (PAGE / "app.css").read_text()) == []


async def test_browsers_get_the_page_under_a_strict_policy() -> None:
    http = served().http
    response = await http.get("/", headers=HTML)
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert response.content == (PAGE / "index.html").read_bytes()
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', response.text):
        assert (await http.get(path)).status_code == 200, path
    again = await http.get("/", headers=HTML | {"if-none-match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("headers", [{}, {"accept": "*/*"}, {"accept": "application/json"}])
async def test_others_get_the_error_of_an_unknown_url(headers: dict[str, str]) -> None:
    response = await served().http.get("/", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/page/info", "/page/requests"])
async def test_without_the_page_none_of_it_is_there(path: str) -> None:
    response = await served(page=False).http.get(path, headers=HTML)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")


@pytest.mark.parametrize("name", ["build.json", "index.html", "..%2fapp.py", "app.js%00"])
async def test_no_other_file_is_served(name: str) -> None:
    assert (await served().http.get(f"/page/{name}", headers=HTML)).status_code == 404


@pytest.mark.parametrize("path", ["/page/info", "/page/live", "/page/requests"])
async def test_what_the_page_shows_needs_the_key_and_its_own_origin(path: str) -> None:
    http = served(api_key=("secret",)).http
    assert (await http.get("/", headers=HTML)).status_code == 200
    assert (await http.get(path)).status_code == 401
    foreign = await http.get(path, headers=SECRET | {"sec-fetch-site": "cross-site", "origin": "https://evil.example"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "other_origin")
    assert "access-control-allow-origin" not in foreign.headers


async def test_the_server_is_described() -> None:
    grafana = "https://grafana.example.com/d/pilotfish"
    found = (await served(log_prompts=True, grafana_url=grafana).http.get("/page/info")).json()
    assert found.pop("version")
    assert found == {
        "state": "ready", "models": ["tiny"], "drafters": ["ngram"], "default_drafter": "ngram", "max_model_len": 64,
        "log_prompts": True, "grafana_url": grafana,
    }  # fmt: skip


@pytest.mark.parametrize("url", ["javascript:alert(1)", "grafana", ""])
def test_a_link_is_an_address_of_the_web(url: str) -> None:
    with pytest.raises(ConfigError, match="grafana_url"):
        ServerConfig(grafana_url=url).check()


async def ask(app: ScriptedApp, prompt: str = "a secret", **headers: str) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 3}
    assert (await app.http.post("/v1/completions", json=body, headers=headers)).status_code == 200


@pytest.mark.parametrize("log_prompts", [False, True])
async def test_recent_requests_have_their_times_and_no_text_unless_it_is_logged(log_prompts: bool) -> None:
    app = served(log_prompts=log_prompts)
    await ask(app)
    await app.http.get("/v1/models")
    response = await app.http.get("/page/requests")
    (found,) = response.json()["requests"]
    assert (found["path"], found["status"], found["finish_reason"]) == ("/v1/completions", 200, "length")
    assert (found["prompt_tokens"], found["tokens"], found["preemptions"]) == (2, 3, 0)
    assert found["drafters"]["ngram"]["accepted_tokens"] == 1
    assert 0 <= found["queue_ms"] <= found["ttft_ms"] <= found["duration_ms"]
    assert bool(found["prompts"]) == log_prompts
    if not log_prompts:
        assert "word" not in response.text


async def test_recent_requests_are_bounded_and_the_newest_come_first() -> None:
    app = served()
    for i in range(KEPT + 2):
        await ask(app, "a " * (1 + i % 7))
    found = (await app.http.get("/page/requests")).json()["requests"]
    assert len(found) == KEPT
    assert [each["prompt_tokens"] for each in found] == [1 + i % 7 for i in reversed(range(2, KEPT + 2))]


async def test_a_tenant_sees_its_own_requests() -> None:
    app = served(api_key=("alice=one", "bob=two"))
    await ask(app, authorization="Bearer one")
    counts = [
        len((await app.http.get("/page/requests", headers={"authorization": f"Bearer {key}"})).json()["requests"])
        for key in ("one", "two")
    ]
    assert counts == [1, 0]


def step(**fields: Any) -> StepStats:
    counts: dict[str, Any] = {"running": 2, "waiting": 1, "rows": 5, "prompt_tokens": 0, "generated_tokens": 3}
    blocks: dict[str, Any] = {"blocks_total": 8, "blocks_used": 4, "blocks_cached": 1}
    return StepStats(**counts | blocks | fields)


def test_steps_are_added_up_between_two_looks() -> None:
    sums = LiveSums()
    for accepted in ((2, 1), (1,)):
        sums.step(
            step(
                step_tokens={"ngram": (2, 1)}, chosen={"ngram": 2}, predicted_goodput=9.0, seconds={"forward": 0.5},
                drafted_at={"ngram": (2, 2)}, accepted_at={"ngram": accepted},
            )
        )  # fmt: skip
    state = sums.take("ready", 0.5, 3, 16)
    assert (state.steps, state.rows, state.generated_tokens, state.running, state.blocks_used) == (2, 10, 6, 2, 4)
    assert (state.tokens, state.chosen, state.phases) == ({"ngram": 6}, {"ngram": 4}, {"forward": 1.0})
    assert (state.drafted_at, state.accepted_at) == ({"ngram": [4, 4]}, {"ngram": [3, 1]})
    assert state.predicted_goodput == 9.0
    idle = sums.take("ready", 0.5, 0, 16)
    assert (idle.steps, idle.tokens, idle.predicted_goodput, idle.blocks_used) == (0, {}, 0.0, 4)


async def test_the_live_view_costs_nothing_once_nobody_looks() -> None:
    """httpx's transport returns only whole answers: the stream ends when the gate closes."""
    app = served()
    service = app.app.state.service
    always = list(service.metrics.watchers)  # /v1/loads sums steps up for whoever asks later
    looking = asyncio.create_task(app.http.get("/page/live"))
    await asyncio.sleep(0.1)
    assert len(service.metrics.watchers) == len(always) + 1
    service.metrics.step(step())
    await asyncio.sleep(0.6)
    service.gate.close()
    response = await looking
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line]
    assert sum(each["steps"] for each in events) == 1
    assert events[0]["running"] == 2
    assert service.metrics.watchers == always
