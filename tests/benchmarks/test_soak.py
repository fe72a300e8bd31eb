"""`benchmarks/soak.py`: it goes well with a real server and faults, and it notices what a server does wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from soak_load import AgainError, Load, Seen, WrongError
from soak_report import Report, Sample

ASKED = [{"model": "m", "prompt": "a", "max_tokens": 4, "seed": 1, "temperature": 0.0}]


@pytest.mark.process
def test_a_short_soak_with_an_engine_that_is_killed(tiny_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/soak.py", "--model", str(tiny_llama), "--seconds", "9", "--clients", "4"]
    command += ["--prompts", "6", "--faults", "kill-engine,drop-connections", "--fault-every", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["right"]
    assert report["faults"][0][0] == "kill-engine"
    assert report["outcomes"]["ok"] > 10
    assert report["checked"] > 4
    assert (tmp_path / "soak.png").stat().st_size > 1000
    assert "| kill-engine | " in (tmp_path / "README.md").read_text()


def answering(body: str | dict[str, Any], status: int = 200) -> Load:
    """The load on a server that always says this."""
    load = Load("http://test", ASKED, ["right"], Seen())

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, text=body if isinstance(body, str) else json.dumps(body))

    load._http = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test")
    return load


def event(text: str, reason: str | None = None) -> str:
    return f"data: {json.dumps({'id': 'x', 'choices': [{'text': text, 'finish_reason': reason}]})}\n\n"


DONE = "data: [DONE]\n\n"


async def attempt(load: Load, kind: str) -> str:
    return await load._attempt(kind, random.Random(0), "user")


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (event("wrong", "stop") + DONE, "was answered 'wrong'"),
        (event("right", "stop") + event("", "stop") + DONE, "2 ends"),
        (event("right") + DONE, "0 ends"),
        (event("right", "stop") + DONE + event("right"), "went on after its end"),
        ('data: {"error": {"code": "internal_error"}}\n\n' + DONE, "ended with"),
    ],
)
async def test_a_wrong_stream_is_noticed(stream: str, said: str) -> None:
    with pytest.raises(WrongError, match=said):
        await attempt(answering(stream), "stream")


async def test_a_right_one_is_right_but_not_twice() -> None:
    load = answering(event("ri") + event("ght", "stop") + DONE)
    assert await attempt(load, "stream") == "ok"
    with pytest.raises(WrongError, match="x was answered twice"):
        await attempt(load, "stream")


async def test_what_is_to_be_sent_again_and_what_was_cut() -> None:
    restarting = 'data: {"error": {"code": "engine_restarting"}}\n\n' + DONE
    with pytest.raises(AgainError):
        await attempt(answering(event("ri") + restarting), "stream")
    with pytest.raises(AgainError):
        await attempt(answering({"error": {"code": "queue_full"}}, 429), "short")
    with pytest.raises(httpx.RemoteProtocolError):
        await attempt(answering(event("right", "stop")), "stream")
    with pytest.raises(WrongError, match="status 500"):
        await attempt(answering({}, 500), "short")
    with pytest.raises(WrongError, match="status 200"):
        await attempt(answering({}), "bad")
    assert await attempt(answering({}, 400), "bad") == "refused"


def test_a_report_is_right_only_if_nothing_is_wrong_lost_or_left() -> None:
    def report(**changes: Any) -> Report:
        seen = Seen(sent=3)
        seen.outcomes.update({"ok": 2, "refused": 1})
        made = Report(seen, 100.0, 1, same_after=True, healthy=True)
        made.left = dict.fromkeys(("kv_blocks_used", "sequences_running", "sequences_waiting"), 0.0)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    assert report().right
    assert not report(hanging=1).right
    assert not report(same_after=False).right
    assert not report(healthy=False).right
    leaking, wrong, lost = report(), report(), report()
    leaking.left["kv_blocks_used"] = 1.0
    wrong.seen.outcomes.update({"wrong": 1, "ok": -1})
    lost.seen.sent = 4
    assert [each.right for each in (leaking, wrong, lost)] == [False] * 3


def test_the_slope_of_memory_is_that_of_one_process_after_the_warm_up() -> None:
    samples = [Sample(s, 1, 100_000_000, 10**9 if s < 25 else 10**9 + 1000 * int(s - 25), 9) for s in range(1000)]
    samples += [Sample(s, 2, 100_000_000, 1, 9) for s in range(1000, 1200)]
    report = Report(Seen(), 100.0, 1, samples=samples)
    assert report.slope("engine", 0.25) == pytest.approx(3.6)
    assert report.slope("server", 0.25) == pytest.approx(0.0, abs=1e-6)
