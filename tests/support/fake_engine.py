"""An engine process without a model, for test_client.py: `python fake_engine.py EVENTS`, where EVENTS is a file to
which it writes what its core was asked to do. Each step gives each request one token: the prompt's first, then counting
up."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.process import main as process
from pilotfish.engine.request import Delta, EngineInfo, FinishReason, Request, RequestStats
from pilotfish.engine.stats import StepStats
from pilotfish.errors import ModelError

VOCABULARY = 100_000
FAIL = 66_666
"""A prompt of this token makes the step raise."""
EXIT = 77_777
"""A prompt of this token makes the process vanish, with exit code 7."""
STEP_SECONDS = 0.001


class FakeCore:
    """`config.model` says how it loads: "slow" takes a minute, "broken" raises ModelError, others are there at once.
    Its passes go on by themselves, as on a GPU, if `config.dtype` is float16."""

    def __init__(
        self, config: EngineConfig, progress: Callable[[str, float], None], last_words: process.LastWords
    ) -> None:
        self._events = Path(sys.argv[1])
        progress("reading the script", 0.5)
        self._note("loading")
        if config.model == "slow":
            time.sleep(600)
        if config.model == "broken":
            raise ModelError("no model is called 'broken':\na fake one is")
        progress("reading the script", 1.0)
        self._running: dict[str, Request] = {}
        self._made: dict[str, int] = {}
        self._ended: list[Delta] = []
        self.asynchronous = config.dtype == "float16"
        self.info = EngineInfo(
            model=config.model,
            vocab_size=VOCABULARY,
            max_model_len=4096,
            eos_token_ids=(),
            num_blocks=1,
            block_size=16,
            max_num_seqs=config.max_num_seqs,
            drafters=("ngram",),
            default_drafter="off",
            dtype="none",
            device="none",
            kernels="none",
            load_seconds=0.0,
        )

    def add(self, request: Request) -> None:
        self._note(f"add {request.id} seed={request.params.seed}")
        self._running[request.id] = request
        self._made[request.id] = 0

    def abort(self, request_id: str) -> None:
        self._note(f"abort {request_id}")
        if request_id in self._running:
            self._ended.append(self._end(request_id, "abort", ()))

    def change_adapter(self, name: str, folder: str | None) -> None:
        self._note(f"change {name} {folder}")
        if folder == "broken":
            raise ModelError("no adapter is in 'broken'")
        others = tuple(known for known in self.info.adapters if known != name)
        self.info = msgspec.structs.replace(self.info, adapters=others if folder is None else (*others, name))

    def has_work(self) -> bool:
        return bool(self._running or self._ended)

    def launch(self) -> Any:
        time.sleep(STEP_SECONDS)

    def finish(self, step: Any) -> Any:
        deltas, self._ended = self._ended, []
        for request in list(self._running.values()):
            first = request.prompt_ids[0]
            if first == FAIL:
                raise RuntimeError("the script says so")
            if first == EXIT:
                os._exit(7)
            token = first + self._made[request.id]
            self._made[request.id] += 1
            if self._made[request.id] == request.params.max_tokens:
                deltas.append(self._end(request.id, "length", (token,)))
            else:
                deltas.append(Delta(request_id=request.id, token_ids=(token,)))
        return SimpleNamespace(deltas=deltas)

    def settle(self, step: Any) -> StepStats:
        return StepStats(
            running=len(self._running),
            waiting=0,
            rows=len(step.deltas),
            prompt_tokens=0,
            generated_tokens=sum(len(delta.token_ids) for delta in step.deltas),
            blocks_total=1,
            blocks_used=0,
            blocks_cached=0,
        )

    def _end(self, request_id: str, reason: FinishReason, token_ids: tuple[int, ...]) -> Delta:
        request = self._running.pop(request_id)
        stats = RequestStats(
            arrival=request.arrival,
            scheduled=request.arrival,
            first_token=request.arrival,
            finished=time.monotonic(),
            prompt_tokens=len(request.prompt_ids),
            cached_prompt_tokens=0,
            generated_tokens=self._made[request_id],
            drafter="none",
            drafted_tokens=0,
            accepted_tokens=0,
            steps=self._made[request_id],
            preemptions=0,
        )
        return Delta(request_id=request_id, token_ids=token_ids, finish_reason=reason, stats=stats)

    def _note(self, event: str) -> None:
        with self._events.open("a") as file:
            file.write(event + "\n")


if __name__ == "__main__":
    sys.exit(process.run(FakeCore))
