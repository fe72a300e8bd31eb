"""What callers of the library ask with and get: requests made of prompts, and Completion, which gathers an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Delta, FinishReason, Request, RequestStats, TokenLogprobs, fan_out
from pilotfish.errors import ParameterError

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


def make_requests(
    ids: Iterator[str],
    draw_seed: Callable[[], int],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    n: int,
    speculation: str | Sequence[str | None] | None,
    adapter: str | Sequence[str],
) -> list[Request]:
    """See `engine.llm.LLM.requests`; each prompt takes one of `ids`, and a seed where its parameters have none."""
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
        seed = draw_seed() if own.seed is None else own.seed
        request = Request(
            id=next(ids),
            prompt_ids=tuple(prompt),
            params=own,
            speculation=drafter,
            adapter=lora,
            arrival=time.monotonic(),
        )
        made += fan_out(request, n, seed)
    return made


def empty_completions(requests: Sequence[Request], n: int) -> list[Completion]:
    """Return an empty completion for each request; each prompt has n of them."""
    return [
        Completion(request_id=request.id, index=i % n, prompt_ids=request.prompt_ids)
        for i, request in enumerate(requests)
    ]


def _each(name: str, value: object, single: type | tuple[type, ...], count: int) -> list[Any]:
    """Return one value for each of `count` prompts: `value` repeated if it is a single one, else the list itself."""
    if isinstance(value, single):
        return [value] * count
    values = list(cast(Sequence[Any], value))
    if len(values) != count:
        raise ParameterError(name, f"{name} has {len(values)} entries, but there are {count} prompts")
    return values
