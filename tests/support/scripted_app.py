"""The real application around a scripted engine, with an HTTP client on it, all in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx

from pilotfish.server.app import create_app
from pilotfish.server.config import ServerConfig
from pilotfish.server.metrics import Metrics
from tests.support.scripted_engine import Script, ScriptedEngine


class WordTokenizer:
    """A tokenizer without files: each token is a word, and a text is a single token for each of its words."""

    special_ids: frozenset[int] = frozenset()
    chat_template = "none"
    folder = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [20 + len(word) for word in text.split()] or [20]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.token_bytes(id_).decode() for id_ in ids)

    def token_bytes(self, id: int, /) -> bytes:
        return b" word%d" % id

    def shield(self, text: str) -> str:
        return text

    def unshield(self, text: str) -> str:
        return text

    def token(self, id: int, /) -> str:
        return self.token_bytes(id).decode()

    def apply_chat_template(self, messages: list[dict[str, Any]], *arguments: Any, **variables: Any) -> str:
        return " ".join(message["content"] or "" for message in messages)


class ScriptedApp:
    """An application that serves the model "tiny"; `options` are those of `create_app`."""

    def __init__(
        self,
        script: Script,
        config: ServerConfig = ServerConfig(),  # noqa: B008 - it cannot change
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        self.engine = ScriptedEngine(script)
        self.metrics = Metrics()
        made: Any = self.engine
        words: Any = tokenizer or WordTokenizer()
        self.app = create_app(made, words, config, self.metrics, ("tiny",), **options)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test", timeout=10)

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": "tiny", "prompt": "a", **body})

    async def chat(self, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "a"}]
        return await self.http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, **body})

    async def until_asked(self, count: int = 1) -> None:
        """Wait until the engine has been given so many requests."""
        while len(self.engine.requests) < count:  # noqa: ASYNC110 - the engine has no event for it
            await asyncio.sleep(0)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0
