"""LLM: the engine in this process, for scripts, tests and benchmarks. Token ids in, token ids out.

The same `EngineCore` that the server runs in a process of its own (`engine.process.client`), without messages or event
loop.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

import msgspec
from tqdm import tqdm

from pilotfish.engine.completion import DEFAULT_PARAMS, Completion, empty_completions, make_requests
from pilotfish.engine.config import EngineConfig, config_of
from pilotfish.engine.core import EngineCore
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Delta, EngineInfo, Request
from pilotfish.engine.stats import StepStats
from pilotfish.errors import EngineDeadError

__all__ = ["LLM", "Completion"]


class LLM:
    """An engine that runs while `generate` or `stream` is called, one call at a time. Also a context manager.

    `settings` are fields of EngineConfig, on top of `config`: `LLM("smollm2-135m", speculation="none")`.
    `on_stats` is called after each step. Raises ConfigError for settings that are unknown, of the wrong type or
    contradictory, ModelError for a model that cannot be loaded, and RankError, also from `generate` and `stream`, for a
    rank that fails.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        on_stats: Callable[[StepStats], None] | None = None,
        on_loading: Callable[[str, float], None] | None = None,
        **settings: object,
    ) -> None:
        self.config = config_of(model, config, settings)
        self._on_stats = on_stats
        self._seeds = random.SystemRandom() if self.config.seed is None else random.Random(self.config.seed)
        self._ids = map(str, itertools.count())
        self._streaming = False
        self._core: EngineCore | None = EngineCore(self.config, on_loading)

    @property
    def core(self) -> EngineCore:
        """The engine core, to add requests and step by hand. Raises EngineDeadError once closed."""
        if self._core is None:
            raise EngineDeadError("this LLM is closed; make a new one")
        return self._core

    @property
    def info(self) -> EngineInfo:
        return self.core.info

    def close(self) -> None:
        """Free the model and the KV cache, and end the other ranks. May be called again."""
        core, self._core = self._core, None
        if core is not None:
            core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, as for measurements."""
        self.core.reset_prefix_cache()

    def draw_seed(self) -> int:
        """Return a seed for a request without one: the next of a fixed sequence if `config.seed` is set (the same as
        AsyncEngine's), else random."""
        return self._seeds.getrandbits(63)

    def requests(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        *,
        n: int = 1,
        speculation: str | Sequence[str | None] | None = None,
        adapter: str | Sequence[str] = "",
    ) -> list[Request]:
        """Make n requests for each prompt, prompt by prompt, with fresh ids and seeds; the first of n is that of n = 1.

        `params`, `speculation` and `adapter` (see Request) are a single value, or a list with one for each prompt.
        Raises ParameterError for lists of another length.
        """
        return make_requests(self._ids, self.draw_seed, prompts, params, n=n, speculation=speculation, adapter=adapter)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
        *,
        n: int = 1,
        speculation: str | Sequence[str | None] | None = None,
        adapter: str | Sequence[str] = "",
        use_tqdm: bool = False,
    ) -> list[Completion]:
        """Decode every prompt to its end. Returns a flat list, prompt by prompt: the answers to `prompts[i]` are
        `[i * n : (i + 1) * n]`.

        Arguments as in `requests`; raises ParameterError, before anything runs, for a prompt or a parameter that the
        engine cannot serve.
        """
        requests = self.requests(prompts, params, n=n, speculation=speculation, adapter=adapter)
        done = {completion.request_id: completion for completion in empty_completions(requests, n)}
        tokens = 0
        with tqdm(total=len(requests), desc="generate", unit="seq", disable=not use_tqdm) as bar:
            for delta in self.stream(requests):
                done[delta.request_id].extend(delta)
                tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    bar.update()
                    bar.set_postfix(tokens=tokens, refresh=False)
        return list(done.values())

    def stream(self, requests: Sequence[Request]) -> Iterator[Delta]:
        """Yield the deltas of all `requests` as steps produce them; each request's last has a finish_reason. Their ids
        are the caller's own, or made by `requests`.

        Nothing starts before the first delta is requested. Closing the iterator aborts what has not ended. Raises
        ParameterError as `generate` does, also for an id that is given twice, and RuntimeError while another stream of
        this LLM is open.
        """
        core = self.core
        if self._streaming:
            raise RuntimeError("another stream of this LLM is open: finish or close it first")
        live: set[str] = set()
        self._streaming = True
        try:
            for request in requests:
                core.add(self._complete(request))
                live.add(request.id)
            while live:
                result = core.step()
                live.difference_update(delta.request_id for delta in result.deltas if delta.finish_reason is not None)
                if self._on_stats is not None:
                    self._on_stats(result.stats)
                yield from result.deltas
        finally:
            self._streaming = False
            for request_id in live:
                core.abort(request_id)
            if live and core.has_work():
                core.step()  # drops the aborted requests' last deltas

    def _complete(self, request: Request) -> Request:
        """Fill in what the caller may leave open: seed and time of arrival."""
        params = request.params
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=self.draw_seed())
        return msgspec.structs.replace(request, params=params, arrival=request.arrival or time.monotonic())
