"""Comparing an arm's texts with vanilla's, token by token, for the same prompts and seeds; and whether the precision
explains a difference.

The reference is vanilla with each prompt alone. Batch-invariant kernels ("native") explain no difference at all. With
others a logit depends a little on the rows around it, and two almost equally likely tokens may trade places. The engine
itself decides that: does vanilla draw the arm's token, too, once the two tokens' logits are moved towards each other by
no more than the precision's bound, and the nucleus's edge accordingly? The noise of a sampled token depends on seed and
position alone, so it is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import msgspec

from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import EngineInfo, check_request
from pilotfish.errors import ConfigError
from pilotfish.tools.bench.arms import VANILLA, Arm

BOUNDS = {"float32": 2.0**-10, "float16": 2.0**-4, "bfloat16": 2.0**-1}
"""Bounds on how far two logits may move against each other in different batches, by dtype: about four units in the last
place of logits between 16 and 32 (bfloat16, float16: 8 and 11 bits of mantissa), and more for float32's sums."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first position at which an arm's text differs from vanilla's."""

    prompt: int
    """The prompt's index."""
    position: int
    """The position in the answer, from 0."""
    wanted: int | None
    """Vanilla's token; None if vanilla's answer has ended."""
    got: int | None
    gap: float | None
    """Log-probability of `wanted` less that of `got`, which is the gap of their logits; None where one has ended."""
    explained: bool
    """Whether the bound explains it as a near-tie."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """An arm's texts at one batch size against the reference."""

    arm: str
    mode: str
    batch: int
    texts: int
    differences: list[Difference]

    @property
    def identical(self) -> int:
        return self.texts - len(self.differences)


def greedy_and_sampled(max_tokens: int, ignore_eos: bool = True, seed: int = 0) -> dict[str, SamplingParams]:
    """Return the two modes in which texts are compared, by name."""
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos, seed=seed)
    return {"greedy": greedy, "sampled": msgspec.structs.replace(greedy, temperature=0.8, top_p=0.9)}


def bound_of(info: EngineInfo) -> float:
    """Return how far this engine's logits may differ from batch to batch: 0 for batch-invariant kernels."""
    return 0.0 if info.kernels == "native" else BOUNDS[info.dtype]


def compare(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    arms: Sequence[Arm],
    modes: dict[str, SamplingParams],
    batches: Sequence[int],
    on_end: Callable[[int], object],
) -> Iterator[Comparison]:
    """Yield a comparison for each of `modes`, arms and batch sizes; for vanilla only at batch sizes above 1.

    on_end: called with the number of requests that have just ended; `requests_of` says how many there will be.
    Raises ConfigError for a configuration whose text may depend on drafts, ParameterError for too long a prompt.
    """
    if llm.config.verification != "coupled":
        raise ConfigError(
            f"verification is {llm.config.verification!r}, whose text may depend on the draft: use 'coupled'"
        )
    vanilla = next(arm for arm in arms if arm.name == VANILLA)
    for params in modes.values():
        # A difference is examined with the answer as part of the prompt.
        longest = max(map(list, prompts), key=len)
        for request in llm.requests([longest + longest[:1] * params.max_tokens], params):
            check_request(request, llm.info)
    for mode, params in modes.items():
        wanted = texts_of(llm, prompts, params, vanilla, 1, on_end)
        for arm in arms:
            for batch in batches:
                if (arm.name, batch) == (VANILLA, 1):
                    continue
                got = texts_of(llm, prompts, params, arm, batch, on_end)
                differences = differences_of(llm, prompts, wanted, got, params, bound_of(llm.info))
                yield Comparison(arm.name, mode, batch, len(prompts), differences)


def requests_of(prompts: int, arms: int, modes: int, batches: Sequence[int]) -> int:
    """Return the number of requests that `compare` makes, without those that examine differences."""
    return prompts * modes * (arms * len(batches) + (1 not in batches))


def _seeded(params: SamplingParams, i: int) -> SamplingParams:
    return msgspec.structs.replace(params, seed=(params.seed or 0) + i)


def texts_of(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    arm: Arm,
    batch: int,
    on_end: Callable[[int], object] = lambda count: None,
) -> list[list[int]]:
    """Return an arm's answers, `batch` prompts at a time; every prompt has a seed of its own."""
    texts = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        own = [_seeded(params, start + i) for i in range(len(part))]
        done = llm.generate(part, own, speculation=[arm.speculation] * len(part))
        texts += [completion.token_ids for completion in done]
        on_end(len(part))
    return texts


def differences_of(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[list[int]],
    got: Sequence[list[int]],
    params: SamplingParams,
    bound: float,
) -> list[Difference]:
    """Return the differences between two results of `texts_of`, examined with `llm`, which made the `wanted` ones.

    bound: how far logits may differ between the two.
    """
    return [
        _difference(llm, i, prompts[i], one, other, _seeded(params, i), bound)
        for i, (one, other) in enumerate(zip(wanted, got, strict=True))
        if one != other
    ]


def _difference(
    llm: LLM,
    index: int,
    prompt: Sequence[int],
    wanted: list[int],
    got: list[int],
    params: SamplingParams,
    bound: float,
) -> Difference:
    pairs = enumerate(zip_longest(wanted, got))
    position, (ours, theirs) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
    if ours is None or theirs is None:
        return Difference(index, position, ours, theirs, None, False)
    before = [*prompt, *wanted[:position]]
    gap = _logprob(llm, before, ours) - _logprob(llm, before, theirs)
    return Difference(index, position, ours, theirs, gap, bound > 0 and _near(llm, before, ours, theirs, params, bound))


def _logprob(llm: LLM, before: list[int], token: int) -> float:
    """Return the log-probability of `token` after `before`, under the target's own distribution."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (completion,) = llm.generate([[*before, token]], params, speculation="off")
    last = (completion.prompt_logprobs or [None])[-1]
    assert last is not None
    return last.logprob


def _near(llm: LLM, before: list[int], wanted: int, got: int, params: SamplingParams, bound: float) -> bool:
    """Return whether vanilla draws `got` once its logit and that of `wanted` are moved `bound` closer together."""
    edge = 0.0
    if not params.greedy:
        # A nucleus of mass p whose logits all move by e against the others' has p (1 - p) e more of it.
        edge = params.top_p * (1 - params.top_p) * bound / params.temperature
    bias = {got: bound / 2, wanted: -bound / 2}
    for top_p in dict.fromkeys((params.top_p, params.top_p - edge, min(1.0, params.top_p + edge))):
        probe = msgspec.structs.replace(params, top_p=top_p, logit_bias=bias, max_tokens=1, min_tokens=0)
        (completion,) = llm.generate([before], probe, speculation="off")
        if completion.token_ids == [got]:
            return True
    return False
