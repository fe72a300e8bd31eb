"""`pilotfish verify` accepts identical text, reports differences, and tells near-ties from bugs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.errors import ConfigError
from pilotfish.server.cli import main as cli
from pilotfish.tools.bench.arms import Arm
from pilotfish.tools.bench.compare import BOUNDS, _difference, bound_of, compare

PROMPT = [5, 6, 7, 8, 9] * 4
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, seed=3, max_tokens=4, ignore_eos=True)


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_the_same_text(
    kernels: str, quick: list[str], prompts: list[str], tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "--kernels",
        kernels,
        "--drafter",
        "ngram",
        "--drafter",
        f"draft-model={tiny('qwen3')}",
        "--max-tokens",
        "12",
    ]
    more += ("--arm", "ngram", "--arm", "draft-model")
    assert cli.main(["verify", *quick, *more, "--prompts", *prompts]) == 0
    printed = capsys.readouterr().out
    cells = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in printed.splitlines() if "4/4" in line]
    assert cells == [
        (arm, mode, batch)
        for mode in ("greedy", "sampled")
        for arm in ("vanilla", "ngram", "draft-model")
        for batch in ("1", "8")
        if (arm, batch) != ("vanilla", "1")
    ]
    assert "No text differs." in printed


def test_a_changed_text_is_status_1(
    broken: None, quick: list[str], prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", *quick, "--arm", "ngram", "--max-tokens", "24", "--prompts", *prompts]) == 1
    printed = capsys.readouterr().out
    assert "NOT EXPLAINED" in printed
    assert "differences are larger than the precision explains" in printed
    assert "log-probabilities" in printed


def second_best(llm: LLM) -> tuple[list[int], list[int], float]:
    """Vanilla's greedy answer, the same with the second choice in its third place, and how far that is behind."""
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=2)
    (answer,) = llm.generate([PROMPT], params, speculation="off")
    assert answer.logprobs is not None
    (first, best), (second, next_best) = answer.logprobs[2].top
    assert first == answer.token_ids[2]
    return answer.token_ids, [*answer.token_ids[:2], second, 0], best - next_best


def test_position_and_gap_are_the_engines(make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Explained exactly where the bound is larger than the gap."""
    with make_llm(kernels="torch") as llm:
        wanted, got, gap = second_best(llm)
        for bound, explained in ((0.98 * gap, False), (1.02 * gap, True)):
            monkeypatch.setitem(BOUNDS, "float32", bound)
            found = _difference(llm, 3, PROMPT, wanted, got, GREEDY, bound_of(llm.info))
            assert (found.prompt, found.position, found.wanted, found.got) == (3, 2, wanted[2], got[2])
            assert found.gap == pytest.approx(gap, abs=1e-4)
            assert found.explained is explained


def test_a_sampled_near_tie_is_one_of_the_noisy_scores(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who would have won without the winner, which is seldom the likeliest token, is explained by a bound that is large
    enough, and by no small one."""
    with make_llm(kernels="torch") as llm:
        (answer,) = llm.generate([PROMPT], SAMPLED, speculation="off")
        banned = msgspec.structs.replace(SAMPLED, logit_bias={answer.token_ids[0]: -100.0})
        (other,) = llm.generate([PROMPT], banned, speculation="off")
        for bound, explained in ((1e-6, False), (30.0, True)):
            monkeypatch.setitem(BOUNDS, "float32", bound)
            found = _difference(llm, 0, PROMPT, answer.token_ids, other.token_ids, SAMPLED, bound_of(llm.info))
            assert (found.position, found.explained) == (0, explained)


def test_a_token_at_the_edge_of_the_nucleus_is_a_near_tie(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some seeds draw the token that a nucleus a little larger has more, be its noisy score as high as it likes."""
    seeds = range(256)
    hot = SamplingParams(temperature=1.0, max_tokens=1, ignore_eos=True, logprobs=2)
    with make_llm(kernels="torch") as llm:
        (answer,) = llm.generate([PROMPT], hot, speculation="off")
        assert answer.logprobs is not None
        likeliest = math.exp(answer.logprobs[0].top[0][1])
        narrow = [msgspec.structs.replace(hot, top_p=likeliest - 0.01, seed=seed, logprobs=None) for seed in seeds]
        wide = [msgspec.structs.replace(params, top_p=likeliest + 0.01) for params in narrow]
        wanted, got = (
            [done.token_ids for done in llm.generate([PROMPT] * len(seeds), params, speculation="off")]
            for params in (narrow, wide)
        )
        other = [seed for seed in seeds if wanted[seed] != got[seed]]
        assert other
        edge = narrow[0].top_p * (1 - narrow[0].top_p)
        for moved, explained in ((0.005, False), (0.025, True)):
            monkeypatch.setitem(BOUNDS, "float32", moved / edge)
            found = [
                _difference(llm, 0, PROMPT, wanted[seed], got[seed], narrow[seed], bound_of(llm.info))
                for seed in other[:5]
            ]
            assert [each.explained for each in found] == [explained] * len(found)


def test_bit_equal_kernels_explain_nothing(make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BOUNDS, "float32", 100.0)
    with make_llm(kernels="native") as llm:
        assert bound_of(llm.info) == 0.0
        wanted, got, _ = second_best(llm)
        assert not _difference(llm, 0, PROMPT, wanted, got, GREEDY, bound_of(llm.info)).explained


def test_an_answer_that_ends_early_is_never_explained(make_llm: Callable[..., LLM]) -> None:
    with make_llm(kernels="torch") as llm:
        found = _difference(llm, 0, PROMPT, [5, 6, 7], [5, 6], GREEDY, bound_of(llm.info))
    assert (found.position, found.wanted, found.got, found.gap, found.explained) == (2, 7, None, None, False)


def test_rejection_verification_is_refused(make_llm: Callable[..., LLM]) -> None:
    with make_llm(verification="rejection") as llm, pytest.raises(ConfigError, match="use 'coupled'"):
        list(compare(llm, [PROMPT], [Arm("vanilla", "off")], {"greedy": GREEDY}, (1,), lambda count: None))
