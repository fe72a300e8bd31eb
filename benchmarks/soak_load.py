"""The load of `benchmarks/soak.py`: clients that ask for all kinds of things, come back when they are told to, and
check what they get."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL = "m"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["sea", "land"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
BAD: tuple[dict[str, Any], ...] = (
    {"temperature": 9},
    {"max_tokens": -5},
    {"stop": 7},
    {"n": 0},
    {"logit_bias": {"x": 1}},
    {"prompt": []},
)
WEIGHTS = {
    "short": 6, "long": 2, "stream": 6, "cancel": 3, "several": 2, "chat": 2, "tools": 1, "schema": 2, "bad": 2,
    "timeout": 1, "response": 1,
}  # fmt: skip
"""Kinds of requests, and how often they come."""
TRIES = 60
"""How often a client comes back before a request counts as one without an end."""


class WrongError(Exception):
    """The server has answered what it must not."""


class AgainError(Exception):
    """The request failed in a way that tells to send it again. `seconds`: when."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(what)
        self.seconds = seconds


@dataclass
class Seen:
    """What the clients have seen. Times are seconds since the start."""

    began: float = field(default_factory=time.monotonic)
    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)
    """Attempts that were answered by an error that tells to come back, or whose connections failed."""
    wrong: list[str] = field(default_factory=list)
    """What was answered wrongly; the first of them."""
    first: list[tuple[float, float]] = field(default_factory=list)
    """(when, seconds to the first token) of streams."""
    between: list[tuple[float, float]] = field(default_factory=list)
    """(when, seconds between tokens) of streams, one of ten."""
    checked: int = 0
    """Texts that were compared with those made alone."""
    ids: set[str] = field(default_factory=set)

    def now(self) -> float:
        return time.monotonic() - self.began


class Load:
    """`texts` are the answers to `prompts`, made alone beforehand."""

    def __init__(self, url: str, prompts: list[dict[str, Any]], texts: list[str], seen: Seen) -> None:
        self.seen = seen
        self._url = url
        self._prompts, self._texts = prompts, texts
        self._http = self._connect()
        self.stopping = False

    def _connect(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._url, timeout=120, limits=httpx.Limits(max_connections=None))

    async def drop(self) -> None:
        """Cut all connections, and go on with others."""
        old, self._http = self._http, self._connect()
        await old.aclose()

    async def client(self, number: int, seed: int) -> None:
        """One client: sends requests one after the other until told to stop."""
        draw = random.Random(seed)
        while not self.stopping:
            kind = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            self.seen.sent += 1
            self.seen.kinds[kind] += 1
            self.seen.outcomes[await self._ends(kind, draw, f"client-{number}")] += 1

    async def _ends(self, kind: str, draw: random.Random, user: str) -> str:
        """Send a request until it ends; return how."""
        for _ in range(TRIES):
            try:
                return await self._attempt(kind, draw, user)
            except AgainError as again:
                self.seen.retries[str(again)] += 1
                await asyncio.sleep(min(again.seconds, 5))
            except WrongError as wrong:
                self.seen.wrong.append(f"{kind}: {wrong}"[:300])
                return "wrong"
            except httpx.HTTPError as error:  # what the server was sending when its connection was cut
                self.seen.retries[type(error).__name__] += 1
                await asyncio.sleep(0.2)
        return "without an end"

    async def _attempt(self, kind: str, draw: random.Random, user: str) -> str:
        i = draw.randrange(len(self._prompts))
        asked = self._prompts[i] | {"user": user}
        match kind:
            case "short":
                self._check(i, (await self._ask("/v1/completions", asked))["choices"][0]["text"])
            case "stream":
                self._check(i, await self._read(asked))
            case "cancel":
                return await self._leave(asked | {"max_tokens": 200, "ignore_eos": True}, draw)
            case "long":
                await self._ask("/v1/completions", asked | {"max_tokens": 150, "ignore_eos": True})
            case "several":
                answer = await self._ask("/v1/completions", asked | {"n": 3})
                if len(answer["choices"]) != 3:
                    raise WrongError(f"{len(answer['choices'])} choices instead of 3")
                self._check(i, answer["choices"][0]["text"])
            case "schema":
                form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
                answer = await self._ask("/v1/chat/completions", _chat(asked) | {"response_format": form})
                _check_schema(answer["choices"][0])
            case "tools":
                chat = _chat(asked) | {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60}
                await self._ask("/v1/chat/completions", chat)
            case "chat":
                await self._ask("/v1/chat/completions", _chat(asked))
            case "response":
                body = {"model": MODEL, "input": asked["prompt"], "max_output_tokens": 8, "user": user}
                await self._ask("/v1/responses", body)
            case "timeout":
                body = asked | {"max_tokens": 400, "ignore_eos": True, "timeout": 0.2}
                return "timeout" if await self._ask("/v1/completions", body, 504, 429) is None else "ok"
            case "bad":
                await self._ask("/v1/completions", asked | draw.choice(BAD), 400)
                return "refused"
        return "ok"

    def _check(self, i: int, text: str) -> None:
        self.seen.checked += 1
        if text != self._texts[i]:
            raise WrongError(f"prompt {i} was answered {text!r}, alone {self._texts[i]!r}")

    async def _ask(self, path: str, body: Mapping[str, Any], *errors: int) -> Any:
        """Return the answer, or None for one of the `errors` that are expected."""
        response = await self._http.post(path, json=body)
        if response.status_code in errors:
            return None
        _raise_again(response)
        if response.status_code != 200 or errors == (400,):
            raise WrongError(f"status {response.status_code}: {response.text}")
        answer = response.json()
        self._once(answer["id"])
        return answer

    def _once(self, identity: str) -> None:
        if identity in self.seen.ids:
            raise WrongError(f"{identity} was answered twice")
        self.seen.ids.add(identity)

    async def _read(self, body: Mapping[str, Any]) -> str:
        """Read a stream to its end; return its text."""
        text, ended, last = "", 0, time.monotonic()
        async for event in self._events(body):
            now = time.monotonic()
            if event.get("choices"):
                choice = event["choices"][0]
                when = self.seen.now()
                if not text:
                    self.seen.first.append((when, now - last))
                elif len(text) % 10 == 0:
                    self.seen.between.append((when, now - last))
                last = now
                text += choice["text"]
                ended += choice["finish_reason"] is not None
        if ended != 1:
            raise WrongError(f"a stream had {ended} ends")
        return text

    async def _events(self, body: Mapping[str, Any]) -> AsyncIterator[Any]:
        done = identity = False
        async with self._http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            if response.status_code != 200:
                await response.aread()
                _raise_again(response)
                raise WrongError(f"status {response.status_code}: {response.text}")
            async for line in response.aiter_lines():
                if done and line:
                    raise WrongError(f"a stream went on after its end: {line}")
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        code = event["error"]["code"]
                        if code in ("engine_restarting", "server_stopping"):
                            raise AgainError(f"{code}, in a stream", 1.0)
                        raise WrongError(f"a stream ended with {event['error']}")
                    if not identity:
                        self._once(event["id"])
                        identity = True
                    yield event
        if not done:
            raise httpx.RemoteProtocolError("the stream was cut")

    async def _leave(self, body: Mapping[str, Any], draw: random.Random) -> str:
        """Close a stream at a random place."""
        left = draw.randrange(40)
        async for _ in self._events(body):
            left -= 1
            if left < 0:
                break
        return "cancelled"


def _chat(asked: Mapping[str, Any]) -> dict[str, Any]:
    same = {name: asked[name] for name in ("model", "max_tokens", "seed", "temperature", "user")}
    return {**same, "messages": [{"role": "user", "content": asked["prompt"]}]}


def _raise_again(response: httpx.Response) -> None:
    if response.status_code in (429, 503):
        code = response.json()["error"]["code"]
        raise AgainError(f"{response.status_code} {code}", float(response.headers.get("retry-after-ms", 1000)) / 1000)


def _check_schema(choice: Mapping[str, Any]) -> None:
    if choice["finish_reason"] == "length":
        return
    found = json.loads(choice["message"]["content"])
    if found.keys() != {"kind", "count"} or found["kind"] not in ("sea", "land") or not 0 <= found["count"] <= 99:
        raise WrongError(f"{found} does not match the schema")
