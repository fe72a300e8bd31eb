"""LLM on a small random model: what it adds to EngineCore, which has its own tests."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.llm import LLM, Completion
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Delta, Request
from pilotfish.engine.stats import StepStats
from pilotfish.errors import ConfigError, EngineDeadError, ModelError, ParameterError

PROMPTS = [[5, 6, 7, 8], [9] * 40, [300, 2, 300, 4, 300]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, max_tokens=12, ignore_eos=True)
SMALL = EngineConfig(kv_cache_memory=4 << 20, num_threads=1, seed=3)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama), config=SMALL) as llm:
        yield llm


def texts(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def seeded(seed: int) -> SamplingParams:
    return msgspec.structs.replace(DRAWN, seed=seed)


def idle(llm: LLM) -> bool:
    return not llm.core.has_work()


def test_answers_are_the_prompts_in_their_order(llm: LLM) -> None:
    completions = llm.generate(PROMPTS, GREEDY)
    assert [completion.prompt_ids for completion in completions] == [tuple(prompt) for prompt in PROMPTS]
    for completion, prompt in zip(completions, PROMPTS, strict=True):
        assert [completion.token_ids] == texts(llm.generate([prompt], GREEDY))
        assert (len(completion.token_ids), completion.finish_reason, completion.error) == (12, "length", None)
        assert completion.stats is not None
        assert completion.stats.generated_tokens == 12
        assert completion.stats.arrival > 0
        assert completion.logprobs is completion.prompt_logprobs is None
    assert idle(llm)


def test_no_prompts_give_no_answers(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_parameters_and_speculation_may_differ_by_prompt(llm: LLM) -> None:
    lengths = [1, 5, 9]
    params = [msgspec.structs.replace(GREEDY, max_tokens=length) for length in lengths]
    completions = llm.generate(PROMPTS, params, speculation=["off", "ngram", None])
    assert [len(completion.token_ids) for completion in completions] == lengths
    assert completions[0].stats is not None
    assert completions[0].stats.drafted_tokens == 0
    with pytest.raises(ParameterError, match="params has 2 entries, but there are 3 prompts"):
        llm.generate(PROMPTS, params[:2])
    with pytest.raises(ParameterError, match="speculation has 1 entries"):
        llm.generate(PROMPTS, GREEDY, speculation=["off"])


def test_the_first_of_n_answers_is_the_only_one_of_one(llm: LLM) -> None:
    params = [seeded(11), seeded(12), seeded(13)]
    several = llm.generate(PROMPTS, params, n=3)
    assert [completion.index for completion in several] == [0, 1, 2] * 3
    assert [completion.prompt_ids for completion in several[::3]] == [tuple(prompt) for prompt in PROMPTS]
    assert texts(several[::3]) == texts(llm.generate(PROMPTS, params))
    assert all(len({tuple(text) for text in texts(several[i : i + 3])}) == 3 for i in (0, 3, 6))
    with pytest.raises(ParameterError, match="n is 0"):
        llm.generate(PROMPTS, n=0)


def test_logprobs_are_there_for_each_token(llm: LLM) -> None:
    asked = msgspec.structs.replace(GREEDY, logprobs=2, prompt_logprobs=0)
    [completion] = llm.generate([PROMPTS[1]], asked)
    assert completion.logprobs is not None
    assert completion.prompt_logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
    assert all(len(entry.top) == 2 for entry in completion.logprobs)
    first, *others = completion.prompt_logprobs
    assert first is None
    assert [entry and entry.token_id for entry in others] == PROMPTS[1][1:]


def test_a_stop_token_ends_an_answer_and_is_named(llm: LLM) -> None:
    [whole] = llm.generate([PROMPTS[0]], GREEDY)
    stop = whole.token_ids[5]
    [stopped] = llm.generate([PROMPTS[0]], msgspec.structs.replace(GREEDY, stop_token_ids=(stop,)))
    assert (stopped.finish_reason, stopped.stop_token) == ("stop", stop)
    assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]


def test_a_request_that_cannot_be_served_stops_all_before_they_start(llm: LLM) -> None:
    with pytest.raises(ParameterError, match="no tokens"):
        llm.generate([PROMPTS[0], []], GREEDY)
    with pytest.raises(ParameterError, match="running already"):
        list(llm.stream(llm.requests([PROMPTS[0]]) * 2))
    assert idle(llm)
    assert len(llm.generate(PROMPTS, GREEDY)) == 3


def test_a_stream_gives_what_generate_gives(llm: LLM) -> None:
    params = [seeded(i) for i in range(3)]
    requests = llm.requests(PROMPTS, params)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    last: dict[str, Delta] = {}
    for delta in llm.stream(requests):
        assert delta.request_id not in last or last[delta.request_id].finish_reason is None
        tokens[delta.request_id] += delta.token_ids
        last[delta.request_id] = delta
    assert all(delta.finish_reason == "length" and delta.stats for delta in last.values())
    assert list(tokens.values()) == texts(llm.generate(PROMPTS, params))


def test_a_stream_that_is_closed_early_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream(llm.requests(PROMPTS, msgspec.structs.replace(GREEDY, max_tokens=500)))
    next(stream)
    with pytest.raises(RuntimeError, match="another stream"):
        llm.generate(PROMPTS, GREEDY)
    assert not idle(llm)
    assert isinstance(stream, Generator)
    stream.close()
    assert idle(llm)
    assert len(llm.generate(PROMPTS, GREEDY)) == 3


def test_requests_without_a_seed_get_the_configurations(tiny_llama: Path) -> None:
    drawn = []
    for seed in (3, 3, 4):
        with LLM(str(tiny_llama), config=SMALL, seed=seed) as llm:
            bare = [Request(id="r", prompt_ids=tuple(PROMPTS[0]), params=DRAWN)]
            tokens = [token for delta in llm.stream(bare) for token in delta.token_ids]
            drawn.append([tokens, *texts(llm.generate(PROMPTS[:1] * 2, DRAWN))])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(text) for text in drawn[0]}) == 3


def test_each_step_and_the_loading_are_reported(tiny_llama: Path) -> None:
    steps: list[StepStats] = []
    loading: list[tuple[str, float]] = []
    config = msgspec.structs.replace(SMALL, model=str(tiny_llama))
    llm = LLM(config=config, on_stats=steps.append, on_loading=lambda *said: loading.append(said), speculation="none")
    llm.generate([PROMPTS[0]], GREEDY, use_tqdm=True)
    assert sum(step.generated_tokens for step in steps) == 12
    for what in {what for what, _ in loading}:
        shares = [share for said, share in loading if said == what]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate(PROMPTS)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"modle": "x"}, ConfigError, "modle"),
        ({"max_num_seqs": -1}, ConfigError, ">= 0"),
        ({"seed": "three"}, ConfigError, "seed"),
        ({"ngram_min": 5}, ConfigError, "ngram_min"),
        ({"model": "no-such-folder/at-all.gguf"}, ModelError, "no-such-folder"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LLM(config=SMALL, **settings)
