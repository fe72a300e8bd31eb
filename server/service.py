"""Service: the state that an application's routes share. They receive it as a FastAPI dependency."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Request

from pilotfish import __version__
from pilotfish.engine.process.supervisor import SupervisedEngine
from pilotfish.engine.request import EngineInfo
from pilotfish.errors import ParameterError
from pilotfish.server.admission import Gate, Limits
from pilotfish.server.config import ServerConfig
from pilotfish.server.errors import (
    ContextLengthError,
    engine_dead,
    engine_restarting,
    loading,
    model_not_found,
    stopping,
)
from pilotfish.server.memory import Reclaimer
from pilotfish.server.metrics import Metrics
from pilotfish.server.offload import Offload, Tokenizing, TooLongError
from pilotfish.server.probe import GenerationProbe
from pilotfish.server.prompting.conversation import Conversation
from pilotfish.server.prompting.grammars import Grammars
from pilotfish.server.prompting.rendering import Rendered, Renderer
from pilotfish.server.quotas import Quotas
from pilotfish.server.recent_steps import RecentSteps
from pilotfish.server.responses.store import ResponseStore
from pilotfish.text.detokenizer import Vocabulary
from pilotfish.text.formats.message_format import MessageFormat
from pilotfish.text.formats.registry import detect
from pilotfish.text.tokenizer import Tokenizer

LARGE_CONVERSATION = 2**15
"""Characters from which a conversation takes longer than a millisecond to render."""
STUCK_SECONDS = 60.0
"""The engine counts as stuck after this long without a step while requests are in flight."""


class Service:
    """The engine, the tokenizer and the rest that routes need. `names` are the model's own names for clients."""

    def __init__(
        self,
        engine: SupervisedEngine,
        tokenizer: Tokenizer,
        config: ServerConfig,
        metrics: Metrics,
        names: tuple[str, ...],
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        self.offload = Offload(threads=1)  # its work does not get faster by another
        self.tokenizing = Tokenizing(tokenizer)
        self.reclaimer = Reclaimer()
        self._rendering = Offload(threads=1)
        self._renderer = Renderer(tokenizer)
        self.format = detect(tokenizer, config.tool_call_parser, config.reasoning_parser)
        self.grammars = Grammars(tokenizer)
        self.responses = ResponseStore(
            config.response_store or ":memory:",
            config.response_store_size,
            config.response_store_age,
            config.response_store_bytes,
        )
        self.config = config
        self.metrics = metrics
        self.recent = RecentSteps()
        metrics.watchers.append(self.recent.step)
        self.draining = False
        """Whether /ready says no, so that balancers send nothing more; what comes all the same is served."""
        self.probe = GenerationProbe(engine, metrics)
        self._names = names
        self.gate = Gate()
        self.quotas = Quotas()
        self.created = int(time.time())
        self._fingerprint = ""

    def ready(self) -> EngineInfo:
        """Return the engine's info. Raises ApiError 503 while it loads, is restarted, stops or is dead."""
        if self.engine.state == "dead" and not self.gate.closed:
            raise engine_dead()
        if self.engine.state in ("stopping", "dead") or self.gate.closed:
            raise stopping()
        if self.engine.state == "restarting":
            raise engine_restarting(self.engine.retry_after)
        if self.engine.state == "starting" or self.engine.info is None:
            raise loading()
        return self.engine.info

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the low-rank adapters, which clients choose as models."""
        info = self.engine.info
        return tuple(self.engine.config.adapters()) if info is None else info.adapters

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may name as the model, the model itself first."""
        return (*self._names, *self.adapters)

    def adapter_of(self, name: str | None) -> str:
        """Return the adapter that a client names as the model; "" for the model itself."""
        return name if name is not None and name not in self._names else ""

    def close(self) -> None:
        """End the threads."""
        self.offload.close()
        self.tokenizing.close()
        self.reclaimer.close()
        self.responses.close()
        self._rendering.close()

    def limits(self, info: EngineInfo, deadline: float) -> Limits:
        """Return what may be in flight for a request to be admitted, which may wait at most until its `deadline`, in
        time.monotonic() seconds; 0: it has none."""
        wait = self.config.max_queue_ms / 1000 or math.inf
        if deadline:
            wait = min(wait, deadline - time.monotonic())
        return Limits(
            sequences=info.max_num_seqs + self.config.max_queue,
            running=info.max_num_seqs,
            tokens=self.config.max_queue_tokens,
            wait=wait,
            fair=self.engine.config.scheduling_policy == "fair",
        )

    def drain(self, on: bool) -> None:
        """Say by /ready that balancers should send nothing more, or that they may again."""
        self.draining = on
        self.metrics.draining(on)

    @property
    def stuck(self) -> bool:
        """Whether there is work, but the engine has made no step for a long time."""
        since = max(self.metrics.last_step, self.gate.busy_since)
        return self.gate.in_flight > 0 and time.monotonic() - since > STUCK_SECONDS

    def fingerprint(self, info: EngineInfo) -> str:
        """Return OpenAI's system_fingerprint: while it is the same, the same seed gives the same text."""
        if not self._fingerprint:
            parts = (
                __version__,
                info.model,
                info.dtype,
                info.weights,
                info.device,
                info.kernels,
                info.tensor_parallel_size,
            )
            self._fingerprint = "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
        return self._fingerprint

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 for a model that is not served."""
        if name is not None and name not in self.names:
            raise model_not_found(name, self.names)

    async def encode(
        self, text: str, param: str, add_special_tokens: bool, info: EngineInfo | None = None
    ) -> tuple[int, ...]:
        """Return the token ids of a text that the client sent as `param`. Raises ParameterError; with `info`, ApiError
        400 for a text that cannot fit into the model's context, mostly without tokenizing it."""
        limit = None if info is None else info.max_model_len - 1
        try:
            return tuple(await self.tokenizing.encode(text, add_special_tokens, limit))
        except TooLongError as error:
            assert info is not None
            raise ContextLengthError(param, error.least, False, info.max_model_len) from None
        except ParameterError as error:
            raise ParameterError(param, error.message) from error

    async def word_tokens(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the token sequences that spell words, at the beginning of a text and after a space."""
        spelled = [text for word in words for text in (word, f" {word.lstrip()}")]
        found = [await self.encode(text, "bad_words", add_special_tokens=False) for text in spelled]
        return tuple(dict.fromkeys(filter(None, found)))

    async def render(self, conversation: Conversation, form: MessageFormat) -> Rendered:
        """Return the prompt of a conversation, rendered in a thread: a short one does not wait for long ones. Raises as
        `Renderer.render`."""
        length = sum(len(turn.content or "") + len(turn.reasoning or "") + 100 for turn in conversation.turns)
        run = self._rendering.run if length < LARGE_CONVERSATION else self.tokenizing.run
        return await run(self._renderer.render, conversation, form)


def check_length(param: str, length: int, info: EngineInfo) -> None:
    """Raise ApiError 400 for a prompt that leaves no room for an answer in the model's context."""
    if length + 1 > info.max_model_len:
        raise ContextLengthError(param, length, True, info.max_model_len)


async def get_service(request: Request) -> Service:  # async: FastAPI would run a plain function in a thread
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(get_service)]
