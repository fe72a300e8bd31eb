"""engine.verification.coupled: with any draft the same text (coupled) or the target's distribution (rejection)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pilotfish.engine.draft import NO_DRAFT, Draft
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.params import MAX_SEED, SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.sampling.logit_spans import LogitSpan
from pilotfish.engine.sampling.sampler import draw
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.verification import rejection
from pilotfish.engine.verification.coupled import CoupledVerifier
from pilotfish.engine.verification.rejection import RejectionVerifier, residual
from pilotfish.engine.verification.verifier import Verdict, Verifier

VOCAB = 11
EOS = (1,)
LENGTH = 14
UNLIKELY = 1e-4  # fixed seeds: a statistic passes or fails for good
POOL = BlockPool(4, 16)

BOTH = pytest.mark.parametrize("kind", [CoupledVerifier, RejectionVerifier])
SYNC_FREE = pytest.mark.parametrize("sync_free", [False, True])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other in many small operations are slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sequence(prompt: list[int], seed: int = 0, **params: Any) -> Sequence:
    request = Request(id="r", prompt_ids=tuple(prompt), params=SamplingParams(max_tokens=99, **params).check())
    return Sequence(request, seed, BlockTable(POOL))


def model(prefix: list[int]) -> torch.Tensor:
    """A deterministic "model": raw logits (VOCAB,) for what follows a prefix."""
    return torch.from_numpy(np.random.default_rng([len(prefix), *prefix]).normal(size=VOCAB) * 2).float()


def logits_behind(made: Sequence, draft: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([model(made.tokens + list(draft[:j])) for j in range(len(draft) + 1)])


def step(verifier: Verifier, sequences: list[Sequence], drafts: list[Draft]) -> list[Verdict]:
    """One engine step over all sequences: run the model, verify, commit."""
    spans = [LogitSpan(s, d.tokens, len(d.tokens) + 1) for s, d in zip(sequences, drafts, strict=True)]
    logits = torch.cat([logits_behind(span.sequence, tuple(span.draft)) for span in spans])
    verdicts = verifier.verify(logits, spans, drafts)
    for made, draft, verdict in zip(sequences, drafts, verdicts, strict=True):
        assert 1 <= len(verdict.tokens) <= len(draft.tokens) + 1
        assert verdict.accepted == len(verdict.tokens) - 1
        assert verdict.tokens[: verdict.accepted] == list(draft.tokens[: verdict.accepted])
        made.tokens += verdict.tokens
    return verdicts


def plain_text(verifier: Verifier, made: Sequence, length: int = LENGTH) -> list[int]:
    while made.output_len < length:
        step(verifier, [made], [NO_DRAFT])
    return made.tokens[made.prompt_len :][:length]


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 0.8, 1.5]),
        "top_p": st.floats(0.3, 0.99),
        "top_k": st.integers(1, VOCAB),
        "min_p": st.floats(0.01, 0.5),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2.0),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=3),
        "min_tokens": st.integers(0, LENGTH),
        "typical_p": st.floats(0.05, 0.99),
        "allowed_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=1).map(tuple),
        "bad_words": st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3).map(tuple), max_size=4).map(
            tuple
        ),
        "stop_token_ids": st.just((3,)),
        "ignore_eos": st.booleans(),
    },
)
SEQUENCES = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
        "seed": st.integers(-MAX_SEED - 1, MAX_SEED),
        "params": PARAMS,
    }
)


def any_draft(data: st.DataObject, text: list[int], done: int) -> Draft:
    """Nothing, or a draft that is right, wrong from somewhere on, or arbitrary; with or without probabilities."""
    right = text[done : done + data.draw(st.integers(0, 5))]
    kind = data.draw(st.sampled_from(["right", "half", "any"]))
    if kind == "half" and right:
        at = data.draw(st.integers(0, len(right) - 1))
        right[at] = (right[at] + 1) % VOCAB
    if kind == "any":
        right = data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=5))
    probs = torch.full((len(right), VOCAB), 1 / VOCAB) if data.draw(st.booleans()) else None
    return Draft(tuple(right), probs)


@given(st.lists(SEQUENCES, min_size=1, max_size=3), st.booleans(), st.data())
@settings(max_examples=100)
def test_coupled_text_is_the_same_with_any_draft_and_batch(
    cases: list[dict[str, Any]], sync_free: bool, data: st.DataObject
) -> None:
    verifier = CoupledVerifier(EOS, sync_free=sync_free)
    made = [sequence(case["prompt"], case["seed"], **case["params"]) for case in cases]
    texts = [plain_text(CoupledVerifier(EOS), sequence(c["prompt"], c["seed"], **c["params"])) for c in cases]
    while running := [i for i, each in enumerate(made) if each.output_len < LENGTH]:
        drafts = [any_draft(data, texts[i], made[i].output_len) for i in running]
        step(verifier, [made[i] for i in running], drafts)
    for each, text in zip(made, texts, strict=True):
        assert each.tokens[each.prompt_len :][:LENGTH] == text


@pytest.mark.slow
@given(st.lists(SEQUENCES, min_size=1, max_size=3), st.booleans(), st.data())
@settings(max_examples=60)
def test_rejection_is_greedy_exact_and_reproducible(
    cases: list[dict[str, Any]], sync_free: bool, data: st.DataObject
) -> None:
    """Greedy text is that of plain decoding; sampled text is the same for the same drafts, in any batch."""
    made = [sequence(case["prompt"], case["seed"], **case["params"]) for case in cases]
    texts = [plain_text(CoupledVerifier(EOS), sequence(c["prompt"], c["seed"], **c["params"])) for c in cases]
    again = [sequence(case["prompt"], case["seed"], **case["params"]) for case in cases]
    while running := [i for i, each in enumerate(made) if each.output_len < LENGTH]:
        drafts = [any_draft(data, texts[i], made[i].output_len) for i in running]
        step(RejectionVerifier(EOS, sync_free=sync_free), [made[i] for i in running], drafts)
        for i, draft in zip(running, drafts, strict=True):
            step(RejectionVerifier(EOS), [again[i]], [draft])
    for each, other, text in zip(made, again, texts, strict=True):
        assert each.tokens == other.tokens
        if each.params.greedy:
            assert each.tokens[each.prompt_len :][:LENGTH] == text


@pytest.mark.slow
@given(st.lists(SEQUENCES, min_size=1, max_size=3), st.data())
@settings(max_examples=100)
def test_rejection_without_a_look_judges_as_with_one(cases: list[dict[str, Any]], data: st.DataObject) -> None:
    """What a GPU does, here on the CPU."""
    looking, blind = RejectionVerifier(EOS), RejectionVerifier(EOS, sync_free=True)
    seen, unseen = ([sequence(case["prompt"], case["seed"], **case["params"]) for case in cases] for _ in range(2))
    texts = [plain_text(looking, sequence(case["prompt"], case["seed"], **case["params"])) for case in cases]
    for _ in range(4):
        drafts = [any_draft(data, text, made.output_len) for text, made in zip(texts, seen, strict=True)]
        one, other = step(looking, seen, drafts), step(blind, unseen, drafts)
        assert [verdict.tokens for verdict in one] == [verdict.tokens for verdict in other]


@BOTH
@SYNC_FREE
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"temperature": 0.8, "top_p": 0.9}])
def test_the_target_as_its_own_draft_is_accepted_whole(kind: Any, sync_free: bool, params: dict[str, Any]) -> None:
    """A sampling drafter uses the same noise: where its distribution is the target's, so is every token."""
    made = [sequence([seed], seed, **params) for seed in range(5)]
    for _ in range(4):
        drafts = []
        for each in made:
            tokens: tuple[int, ...] = ()
            probs = []
            for _ in range(4):
                span = LogitSpan(each, tokens)
                drawn, processed = draw(model(each.tokens + list(tokens)).unsqueeze(0), [span], EOS)
                probs.append(processed.softmax(1)[0])
                tokens += tuple(drawn)
            drafts.append(Draft(tokens, torch.stack(probs)))
        assert [verdict.accepted for verdict in step(kind(EOS, sync_free=sync_free), made, drafts)] == [4] * 5


# Rejection verification's distribution


COUNT = 8_000
P = np.array([0.35, 0.25, 0.15, 0.1, 0.06, 0.05, 0.04, 0.0])
Q = np.array([0.1, 0.3, 0.2, 0.05, 0.15, 0.0, 0.1, 0.1])
P_NEXT = np.array([0.05, 0.05, 0.1, 0.1, 0.2, 0.2, 0.2, 0.1])
P_LAST = np.array([0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0])


def log(p: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.log(np.maximum(p, 1e-30))).float()


@cache
def drafts_of(source: str) -> list[Draft]:
    """Two tokens drafted for each of COUNT sequences, from Q: certain, soft, or the sampler's own with its seeds."""
    q = torch.from_numpy(np.stack([Q, Q])).float()
    if source == "own":
        spans = [LogitSpan(sequence([0], seed), (0,), 2) for seed in range(COUNT)]
        drawn = np.array(draw(log(Q).repeat(2 * COUNT, 1), spans)[0]).reshape(COUNT, 2)
    else:
        drawn = np.random.default_rng(3).choice(len(Q), size=(COUNT, 2), p=Q)
    return [Draft(tuple(row), None if source == "certain" else q) for row in drawn.tolist()]


def drawn_tokens(source: str, params: dict[str, Any], verifier: Verifier) -> list[list[int]]:
    """The tokens that verification appends where the target says P, then P_NEXT, then P_LAST; one list a sequence."""
    drafts = drafts_of(source)
    spans = [LogitSpan(sequence([0], seed, **params), draft.tokens, 3) for seed, draft in enumerate(drafts)]
    logits = torch.stack([log(P), log(P_NEXT), log(P_LAST)]).repeat(COUNT, 1)
    return [verdict.tokens for verdict in verifier.verify(logits, spans, drafts)]


def p_value(tokens: list[int], expected: np.ndarray) -> float:
    observed = np.bincount(tokens, minlength=len(expected))
    some = expected > 0
    if observed[~some].any():
        return 0.0
    return float(stats.chisquare(observed[some], expected[some] / expected.sum() * len(tokens)).pvalue)


@pytest.mark.slow
@SYNC_FREE
@pytest.mark.parametrize("source", ["certain", "soft", "own"])
@pytest.mark.parametrize("params", [{}, {"top_k": 4}])
def test_rejection_keeps_the_targets_distribution(source: str, params: dict[str, Any], sync_free: bool) -> None:
    tokens = drawn_tokens(source, params, RejectionVerifier((), sync_free=sync_free))
    kept = np.argsort(-P, kind="stable")[: params.get("top_k", 8)]
    first, after = np.zeros(8), np.zeros(8)
    first[kept] = P[kept]
    kept = np.argsort(-P_NEXT, kind="stable")[: params.get("top_k", 8)]
    after[kept] = P_NEXT[kept]
    assert p_value([each[0] for each in tokens], first) > UNLIKELY
    # Behind an accepted token comes the next position's distribution, whatever was accepted: and then the bonus token.
    followed = [each for each in tokens if len(each) > 1]
    assert p_value([each[1] for each in followed], after) > UNLIKELY
    assert p_value([each[2] for each in tokens if len(each) > 2], P_LAST) > UNLIKELY
    share = np.minimum(first / first.sum(), Q).sum() if source != "certain" else (first / first.sum() * Q).sum()
    assert stats.binomtest(len(followed), COUNT, share).pvalue > UNLIKELY, "acceptance rate"


def whole(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return p


def absolute(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p - q).abs()


def unreduced(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.where(p > q, p, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "source"),
    # `unreduced` is right for a certain draft, whose token is all that is taken out.
    [
        (whole, "certain"),
        (absolute, "certain"),
        (whole, "soft"),
        (absolute, "soft"),
        (unreduced, "soft"),
        (whole, "own"),
    ],
)
def test_a_wrong_residual_would_be_noticed(wrong: Any, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "residual", wrong)
    tokens = drawn_tokens(source, {}, RejectionVerifier(()))
    assert p_value([each[0] for each in tokens], P) < 1e-6


def test_the_residual_of_equal_distributions_is_the_distribution() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    q = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    assert residual(p, q).tolist() == [[0.5, 0.5, 0.0], [0.5, 0.0, 0.0]]


# Verdicts


@BOTH
@SYNC_FREE
def test_logprobs_are_the_raw_models_for_those_who_ask(kind: Any, sync_free: bool) -> None:
    made = [
        sequence([4], 1, logprobs=2, temperature=0.0, logit_bias={5: 100.0}),
        sequence([4], 2),
        sequence([4, 6], 3, logprobs=0, presence_penalty=2.0, top_k=3),
    ]
    drafts = [Draft((5, 5, 0)), Draft((1, 2)), Draft((0,))]
    before = [list(each.tokens) for each in made]
    first, second, third = step(kind(EOS, sync_free=sync_free), made, drafts)
    assert first.tokens == [5, 5, 5]
    assert second.logprobs is None
    for verdict, tokens, count in ((first, before[0], 2), (third, before[2], 0)):
        assert verdict.logprobs is not None
        assert [each.token_id for each in verdict.logprobs] == verdict.tokens
        for j, each in enumerate(verdict.logprobs):
            expected = model(tokens + verdict.tokens[:j]).log_softmax(0)
            assert each.logprob == pytest.approx(expected[each.token_id].item(), abs=1e-5)
            assert [token for token, _ in each.top] == expected.argsort(descending=True)[:count].tolist()


@BOTH
@SYNC_FREE
def test_greedy_and_sampled_sequences_share_a_batch(kind: Any, sync_free: bool) -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.7},
        {"temperature": 0.0, "repetition_penalty": 1.3},
    ]
    texts = [plain_text(kind(EOS), sequence([7], i, **params), 3) for i, params in enumerate(kinds)]
    made = [sequence([7], i, **params) for i, params in enumerate(kinds)]
    for _ in range(3):
        step(kind(EOS, sync_free=sync_free), made, [NO_DRAFT] * 4)
    assert [each.tokens[1:] for each in made] == texts


def test_without_drafts_both_verifications_draw_the_same() -> None:
    for params in ({}, {"top_p": 0.8}, {"temperature": 0.0}):
        coupled, rejection = (
            plain_text(kind(EOS), sequence([7], 5, **params)) for kind in (CoupledVerifier, RejectionVerifier)
        )
        assert coupled == rejection


@BOTH
def test_nothing_to_verify(kind: Any) -> None:
    assert kind(EOS).verify(torch.empty(0, VOCAB), [], []) == []


@BOTH
def test_rows_that_do_not_fit_the_draft_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="2 rows cannot verify 2 drafted"):
        kind(EOS).verify(torch.zeros(2, VOCAB), [LogitSpan(sequence([0]), (1, 2), 2)], [Draft((1, 2))])


def test_half_precision_logits_are_taken_as_they_are() -> None:
    logits = torch.randn(3, 400).bfloat16()
    for params in ({"temperature": 0.0}, {}, {"top_p": 0.9}, {"frequency_penalty": 1.0}):
        results = []
        for each in (logits, logits.float()):
            span = LogitSpan(sequence([0], 3, logprobs=1, **params), (5, 6), 3)
            results.append(CoupledVerifier(EOS).verify(each.clone(), [span], [Draft((5, 6))]))
        assert results[0] == results[1]
        assert not math.isnan(results[0][0].logprobs[0].logprob)  # type: ignore[index]
