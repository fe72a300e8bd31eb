"""engine.sampling: the noise's statistics, processors against a slow reference, draws, log-probabilities, bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation.logits_process import TopKLogitsWarper, TypicalLogitsWarper

from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.params import MAX_SEED, SamplingParams
from pilotfish.engine.request import Request, fan_out
from pilotfish.engine.sampling import device_sampler as on_device
from pilotfish.engine.sampling.logit_spans import LogitRow, LogitSpan, rows_of
from pilotfish.engine.sampling.logprobs import token_logprobs
from pilotfish.engine.sampling.noise import ACCEPT, DRAW, RESIDUAL, log_exponential, row_key, uniform
from pilotfish.engine.sampling.processors import adjust, kept_ids, kept_of_all, limits_of, process
from pilotfish.engine.sampling.sampler import argmax, choose, draw
from pilotfish.engine.sequence import Sequence
from pilotfish.errors import ParameterError

VOCAB = 13
EOS = (1, 2)
# Seeds are fixed, so a test of statistics passes or fails for good: this says how unlikely a pass has to be.
UNLIKELY = 1e-4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other in many small operations are slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sequence(prompt: list[int], answer: list[int] = [], seed: int = 0, **params: Any) -> Sequence:  # noqa: B006
    request = Request(id="r", prompt_ids=tuple(prompt), params=SamplingParams(**params).check())
    return Sequence(request, seed, BlockTable(BlockPool(4, 16)), tokens=[*prompt, *answer])


# Noise


def uniforms(keys: list[int], tokens: torch.Tensor) -> np.ndarray:
    return np.exp(-np.exp(log_exponential(keys, tokens).double().numpy()))


def pair_p_value(a: np.ndarray, b: np.ndarray, bins: int = 16) -> float:
    """That a and b are uniform on [0, 1) and independent."""
    counts = np.histogram2d(a.ravel(), b.ravel(), bins=bins, range=((0, 1), (0, 1)))[0]
    return float(stats.chisquare(counts.ravel()).pvalue)


def test_noise_is_uniform_in_every_part_of_its_range() -> None:
    tokens = torch.arange(49152).unsqueeze(0)
    u = uniforms([row_key(11, position) for position in range(64)], tokens)
    assert stats.chisquare(np.histogram(u, bins=1024, range=(0, 1))[0]).pvalue > UNLIKELY
    # An unlikely token wins by a small E alone, so that end has to be right down to small probabilities.
    exponential = -np.log(u)
    for power in range(1, 18):
        expected = u.size * -math.expm1(-(2.0**-power))
        below = int((exponential < 2.0**-power).sum())
        assert 2 * stats.poisson.sf(abs(below - expected) + expected, expected) > UNLIKELY, power


def test_noise_of_neighbours_is_independent() -> None:
    tokens = torch.arange(4096).unsqueeze(0)
    by_place = uniforms([row_key(5, position) for position in range(256)], tokens)
    by_seed = uniforms([row_key(seed, 100) for seed in range(-128, 128)], tokens)
    base = Request(id="r", prompt_ids=(0,), params=SamplingParams())
    answers = [request.params.seed or 0 for request in fan_out(base, 256, seed=77)]
    by_answer = uniforms([row_key(seed, 3) for seed in answers], tokens)
    for lag in (1, 2, 3, 16, 128):
        assert pair_p_value(by_place[:, :-lag], by_place[:, lag:]) > UNLIKELY, f"tokens {lag} apart"
        assert pair_p_value(by_place[:-lag], by_place[lag:]) > UNLIKELY, f"positions {lag} apart"
        assert pair_p_value(by_seed[:-lag], by_seed[lag:]) > UNLIKELY, f"seeds {lag} apart"
        assert pair_p_value(by_answer[:-lag], by_answer[lag:]) > UNLIKELY, f"answers {lag} apart"
        # a token's noise against the next token's at the next position, as a counter that ran on would have them
        assert pair_p_value(by_place[:-1, lag:], by_place[1:, :-lag]) > UNLIKELY, f"diagonal {lag}"
    assert pair_p_value(by_place, by_seed) > UNLIKELY


def test_streams_are_independent() -> None:
    tokens = torch.arange(4096).unsqueeze(0)
    noise = [uniforms([row_key(5, p, stream) for p in range(128)], tokens) for stream in (DRAW, ACCEPT, RESIDUAL)]
    scalar = np.array([uniform(row_key(5, position, ACCEPT)) for position in range(200_000)])
    assert stats.chisquare(np.histogram(scalar, bins=256, range=(0, 1))[0]).pvalue > UNLIKELY
    assert pair_p_value(scalar[:-1], scalar[1:]) > UNLIKELY
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert pair_p_value(noise[a], noise[b]) > UNLIKELY
        assert pair_p_value(noise[a][:-1], noise[b][1:]) > UNLIKELY
    for each in noise:
        assert pair_p_value(np.broadcast_to(scalar[:128, None], each.shape)[:, :1], each[:, :1], bins=3) > UNLIKELY


def test_the_race_is_won_as_often_as_the_weights_say() -> None:
    """Over all of a large vocabulary, where the winner is the extreme of many: the noise's joint quality."""
    weights = 1.0 / np.arange(1, 49153) ** 0.7
    probabilities = weights / weights.sum()
    logits = torch.from_numpy(np.log(weights)).float()
    keys = [row_key(1, position) for position in range(2000)]
    tokens = torch.arange(49152, dtype=torch.int32).unsqueeze(0)
    winners = [argmax(logits - log_exponential([key], tokens))[0] for key in keys]
    edges = np.searchsorted(probabilities.cumsum(), np.linspace(0, 1, 41)[1:-1])
    observed = np.bincount(np.searchsorted(edges, winners, side="right"), minlength=40)
    expected = np.add.reduceat(probabilities, [0, *edges]) * len(keys)
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > UNLIKELY


@given(st.lists(st.integers(-MAX_SEED - 1, MAX_SEED), min_size=1, max_size=9), st.integers(0, 10**6), st.data())
@settings(max_examples=30)
def test_noise_depends_on_seed_place_and_token_alone(seeds: list[int], position: int, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([3, 257, 5000]))
    keys = [row_key(seed, position) for seed in seeds]
    every = log_exponential(keys, torch.arange(vocab, dtype=torch.int32).unsqueeze(0))
    assert torch.isfinite(every).all()
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=50)))
    assert torch.equal(log_exponential(keys, chosen.expand(len(keys), -1)), every[:, chosen])
    for i, key in enumerate(keys):
        assert torch.equal(log_exponential([key], chosen.unsqueeze(0))[0], every[i, chosen])


def test_noise_never_changes() -> None:
    """A text that a seed made can be made again: known values, and the mix written out in unbounded integers."""
    key = row_key(1234, 5)
    assert key == 0x4AA6CF17925386C
    assert row_key(-1, 0, RESIDUAL) == row_key(2**64 - 1, 0, RESIDUAL) == 0x2934CF4174E9543C
    assert uniform(row_key(1234, 5, ACCEPT)) == 0.38788751636129737
    for token in (0, 1, 300, 49151, 262143):
        x = token ^ key & 0xFFFFFFFF
        x = x * 0xED5AD4BB % 2**32
        x = ((x ^ x >> 11) + (key >> 32)) * 0xAC4C1B51 % 2**32
        x = (x ^ x >> 15) * 0x31848BAB % 2**32
        sign = x >> 31
        bits = (x ^ x >> 14 ^ sign * 0xFFFC0000) & 0x7FFFFFFF
        expected = math.log(-math.log1p(-(bits + 0.5) / 2**31))
        assert log_exponential([key], torch.tensor([[token]])).item() == pytest.approx(expected, abs=1e-6)


# Processors


class BorderlineError(Exception):
    """The reference's float64 and the engine's float32 might disagree on what is kept."""


def ends_with(text: list[int], end: tuple[int, ...]) -> bool:
    return not end or tuple(text[-len(end) :]) == end


def reference(
    logits: list[float], prompt: list[int], answer: list[int], params: SamplingParams, eos: tuple[int, ...] = EOS
) -> list[float]:
    """Log-probabilities of one row (-inf: not drawn), step by step as documented; logits as they are if greedy."""
    row = list(logits)
    for token, bias in params.logit_bias.items():
        row[token] += bias
    for token in set(prompt + answer):
        factor = params.repetition_penalty
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
    for token in set(answer):
        row[token] -= params.presence_penalty + params.frequency_penalty * answer.count(token)
    if params.allowed_token_ids is not None:
        row = [logit if i in params.allowed_token_ids else -math.inf for i, logit in enumerate(row)]
    banned = {word[-1] for word in params.bad_words if ends_with(answer, word[:-1])}
    if len(answer) < params.min_tokens:
        banned |= {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    if not banned.issuperset(params.allowed_token_ids or [-1]):
        row = [-math.inf if i in banned else logit for i, logit in enumerate(row)]
    if params.greedy:
        return row
    highest = max(row)
    weights = [math.exp(max((x - highest) / params.temperature, -1e4)) for x in row]
    order = sorted((i for i in range(len(row)) if row[i] > -math.inf), key=lambda i: (-row[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        total, mass, kept = sum(weights[i] for i in order), 0.0, []
        for i in order:
            kept.append(i)
            mass += weights[i] / total
            if abs(mass - params.top_p) < 1e-5:
                raise BorderlineError
            if mass >= params.top_p:
                break
        order = kept
    if params.min_p > 0:
        if any(abs(weights[i] - params.min_p) < 1e-5 for i in order[1:]):
            raise BorderlineError
        order = [i for i in order if weights[i] >= params.min_p]
    if params.typical_p < 1:
        mass = sum(weights[i] for i in order)
        surprise = {i: -math.log(weights[i] / mass) if weights[i] > 0 else math.inf for i in order}
        entropy = sum(weights[i] / mass * surprise[i] for i in order if weights[i] > 0)
        distance = {i: abs(surprise[i] - entropy) for i in order}
        by_distance, sum_, last = sorted(order, key=lambda i: distance[i]), 0.0, 0.0
        for i in by_distance:
            sum_, last = sum_ + weights[i] / mass, distance[i]
            if abs(sum_ - params.typical_p) < 1e-5:
                raise BorderlineError
            if sum_ >= params.typical_p:
                break
        if any(1e-9 < abs(distance[i] - last) < 1e-4 for i in order):
            raise BorderlineError
        order = [i for i in order if distance[i] <= last + 1e-9]
    total = sum(weights[i] for i in order)
    result = [-math.inf] * len(row)
    for i in order:
        result[i] = math.log(weights[i] / total) if weights[i] > 0 else -math.inf
    return result


TOKENS = st.integers(0, VOCAB - 1)
# Steps of a quarter make equal logits, and differences that float32 and float64 agree on.
LOGITS = st.lists(st.integers(-24, 24).map(lambda x: x / 4), min_size=VOCAB, max_size=VOCAB)
PENALTY = st.sampled_from([0.0, 0.0, 0.5, -0.75, 2.0])
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.25, 0.8, 1.0, 1.7]),
        "top_p": st.floats(0.05, 0.999),
        "top_k": st.integers(-1, VOCAB + 1),
        "min_p": st.floats(0.001, 0.9),
        "typical_p": st.floats(0.05, 0.99),
        "allowed_token_ids": st.lists(TOKENS, min_size=1, max_size=VOCAB).map(tuple),
        "bad_words": st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
        "presence_penalty": PENALTY,
        "frequency_penalty": PENALTY,
        "repetition_penalty": st.sampled_from([1.0, 1.5, 0.5]),
        "logit_bias": st.dictionaries(TOKENS, st.sampled_from([-100.0, -1.0, 0.5, 3.0]), max_size=3),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(TOKENS, max_size=2).map(tuple),
        "ignore_eos": st.booleans(),
    },
)
CASES = st.fixed_dictionaries(
    {
        "prompt": st.lists(TOKENS, min_size=1, max_size=8),
        "answer": st.lists(TOKENS, max_size=6),
        "draft": st.lists(TOKENS, max_size=4).map(tuple),
        "seed": st.integers(-MAX_SEED - 1, MAX_SEED),
        "params": PARAMS,
    }
)


def span_of(case: dict[str, Any]) -> LogitSpan:
    made = sequence(case["prompt"], case["answer"], case["seed"], **case["params"])
    return LogitSpan(made, case["draft"], len(case["draft"]) + 1)


@given(CASES, st.data())
@settings(max_examples=300)
def test_process_does_what_the_reference_does_at_every_drafted_row(case: dict[str, Any], data: st.DataObject) -> None:
    span = span_of(case)
    raw = data.draw(st.lists(LOGITS, min_size=span.rows, max_size=span.rows))
    try:
        expected = [
            reference(row, case["prompt"], case["answer"] + list(case["draft"][:r]), span.sequence.params)
            for r, row in enumerate(raw)
        ]
    except BorderlineError:
        assume(False)
    result = process(torch.tensor(raw), [span], EOS)
    if not span.sequence.params.greedy:
        if span.sequence.params.typical_p == 1.0:
            assert torch.equal(result.amax(1), torch.zeros(span.rows))
        result = result.log_softmax(1)
    expected_tensor = torch.tensor(expected)
    assert torch.equal(result == -math.inf, expected_tensor == -math.inf)
    torch.testing.assert_close(result, expected_tensor, rtol=1e-4, atol=1e-4)


@given(CASES, st.data())
@settings(max_examples=100)
def test_rows_of_a_drafted_span_equal_those_of_one_token_at_a_time(case: dict[str, Any], data: st.DataObject) -> None:
    span = span_of(case)
    logits = torch.randn(span.rows, VOCAB, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) * 3
    tokens, together = draw(logits.clone(), [span], EOS)
    for r in range(span.rows):
        answer = case["answer"] + list(case["draft"][:r])
        alone = LogitSpan(sequence(case["prompt"], answer, case["seed"], **case["params"]))
        drawn, row = draw(logits[r : r + 1].clone(), [alone], EOS)
        assert torch.equal(row[0], together[r])
        assert drawn == [tokens[r]]
        drafted = LogitSpan(span.sequence, case["draft"][:r], 1)
        assert torch.equal(process(logits[r : r + 1].clone(), [drafted], EOS), row)


@given(st.lists(CASES, min_size=2, max_size=5), st.sampled_from([VOCAB, 64, 1001, 5000]), st.integers(0, 999))
@settings(max_examples=60)
def test_a_row_is_the_same_alone_and_in_a_batch(cases: list[dict[str, Any]], vocab: int, seed: int) -> None:
    spans = [span_of(case) for case in cases]
    rows = sum(span.rows for span in spans)
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4
    torch.set_num_threads(2)  # nor must it matter how the work is split
    tokens, together = draw(logits.clone(), spans, EOS)
    torch.set_num_threads(1)
    # without writing the truncated logits out, as the verifier does
    assert choose(adjust(logits.clone(), spans, EOS), rows_of(spans)) == tokens
    start = 0
    for span in spans:
        part = slice(start, start + span.rows)
        drawn, alone = draw(logits[part].clone(), [span], EOS)
        assert torch.equal(alone, together[part])
        assert torch.equal(process(logits[part].clone(), [span], EOS), alone)
        assert drawn == tokens[part]
        start += span.rows


@given(
    st.floats(0.05, 6.0),
    st.integers(0, 999),
    st.floats(0.01, 0.9999) | st.sampled_from([0.0, 1.0]),
    st.sampled_from([0, 1, 3, 50, 77, 78, 400, 4999, 5000]),
    st.sampled_from([0.0, 0.001, 0.2]),
    st.booleans(),
    st.sampled_from([1.0, 0.2, 0.95]),
)
@settings(max_examples=120)
def test_truncation_without_sorting_all_keeps_what_sorting_all_keeps(
    scale: float, seed: int, top_p: float, top_k: int, min_p: float, equals: bool, typical_p: float
) -> None:
    """From logits so flat that everything is kept to so peaked that one token is; 78 blocks in 5000 tokens."""
    params = SamplingParams(top_p=top_p, top_k=top_k, min_p=min_p, typical_p=typical_p)
    scaled = torch.randn(1, 5000, generator=torch.Generator().manual_seed(seed)) * scale
    if equals:
        scaled = scaled.round()
    scaled -= scaled.amax()
    total = scaled.double().exp().sum().item()
    kept = kept_ids(scaled[0], total, params)
    limits = torch.from_numpy(limits_of([params]))
    masked = kept_of_all(scaled.clone(), torch.tensor([[total]], dtype=torch.float64), limits, typical_p < 1.0)
    assert kept.tolist() == (masked[0] > -math.inf).nonzero().squeeze(1).tolist()
    assert len(kept) >= 1
    assert len(kept) <= (top_k or 5000)


@given(st.integers(0, 999), st.floats(0.05, 5.0), st.floats(0.01, 0.99), st.sampled_from([0, 5, 40]))
@settings(max_examples=60)
def test_typical_p_keeps_what_transformers_keeps(seed: int, scale: float, share: float, top_k: int) -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float() * scale
    scores = logits.double()
    if top_k:
        scores = TopKLogitsWarper(top_k)(torch.empty(3, 0), scores)
    wanted = TypicalLogitsWarper(share)(torch.empty(3, 0), scores) > -math.inf
    spans = [LogitSpan(sequence([0], typical_p=share, top_k=top_k)) for _ in range(3)]
    assert torch.equal(process(logits.clone(), spans) > -math.inf, wanted)


def test_top_p_of_zero_keeps_the_likeliest() -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1))
    kept = process(logits.clone(), [LogitSpan(sequence([0], top_p=0.0)) for _ in range(4)])
    assert torch.equal(kept > -math.inf, torch.nn.functional.one_hot(logits.argmax(1), 1000).bool())


def test_a_bad_word_is_never_completed_in_the_answer_but_may_be_begun_in_the_prompt() -> None:
    """The prompt ends with 3, 4; the answer is 3, 4 and a draft that goes on with 5."""
    words = ((1,), (3, 4, 6), (4, 5, 7), (4, 2))
    span = LogitSpan(sequence([3, 4], [3, 4], temperature=0.0, bad_words=words), (5,), 2)
    banned = adjust(torch.zeros(2, VOCAB), [span]) == -math.inf
    assert [row.nonzero().squeeze(1).tolist() for row in banned] == [[1, 2, 6], [1, 7]]
    first = adjust(torch.zeros(1, VOCAB), [LogitSpan(sequence([3, 4], bad_words=words))]) == -math.inf
    assert first[0].nonzero().squeeze(1).tolist() == [1]


def test_where_nothing_would_be_left_the_allowed_tokens_hold() -> None:
    made = sequence([0], [4], temperature=0.0, allowed_token_ids=(4, 5), bad_words=((4, 4), (4, 5)), min_tokens=3)
    kept = adjust(torch.zeros(2, VOCAB), [LogitSpan(made, (5,), 2)], (4,)) > -math.inf
    assert [row.nonzero().squeeze(1).tolist() for row in kept] == [[4, 5], [5]]


def test_equal_tokens_are_kept_by_lowest_id() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    for params in ({"top_k": 3}, {"top_k": 4, "top_p": 0.6}, {"top_p": 0.5}):
        kept = process(logits.clone(), [LogitSpan(sequence([0], **params))])
        assert (kept[0] > -math.inf).nonzero().squeeze(1).tolist() == [1, 2, 4]


def test_greedy_without_adjustments_returns_the_very_logits() -> None:
    spans = [LogitSpan(sequence([1, 2], [3], temperature=0.0, min_tokens=1, top_p=0.5, seed=3), (4, 5), 3)]
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(3, VOCAB).to(dtype)
        before = logits.clone()
        assert process(logits, spans, EOS) is logits
        assert torch.equal(logits, before)
        assert draw(logits, spans)[0] == before.argmax(1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_draws_the_likeliest(temperature: float) -> None:
    logits = torch.randn(50, 1000) * 1e4
    for params in ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}):
        span = LogitSpan(sequence([0], temperature=temperature, **params), (0,) * 49, 50)
        processed = process(logits.clone(), [span])
        assert not processed.isnan().any()
        assert draw(logits.clone(), [span])[0] == logits.argmax(1).tolist()


def test_extreme_penalties_neither_overflow_nor_draw_what_is_forbidden() -> None:
    for repetition in (1e-300, 1e300):
        made = sequence([1, 5, 6], [1], repetition_penalty=repetition, min_tokens=9, max_tokens=9, logit_bias={1: 100})
        processed = process(torch.randn(3, VOCAB), [LogitSpan(made, (5, 6), 3)], EOS)
        assert not processed.isnan().any()
        assert (processed[:, EOS] == -math.inf).all()


def test_a_row_of_nan_harms_no_other() -> None:
    spans = [LogitSpan(sequence([0], seed=i, top_p=0.9, top_k=k)) for i, k in enumerate((0, 3, 0))]
    logits = torch.randn(3, 200)
    alone = draw(logits[2:].clone(), spans[2:])[0]
    logits[:2] = math.nan
    assert choose(logits, rows_of(spans))[2:] == alone
    assert draw(logits, spans)[0][2:] == alone


# Draws


@pytest.mark.slow
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"top_p": 0.8},
        {"top_k": 4, "temperature": 1.5},
        {"min_p": 0.2},
        {"typical_p": 0.7},
        {"logit_bias": {3: 2}},
    ],
)
def test_draws_at_successive_places_have_the_processed_distribution(params: dict[str, Any]) -> None:
    count = 20_000
    row = np.random.default_rng(8).normal(size=VOCAB) * 1.5
    expected = np.exp(reference(row.tolist(), [0], [], SamplingParams(**params), eos=()))
    span = LogitSpan(sequence([0], seed=42, **params), (0,) * (count - 1), count)
    logits = torch.from_numpy(row).float().repeat(count, 1)
    tokens = np.array(draw(logits, [span])[0])
    observed = np.bincount(tokens, minlength=VOCAB)
    assert not observed[expected == 0].any()
    some = expected > 0
    assert stats.chisquare(observed[some], expected[some] * count).pvalue > UNLIKELY
    first, second = tokens[:-1], tokens[1:]
    table = np.histogram2d(first, second, bins=(np.arange(VOCAB + 1) - 0.5,) * 2)[0][some][:, some]
    assert stats.chi2_contingency(table).pvalue > UNLIKELY, "neighbouring positions"


def test_the_likeliest_of_equals_is_the_lowest_id() -> None:
    span = LogitSpan(sequence([0], temperature=0.0), (0, 0), 3)
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
    assert draw(logits, [span])[0] == [1, 0, 2]
    assert draw(logits.bfloat16(), [span])[0] == [1, 0, 2]


def test_no_spans_draw_nothing() -> None:
    assert draw(torch.empty(0, VOCAB), [])[0] == []


# Log-probabilities


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(5, 40)
    expected = torch.log_softmax(logits.double(), 1)
    tokens = [3, 0, 39, 7, 7]
    found = token_logprobs(logits, tokens, [0, 1, 5, 20, 2])
    assert [each.token_id for each in found] == tokens
    for row, each, count in zip(expected, found, [0, 1, 5, 20, 2], strict=True):
        assert each.logprob == pytest.approx(row[each.token_id].item(), abs=1e-5)
        likeliest = row.argsort(descending=True)[:count].tolist()
        assert [token for token, _ in each.top] == likeliest
        assert [value for _, value in each.top] == pytest.approx(row[likeliest].tolist(), abs=1e-5)
    assert token_logprobs(logits, tokens, 3) == token_logprobs(logits, tokens, [3] * 5)
    assert token_logprobs(logits[:1], [3], 0)[0] == found[0]
    assert token_logprobs(logits[:0], [], 5) == []
    assert len(token_logprobs(logits[:, :4], [0, 1, 2, 3, 0], 20)[0].top) == 4


# Parameters


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", [0.0, 2.0], [-0.1, 2.1, math.nan, math.inf]),
        ("top_p", [0.0, 1.0], [1.1, -1.0, math.nan]),
        ("typical_p", [1e-9, 1.0], [0.0, 1.1, -1.0, math.nan]),
        ("top_k", [-1, 0, 10**9], [-2]),
        ("min_p", [0.0, 1.0], [-0.1, 1.1, math.nan]),
        ("presence_penalty", [-2.0, 2.0], [-2.1, 2.1, math.nan]),
        ("frequency_penalty", [-2.0, 2.0], [-2.1, 2.1, math.nan]),
        ("repetition_penalty", [0.1, 5.0], [0.0, -1.0, math.inf, math.nan]),
        ("min_tokens", [0, 16], [-1, 17]),
        ("max_tokens", [1, 10**9], [0, -5]),
        ("logprobs", [None, 0, 20], [-1, 21]),
        ("prompt_logprobs", [None, 0, 20], [-1, 21]),
        ("seed", [None, -MAX_SEED - 1, MAX_SEED], [-MAX_SEED - 2, MAX_SEED + 1]),
        ("logit_bias", [{}, {5: -100.0, 6: 100.0}], [{5: 100.5}, {5: -101.0}, {5: math.nan}]),
    ],
)
def test_a_bound_error_names_the_parameter_its_value_and_the_bounds(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        SamplingParams(**{name: value}).check()
    for value in bad:
        with pytest.raises(ParameterError, match=name) as caught:
            SamplingParams(**{name: value}).check()
        assert caught.value.param == name
        shown = value if not isinstance(value, dict) else value[5]
        assert str(shown) in caught.value.message
        assert "must" in caught.value.message


@given(st.integers(0, 2**31), st.integers(1, 6), st.booleans())
@settings(max_examples=60)
def test_drawing_without_a_look_is_drawing(seed: int, count: int, all_greedy: bool) -> None:
    """What a GPU does, here on the CPU, whose truncation is another one."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(count + 2, 300, generator=generator)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.6, "top_k": 7},
        {"temperature": 1.1, "typical_p": 0.6},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ]
    picks = torch.randint(len(kinds), (count,), generator=generator).tolist()
    positions = torch.randperm(count + 2, generator=generator).tolist()[:count]
    rows = [
        LogitRow(at, sequence([1, 2], seed=seed % 97, **kinds[0 if all_greedy else pick]), 5 + at)
        for at, pick in zip(positions, picks, strict=True)
    ]
    tokens, chances = on_device.draw(logits, rows, chances=True)
    assert tokens.tolist() == choose(logits, rows)
    for row, token, chance in zip(rows, tokens.tolist(), chances.tolist(), strict=True):
        alone = process(logits[row.at : row.at + 1].clone(), [LogitSpan(row.sequence)])
        assert chance == pytest.approx(torch.softmax(alone, 1)[0, token].item(), rel=1e-4)
