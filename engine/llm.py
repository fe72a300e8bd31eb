"""LLM: the engine in this process, for scripts, tests and benchmarks. Token ids in, token ids out.

The same `EngineCore` that the server runs in a process of its own (`engine.process.client`), without messages or event
loop.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, cast

import msgspec
from tqdm import tqdm

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.core import EngineCore
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Delta, EngineInfo, FinishReason, Request, RequestStats, TokenLogprobs, fan_out
from pilotfish.engine.stats import StepStats
from pilotfish.errors import ConfigError, EngineDeadError, ParameterError

DEFAULT_PARAMS = SamplingParams()


@dataclass(slots=True, kw_only=True)
class Completion:
    """One answer. `logprobs` has one entry for each of `token_ids`, `prompt_logprobs` one for each of `prompt_ids`
    (None for the first); both are None unless the request's parameters ask for them."""

    request_id: str
    index: int
    """Which of its prompt's n answers it is, from 0."""
    prompt_ids: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The end-of-text or stop token that ended it: the last of token_ids, and not part of the text."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None
    stats: RequestStats | None = None
    prompt: str | None = None
    """The prompt, if it was a text. See `pilotfish.library`, which has the tokenizer."""
    read: Callable[[Sequence[int]], str] | None = field(default=None, repr=False, compare=False)
    """Decodes token ids; None where there is no tokenizer."""

    @property
    def text(self) -> str:
        """The answer's text, decoded now. Raises ParameterError where there is no tokenizer."""
        if self.read is None:
            raise ParameterError("text", "this engine knows token ids only: from pilotfish import LLM has texts")
        return self.read(self.token_ids if self.stop_token is None else self.token_ids[:-1])

    @property
    def outputs(self) -> tuple[Completion, ...]:
        """This one alone: as in vLLM, `llm.generate(...)[0].outputs[0].text`."""
        return (self,)

    def extend(self, delta: Delta) -> None:
        """Append the next delta of its request."""
        self.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs.extend(delta.logprobs)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = list(delta.prompt_logprobs)
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_token = delta.finish_reason, delta.stop_token
            self.error, self.stats = delta.error, delta.stats


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
        known = {} if config is None else msgspec.structs.asdict(config)
        named = {} if model is None else {"model": model}
        try:
            self.config = msgspec.convert({**known, **named, **settings}, EngineConfig).check()
        except msgspec.ValidationError as error:
            raise ConfigError(str(error)) from None
        self._on_stats = on_stats
        self._seeds = random.SystemRandom() if self.config.seed is None else random.Random(self.config.seed)
        self._next_id = 0
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
        if n < 1:
            raise ParameterError("n", f"n is {n}, but must be at least 1")
        made = []
        for prompt, own, drafter, lora in zip(
            prompts,
            _each("params", params, SamplingParams, len(prompts)),
            _each("speculation", speculation, (str, type(None)), len(prompts)),
            _each("adapter", adapter, str, len(prompts)),
            strict=True,
        ):
            seed = self.draw_seed() if own.seed is None else own.seed
            request = Request(
                id=str(self._next_id),
                prompt_ids=tuple(prompt),
                params=own,
                speculation=drafter,
                adapter=lora,
                arrival=time.monotonic(),
            )
            self._next_id += 1
            made += fan_out(request, n, seed)
        return made

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
        done = {
            request.id: Completion(request_id=request.id, index=i % n, prompt_ids=request.prompt_ids)
            for i, request in enumerate(requests)
        }
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


def _each(name: str, value: object, single: type | tuple[type, ...], count: int) -> list[Any]:
    """Return one value for each of `count` prompts: `value` repeated if it is a single one, else the list itself."""
    if isinstance(value, single):
        return [value] * count
    values = list(cast(Sequence[Any], value))
    if len(values) != count:
        raise ParameterError(name, f"{name} has {len(values)} entries, but there are {count} prompts")
    return values
