"""PredictionDrafter on edited texts; and through the engine: the same text, whatever was predicted."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.draft import NO_DRAFT
from pilotfish.engine.llm import LLM, Completion
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.drafters.drafter import DraftRequest
from pilotfish.engine.speculation.drafters.prediction import PredictionDrafter
from pilotfish.engine.stats import StepStats
from pilotfish.errors import ParameterError

LIMIT = 8
TEXT = st.lists(st.integers(0, 9), max_size=40)
LONG = list(range(100, 200))


def make_sequence(prediction: list[int], identity: str = "a") -> Sequence:
    request = Request(id=identity, prompt_ids=(1, 2), params=SamplingParams(), prediction_ids=tuple(prediction))
    return Sequence(request=request, seed=0, blocks=BlockTable(BlockPool(1, 16)))


def steps(prediction: list[int], answer: list[int]) -> tuple[int, int, int]:
    """Steps to say an answer, as an engine would, and how many tokens were drafted and accepted."""
    drafter, sequence = PredictionDrafter(), make_sequence(prediction)
    taken = drafted = accepted = 0
    left = list(answer)
    while left:
        (draft,) = drafter.propose([DraftRequest(sequence, LIMIT)])
        right = 0
        while right < min(len(draft.tokens), len(left) - 1) and draft.tokens[right] == left[right]:
            right += 1
        sequence.tokens += left[: right + 1]
        del left[: right + 1]
        taken, drafted, accepted = taken + 1, drafted + len(draft.tokens), accepted + right
    return taken, drafted, accepted


def test_a_right_prediction_is_followed_from_its_beginning() -> None:
    assert steps(LONG, LONG)[0] == -(-100 // (LIMIT + 1))


@pytest.mark.parametrize(
    ("edited", "most"),
    [
        ([*LONG[:50], 7, *LONG[51:]], 2),  # replaced by one
        ([*LONG[:50], 7, 8, *LONG[51:]], 4),  # replaced by two
        ([*LONG[:50], 7, 8, 9, *LONG[50:]], 5),  # inserted
        ([*LONG[:50], *LONG[54:]], 2),  # left out
        ([*LONG[:30], *LONG[70:]], 4),  # left out, more than is near
        ([*LONG[60:], *LONG[:60]], 6),  # in another order
        ([7, *LONG[1:]], 2),  # another beginning, as a leading space makes
        ([7, *LONG], 3),
        (LONG[1:], 2),
    ],
)
def test_an_edit_costs_a_few_steps(edited: list[int], most: int) -> None:
    assert steps(LONG, edited)[0] <= -(-len(edited) // (LIMIT + 1)) + most


@settings(max_examples=50)
@given(st.integers(0, 2**32))
def test_a_text_with_many_edits_is_still_followed(seed: int) -> None:
    """One word in twenty is replaced, left out or put in, in a text of few different words."""
    rng = random.Random(seed)
    text = [rng.randrange(300) for _ in range(400)]
    edited: list[int] = []
    for token in text:
        kind = rng.random() * 60
        edited += [] if kind < 1 else [rng.randrange(300)] if kind < 2 else [999, token] if kind < 3 else [token]
    assert len(edited) / steps(text, edited)[0] > 3


def test_places_behind_come_first_and_the_nearest_of_them() -> None:
    drafter = PredictionDrafter()
    sequence = make_sequence([5, 6, 20, 21, 1, 2, 3, 4, 30, 31, 5, 6, 40, 41, 5, 6, 50, 51])
    sequence.tokens += [1, 2, 3, 4, 9, 5, 6]
    (draft,) = drafter.propose([DraftRequest(sequence, 2)])
    assert draft.tokens == (40, 41)


def test_it_gives_up_and_comes_back() -> None:
    drafter, sequence = PredictionDrafter(), make_sequence(LONG)
    request = DraftRequest(sequence, LIMIT)
    assert drafter.propose([request])[0].tokens == tuple(LONG[:LIMIT])
    sequence.tokens += [1, 2, 3]
    for token in (4, 5, 6, LONG[40]):
        assert drafter.propose([request]) == [NO_DRAFT]
        sequence.tokens.append(token)
    assert drafter.propose([request]) == [NO_DRAFT]  # one token far away is no reason
    sequence.tokens.append(LONG[41])
    (draft,) = drafter.propose([request])
    assert draft.tokens == tuple(LONG[42 : 42 + len(draft.tokens)])
    assert draft.drafter == "prediction"
    sequence.tokens += LONG[42:]
    assert drafter.propose([request]) == [NO_DRAFT]  # the prediction is said


def test_evidence_grows_with_what_agrees() -> None:
    drafter, sequence = PredictionDrafter(), make_sequence(LONG)
    seen = []
    for token in [*LONG[:20], 7, *LONG[21:24]]:
        seen.append(drafter.propose([DraftRequest(sequence, LIMIT)])[0].evidence)
        sequence.tokens.append(token)
    assert seen == [1, 2, 3, 3, *[4] * 4, *[5] * 8, *[6] * 5, 0, 2, 3]


def test_no_prediction_is_no_draft_and_an_unrelated_one_is_left() -> None:
    assert PredictionDrafter().propose([DraftRequest(make_sequence([]), LIMIT)]) == [NO_DRAFT]
    taken, drafted, accepted = steps(LONG, list(range(1000, 1100)))
    assert (taken, accepted) == (100, 0)
    assert drafted <= LIMIT + 3


@given(TEXT, TEXT, st.data())
def test_catching_up_is_the_same_as_seeing_all_at_once(
    prediction: list[int], answer: list[int], data: st.DataObject
) -> None:
    drafter = PredictionDrafter()
    sequence, other = make_sequence(prediction), make_sequence(answer, "b")
    left = list(answer)
    while left:
        count = data.draw(st.integers(1, len(left)))
        sequence.tokens += left[:count]
        del left[:count]
        drafts = drafter.propose([DraftRequest(other, LIMIT), DraftRequest(sequence, LIMIT)])
        fresh = make_sequence(prediction)
        fresh.tokens = list(sequence.tokens)
        assert PredictionDrafter().propose([DraftRequest(fresh, LIMIT)]) == drafts[1:]
    drafter.release(sequence)
    drafter.release(sequence)
    drafter.release(other)
    assert drafter._followers == {}


# Through the engine.

PROMPT = [5, 9, 300, 7, 41]
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    "sampled": SamplingParams(temperature=0.8, seed=7, max_tokens=40, ignore_eos=True),
    "penalties": SamplingParams(
        temperature=0.9, seed=3, frequency_penalty=0.6, repetition_penalty=1.2, max_tokens=40, ignore_eos=True
    ),
}


@pytest.fixture(scope="module", params=[False, True], ids=["as long as can be", "controller"])
def llm(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> LLM:
    return LLM(
        model=str(tiny("llama")),
        kv_cache_memory=4 << 20,
        num_threads=1,
        adaptive_drafts=request.param,
        speculation="suffix",
    )


def answers(llm: LLM, requests: list[Request]) -> list[Completion]:
    done = {r.id: Completion(request_id=r.id, index=0, prompt_ids=r.prompt_ids) for r in requests}
    for delta in llm.stream(requests):
        done[delta.request_id].extend(delta)
    return list(done.values())


def predictions(answer: list[int]) -> dict[str, list[int]]:
    half = [token if i % 10 else (token + 1) % 512 for i, token in enumerate(answer)]
    return {
        "right": answer,
        "half right": half[:20] + answer[25:],
        "empty": [],
        "longer": answer + [3, 4, 5] * 20,
        "unrelated": [(token + 77) % 512 for token in answer],
    }


@pytest.mark.parametrize("name", PARAMS)
def test_the_text_is_the_same_whatever_was_predicted(name: str, llm: LLM) -> None:
    (plain,) = llm.generate([PROMPT], PARAMS[name], speculation="off")
    (default,) = llm.generate([PROMPT], PARAMS[name])
    wanted = predictions(plain.token_ids)
    requests = [
        Request(
            id=f"{kind}-{who}",
            prompt_ids=tuple(PROMPT),
            params=PARAMS[name],
            speculation=who,
            prediction_ids=tuple(ids),
        )
        for kind, ids in wanted.items()
        for who in (None, "prediction", "off", "ngram")
    ]
    got = answers(llm, requests)  # all in one batch
    assert {completion.request_id: completion.token_ids for completion in got} == dict.fromkeys(
        [request.id for request in requests], plain.token_ids
    )
    assert default.token_ids == plain.token_ids


def test_a_right_prediction_saves_steps_and_is_counted_as_its_own(tiny: Callable[[str], Path]) -> None:
    counted: dict[str, int] = {}

    def count(stats: StepStats) -> None:
        for name, tokens in stats.drafted.items():
            counted[name] = counted.get(name, 0) + tokens

    with LLM(
        model=str(tiny("llama")), kv_cache_memory=4 << 20, num_threads=1, adaptive_drafts=False,
        speculation="suffix", on_stats=count,
    ) as llm:  # fmt: skip
        params = PARAMS["sampled"]
        (plain,) = llm.generate([PROMPT], params, speculation="off")
        (right,) = answers(
            llm, [Request(id="r", prompt_ids=tuple(PROMPT), params=params, prediction_ids=tuple(plain.token_ids))]
        )
        assert right.stats is not None
        assert (right.stats.drafter, right.stats.accepted_tokens) == ("prediction", right.stats.drafted_tokens)
        assert right.stats.steps <= 1 + -(-39 // 9)
        assert counted == {"prediction": right.stats.drafted_tokens}
        counted.clear()
        # A prompt that the default drafter knows how to go on with, and a prediction that is of no use
        looping = msgspec.structs.replace(params, logit_bias={100: 20.0, 101: 20.0})
        request = Request(id="f", prompt_ids=(100, 101) * 10, params=looping, prediction_ids=(7, 8, 9))
        (fallen,) = answers(llm, [request])
        assert counted.keys() == {"prediction", "suffix"}
        assert fallen.stats is not None
        assert sum(counted.values()) == fallen.stats.drafted_tokens
        assert fallen.stats.drafter == "suffix"


def test_predicted_ids_must_be_in_the_vocabulary(llm: LLM) -> None:
    request = Request(id="x", prompt_ids=(1,), params=PARAMS["greedy"], prediction_ids=(4, 512))
    with pytest.raises(ParameterError, match="prediction has token id 512, which is not between 0 and 511") as raised:
        llm.core.add(request)
    assert raised.value.param == "prediction"
