"""Promise 2: speculation never changes the text. Whoever drafts, however much, in whatever company: the same tokens."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pilotfish.engine.draft import shortened
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.speculation.control.candidates import Choice, UpcomingStep
from pilotfish.engine.speculation.drafters.drafter import DraftRequest
from tests.support.native import BOTH
from tests.support.pairwise import pairwise
from tests.support.texts import DRAFTERS, GREEDY, PARAMS, SAMPLED, portfolio, prompts, stats_of, texts


@pytest.fixture(scope="module")
def make(tiny: Callable[[str], Path], kernels: str) -> Callable[..., LLM]:
    def build(**settings: object) -> LLM:
        defaults: dict[str, Any] = {
            "model": str(tiny("llama")),
            "kernels": kernels,
            "kv_cache_memory": 4 << 20,
            "num_threads": 1,
            "adaptive_drafts": False,
        }
        return LLM(**{**defaults, **settings})

    return build


@pytest.fixture(scope="module")
def vanilla(make: Callable[..., LLM]) -> Callable[[str], list[tuple[list[int], str | None]]]:
    """Each prompt alone, without speculation: the text that everything else must equal."""
    llm = make(speculation="none", prefix_caching=False)
    known: dict[str, list[tuple[list[int], str | None]]] = {}

    def text(name: str) -> list[tuple[list[int], str | None]]:
        if name not in known:
            known[name] = [texts(llm.generate([prompt], PARAMS[name]))[0] for prompt in prompts(8)]
        return known[name]

    return text


@pytest.fixture(scope="module")
def speculative(make: Callable[..., LLM], draft: Path, head: Path) -> LLM:
    return make(drafter=portfolio(draft, head), speculation="draft-model", num_draft_tokens=5)


QUICK = ("greedy", "sampled", "stops")
QUICK_AND_SLOW = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PARAMS]


@pytest.mark.parametrize(
    ("kernels", "name", "drafter", "batch"),
    pairwise([BOTH[0], pytest.param("torch", marks=pytest.mark.slow)], QUICK_AND_SLOW, DRAFTERS, (1, 8)),
    indirect=["kernels"],
)
def test_drafters_and_batches(name: str, drafter: str, batch: int, speculative: LLM, vanilla: Callable) -> None:
    wanted, got = vanilla(name), []
    for start in range(0, 8, batch):
        got += speculative.generate(prompts(8)[start : start + batch], PARAMS[name], speculation=drafter)
    assert texts(got) == wanted
    if drafter != "off" and "penalties" not in name and not PARAMS[name].constrained:
        assert sum(stats_of(completion).drafted_tokens for completion in got) > 0
    assert speculative.core.engine.pool.used == 0


def test_a_mixed_batch(speculative: LLM, vanilla: Callable) -> None:
    """Requests of one batch differ in everything."""
    names = list(PARAMS)
    mixed = [names[i % len(names)] for i in range(8)]
    drafters = [("off", "ngram", "eagle3", "draft-model", "suffix")[i % 5] for i in range(8)]
    got = speculative.generate(prompts(8), [PARAMS[name] for name in mixed], speculation=drafters)
    assert texts(got) == [vanilla(name)[i] for i, name in enumerate(mixed)]


@pytest.mark.slow
def test_the_target_as_its_own_draft_is_always_right(
    make: Callable[..., LLM], tiny: Callable[[str], Path], vanilla: Callable
) -> None:
    llm = make(drafter=portfolio(tiny("llama")), speculation="draft-model", num_draft_tokens=4)
    for name in PARAMS:
        got = llm.generate(prompts(8), PARAMS[name])
        assert texts(got) == vanilla(name)
        for completion in got:
            stats = stats_of(completion)
            if PARAMS[name].constrained:  # the grammar drafts, too
                continue
            assert stats.drafter == "draft-model"
            if completion.finish_reason == "length":  # a stop cuts off what was accepted behind it
                assert stats.accepted_tokens == stats.drafted_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "name", "drafter"), pairwise(BOTH, ("greedy", "sampled", "penalties"), DRAFTERS), indirect=["kernels"]
)
def test_preemption(
    name: str, drafter: str, make: Callable[..., LLM], draft: Path, head: Path, vanilla: Callable
) -> None:
    """A pool that cannot hold half of the batch."""
    # Keys and values of two layers, the draft's one, and the head's, which has twice their heads.
    bytes_per_block = 2 * 5 * 16 * 2 * 16 * 4
    llm = make(drafter=portfolio(draft, head), kv_cache_memory=12 * bytes_per_block, prefix_caching=False)
    got = llm.generate(prompts(8), PARAMS[name], speculation=drafter)
    assert texts(got) == vanilla(name)
    assert sum(stats_of(completion).preemptions for completion in got) > 0
    assert llm.core.engine.pool.available == llm.info.num_blocks


@pytest.mark.parametrize(
    ("kernels", "name", "drafter", "blocks"),
    pairwise(BOTH[:1], ("greedy", "sampled", "penalties", "schema"), DRAFTERS, (200, 14)),
    indirect=["kernels"],
)
def test_users_that_take_turns(
    name: str,
    drafter: str,
    blocks: int,
    make: Callable[..., LLM],
    draft: Path,
    head: Path,
    vanilla: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More users than places, who pause each other every few tokens, with memory for all of them, or for few."""
    monkeypatch.setattr("pilotfish.engine.shares.QUANTUM", 3.0)
    waited: list[int] = []
    llm = make(
        drafter=portfolio(draft, head),
        kv_cache_memory=blocks * 2 * 5 * 16 * 2 * 16 * 4,
        max_num_seqs=3,
        prefix_caching=False,
        on_stats=lambda stats: waited.append(stats.pauses if blocks == 200 else stats.preemptions),
    )
    requests = [
        Request(id=str(i), prompt_ids=tuple(prompt), params=PARAMS[name], speculation=drafter, user=str(i))
        for i, prompt in enumerate(prompts(8))
    ]
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    reasons: dict[str, str] = {}
    for delta in llm.stream(requests):
        tokens[delta.request_id] += delta.token_ids
        if delta.finish_reason is not None:
            reasons[delta.request_id] = delta.finish_reason
    assert [(tokens[request.id], reasons[request.id]) for request in requests] == vanilla(name)
    assert sum(waited) > 0
    assert llm.core.engine.pool.available == llm.info.num_blocks


def test_a_request_ends_at_its_deadline(make: Callable[..., LLM]) -> None:
    """Wherever it is, and its blocks are free then."""
    llm = make(max_num_seqs=1)
    now = time.monotonic()
    endless = SamplingParams(max_tokens=10**6, ignore_eos=True)
    ids = tuple(prompts(1)[0])
    requests = [Request(id="running", prompt_ids=ids, params=endless, deadline=now + 0.3)]
    requests += [Request(id="waiting", prompt_ids=ids, params=endless, deadline=now + 0.1)]
    requests += [Request(id="fine", prompt_ids=ids, params=GREEDY, deadline=now + 1000)]
    ends = [(d.request_id, d.finish_reason) for d in llm.stream(requests) if d.finish_reason is not None]
    assert ends == [("waiting", "timeout"), ("running", "timeout"), ("fine", "length")]
    assert llm.core.engine.pool.used == 0


@pytest.mark.slow
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_prefix_cache_hits(drafter: str, speculative: LLM, vanilla: Callable) -> None:
    for name in ("greedy", "sampled"):
        speculative.generate(prompts(8), PARAMS[name], speculation=drafter)
        again = speculative.generate(prompts(8), PARAMS[name], speculation=drafter)
        assert texts(again) == vanilla(name)
        assert sum(stats_of(completion).cached_prompt_tokens for completion in again) > 0


@pytest.mark.parametrize("budget", [8, 17])
def test_chunked_prefill(budget: int, make: Callable[..., LLM], vanilla: Callable) -> None:
    llm = make(max_batch_tokens=budget, max_num_seqs=8, speculation="ngram")
    assert texts(llm.generate(prompts(8), SAMPLED)) == vanilla("sampled")


def test_logprobs_are_the_same_numbers(speculative: LLM, kernels: str) -> None:
    """Not only the tokens: on the CPU's own kernels a verified row is the decoded row, to the last bit."""
    params = msgspec.structs.replace(SAMPLED, logprobs=3)
    alone = [speculative.generate([prompt], params, speculation="off")[0] for prompt in prompts(8)]
    together = speculative.generate(prompts(8), params, speculation="ngram")
    for one, other in zip(alone, together, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert len(one.logprobs) == len(one.token_ids)
        if kernels == "native":
            assert one.logprobs == other.logprobs
        assert (
            [entry.token_id for entry in one.logprobs] == [entry.token_id for entry in other.logprobs] == one.token_ids
        )


def test_prompt_logprobs_do_not_depend_on_the_chunks(make: Callable[..., LLM], kernels: str) -> None:
    params = msgspec.structs.replace(GREEDY, prompt_logprobs=2, max_tokens=4)
    whole = make(speculation="none").generate(prompts(8), params)
    pieces = make(speculation="ngram", max_batch_tokens=9, max_num_seqs=8).generate(prompts(8), params)
    for one, other in zip(whole, pieces, strict=True):
        assert one.prompt_logprobs is not None
        assert len(one.prompt_logprobs) == len(one.prompt_ids)
        assert one.prompt_logprobs[0] is None
        assert [entry and entry.token_id for entry in one.prompt_logprobs[1:]] == list(one.prompt_ids[1:])
        if kernels == "native":
            assert one.prompt_logprobs == other.prompt_logprobs


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["draft-model", "eagle3"])
def test_rejection_verification_runs_and_is_exact_where_it_is_greedy(
    drafter: str, make: Callable[..., LLM], draft: Path, head: Path, vanilla: Callable
) -> None:
    llm = make(drafter=portfolio(draft, head), speculation=drafter, verification="rejection")
    assert texts(llm.generate(prompts(8), GREEDY)) == vanilla("greedy")
    sampled = llm.generate(prompts(8), SAMPLED)
    assert sum(stats_of(completion).accepted_tokens for completion in sampled) > 0
    assert texts(llm.generate(prompts(8), SAMPLED)) == texts(sampled)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["ngram", "suffix", "draft-model", "eagle3"])
def test_adaptive_lengths(drafter: str, make: Callable[..., LLM], draft: Path, head: Path, vanilla: Callable) -> None:
    """Lengths that follow the clock, another one at every step and run."""
    llm = make(drafter=portfolio(draft, head), adaptive_drafts=True)
    for name in ("greedy", "sampled", "penalties"):
        assert texts(llm.generate(prompts(8), PARAMS[name], speculation=drafter)) == vanilla(name)


@pytest.fixture(scope="module")
def many(make: Callable[..., LLM], tiny: Callable[[str], Path], draft: Path, head: Path) -> LLM:
    """Several drafts, good and bad, one of them the target itself, with the controller's choice among them."""
    drafter = (*portfolio(draft, head), f"own={tiny('llama')}", f"other={tiny('qwen3')}")
    return make(drafter=drafter, adaptive_drafts=True, num_draft_tokens=5)


ALL = ("auto", "off", "ngram", "suffix", "draft-model", "own", "eagle3", None)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMS)
def test_several_draft_models(name: str, many: LLM, vanilla: Callable) -> None:
    assert many.info.drafters == ("ngram", "suffix", "prediction", "grammar", "draft-model", "eagle3", "own", "other")
    alone = [completion for prompt in prompts(8) for completion in many.generate([prompt], PARAMS[name])]
    assert texts(alone) == vanilla(name)
    assert texts(many.generate(prompts(8), PARAMS[name])) == vanilla(name)
    assert texts(many.generate(prompts(8), PARAMS[name], speculation=ALL)) == vanilla(name)
    engine = many.core.engine
    assert engine.pool.used == 0
    drafters: dict[str, Any] = engine.speculator.model_drafters
    assert all(drafter._pool.used == 0 for drafter in drafters.values())


def test_each_draft_model_is_asked_by_its_name(
    make: Callable[..., LLM], tiny: Callable[[str], Path], draft: Path, vanilla: Callable
) -> None:
    llm = make(drafter=(*portfolio(draft), f"own={tiny('llama')}"), num_draft_tokens=4)
    got = llm.generate(prompts(8), GREEDY, speculation=["own", "draft-model"] * 4)
    assert texts(got) == vanilla("greedy")
    assert [stats_of(completion).drafter for completion in got] == ["own", "draft-model"] * 4
    assert all(stats_of(completion).accepted_tokens == stats_of(completion).drafted_tokens for completion in got[::2])


@pytest.mark.slow
def test_the_controllers_choices_do_not_matter(many: LLM, vanilla: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it chooses, at random: asking anybody for any length, and verifying any part of any draft."""
    generator = random.Random(5)
    controller = many.core.engine.speculator._controller

    def ask(step: UpcomingStep) -> dict[str, list[DraftRequest]]:
        asks: dict[str, list[DraftRequest]] = {}
        for candidate in step.candidates:
            for name in candidate.backlog:
                if generator.random() < 0.4:
                    limit = generator.randint(1, candidate.limit)
                    asks.setdefault(name, []).append(DraftRequest(candidate.sequence, limit, generator.random()))
        return asks

    def choose(step: UpcomingStep) -> Choice:
        drafts = {}
        for candidate in step.candidates:
            if candidate.drafts and generator.random() < 0.8:
                draft = generator.choice(candidate.drafts)
                drafts[candidate.sequence] = shortened(draft, generator.randint(1, len(draft.tokens)))
        return Choice(drafts)

    monkeypatch.setattr(controller, "ask", ask)
    monkeypatch.setattr(controller, "choose", choose)
    for name in PARAMS:
        got = many.generate(prompts(8), PARAMS[name])
        assert texts(got) == vanilla(name)
        assert sum(stats_of(completion).accepted_tokens for completion in got) > 0
