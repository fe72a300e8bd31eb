"""An engine in this process that says what a test has written: for what a real one does too fast, or never."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.request import Delta, EngineInfo, Request, TokenLogprobs, check_request
from pilotfish.errors import EngineDeadError, EngineNotReadyError, ParameterError

Script = Callable[[Request], Sequence[Delta | Exception | asyncio.Event]]

INFO = EngineInfo(
    model="tiny",
    vocab_size=512,
    max_model_len=64,
    eos_token_ids=(2,),
    num_blocks=8,
    block_size=16,
    max_num_seqs=2,
    drafters=("ngram",),
    default_drafter="ngram",
    dtype="float32",
    device="cpu",
    kernels="native",
    load_seconds=0.1,
)


def say(
    request: Request, *groups: Sequence[int], drafted: int = 0, accepted: int = 0, drafter: str = "ngram"
) -> list[Delta]:
    """Deltas with these tokens, the last with "length"."""
    deltas = []
    for i, group in enumerate(groups):
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = tuple(TokenLogprobs(id_, -0.5) for id_ in group)
        deltas.append(
            Delta(
                request_id=request.id,
                token_ids=tuple(group),
                logprobs=logprobs,
                scheduled=request.arrival if i == 0 else None,
                drafted=drafted if i else 0,
                accepted=accepted if i else 0,
                drafter=drafter if i and drafted else "",
                rejected=tuple(range(100, 100 + drafted - accepted)) if i else (),
                finish_reason="length" if i == len(groups) - 1 else None,
            )
        )
    return deltas


class ScriptedEngine:
    """AsyncEngine's interface. An Event in a script is waited for, an exception raised."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.config = EngineConfig(model="tiny")
        self.state = "ready"
        self.info: EngineInfo | None = INFO
        self.error: str | None = None
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.finished: list[str] = []

    async def change_adapter(self, name: str, folder: str | None) -> None:
        assert self.info is not None
        if folder == "broken":
            raise ParameterError("lora_path", "no adapter is in 'broken'")
        others = tuple(known for known in self.info.adapters if known != name)
        self.info = msgspec.structs.replace(self.info, adapters=others if folder is None else (*others, name))

    def draw_seed(self) -> int:
        return 7

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        if self.state == "dead":
            raise EngineDeadError(self.error)
        if self.state != "ready":
            raise EngineNotReadyError("the model is still loading")
        assert self.info is not None
        check_request(request, self.info)
        assert abs(time.monotonic() - request.arrival) < 60
        self.requests.append(request)
        return self._stream(request)

    async def _stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        ended = False
        try:
            for item in self.script(request):
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                    continue
                ended = item.finish_reason is not None
                yield item
        finally:
            (self.finished if ended else self.aborted).append(request.id)

    async def stop(self) -> None:
        self.state = "dead"
