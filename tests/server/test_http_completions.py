"""/v1/completions with OpenAI's client, on a real server with a real engine and a small model."""

from __future__ import annotations

import math
import time
from typing import Any

import openai
import pytest

from tests.support.running_server import FIXED, MODEL, PROMPT, RunningServer, tokens_of

pytestmark = pytest.mark.process


def test_a_completion_has_text_usage_and_timings(server: RunningServer, client: openai.OpenAI) -> None:
    completion = client.completions.create(**FIXED, max_tokens=12)
    assert completion.id.startswith("cmpl-")
    assert completion.object == "text_completion"
    assert completion.model == MODEL
    assert abs(completion.created - time.time()) < 60
    assert completion.system_fingerprint
    (choice,) = completion.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    usage = completion.usage
    assert usage is not None
    assert usage.prompt_tokens == len(tokens_of(server, PROMPT))
    assert (usage.completion_tokens, usage.total_tokens) == (12, usage.prompt_tokens + 12)
    timings = (completion.model_extra or {})["timings"]
    assert 0 <= timings["queue_ms"] <= timings["ttft_ms"]
    seconds = timings["decode_ms"] / 1000
    assert timings["tokens_per_second"] == pytest.approx(11 / seconds, rel=0.01)
    details = usage.completion_tokens_details
    assert details is not None
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (0, 0)  # there was no prediction


def test_a_stream_is_the_same_text_with_usage_at_its_end(client: openai.OpenAI) -> None:
    whole = client.completions.create(**FIXED, max_tokens=40)
    chunks = list(
        client.completions.create(**FIXED, max_tokens=40, stream=True, stream_options={"include_usage": True})
    )
    *texts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in texts) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in texts if chunk.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in texts)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 40
    assert (last.model_extra or {})["timings"]["ttft_ms"] > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_usage_the_last_chunk_has_timings(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(**FIXED, max_tokens=4, n=2, stream=True))
    assert [("timings" in (chunk.model_extra or {})) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(chunk.usage is None for chunk in chunks)
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}


def test_a_prompt_may_be_text_or_ids_or_several_of_either(server: RunningServer, client: openai.OpenAI) -> None:
    other = "def f(x):"
    ids, other_ids = tokens_of(server, PROMPT), tokens_of(server, other)
    asked = FIXED | {"max_tokens": 8}

    def texts(prompt: Any) -> list[str]:
        choices = client.completions.create(**asked | {"prompt": prompt}).choices
        assert [choice.index for choice in choices] == list(range(len(choices)))
        return [choice.text for choice in choices]

    alone = texts(PROMPT)
    assert texts(ids) == texts([PROMPT]) == texts([ids]) == alone
    assert texts([PROMPT, other]) == texts([ids, other_ids]) == alone + texts(other)
    both = client.completions.create(**asked | {"prompt": [PROMPT, other], "n": 2})
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [both.choices[0].text, both.choices[2].text] == texts([PROMPT, other])
    assert both.usage is not None
    assert both.usage.prompt_tokens == len(ids) + len(other_ids)
    assert both.usage.completion_tokens == 4 * 8


def test_logprobs_are_of_the_texts_tokens(client: openai.OpenAI) -> None:
    choice = client.completions.create(**FIXED, max_tokens=12, logprobs=3).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 12
    for i, (token, logprob, top) in enumerate(
        zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    ):
        assert logprob <= 0
        assert top[token] == logprob
        assert len(top) in (3, 4)
        assert sum(map(math.exp, top.values())) <= 1 + 1e-5
        if not token.startswith(("bytes:", "<|")):  # part of a character; a special token, which text leaves out
            assert choice.text.startswith(token, (logprobs.text_offset or [])[i])


def test_a_streams_logprobs_are_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(**FIXED, max_tokens=12, logprobs=2).choices[0].logprobs
    assert whole is not None
    chunks = list(client.completions.create(**FIXED, max_tokens=12, logprobs=2, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for part in parts if part for item in getattr(part, name)] == getattr(whole, name)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_alone_is_the_prompt_with_its_logprobs(
    server: RunningServer, client: openai.OpenAI, stream: bool
) -> None:
    text = PROMPT + " où 🐟"
    asked: dict[str, Any] = {"model": MODEL, "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
    if stream:
        chunks = list(client.completions.create(**asked, stream=True))
        shown = "".join(chunk.choices[0].text for chunk in chunks)
        (logprobs,) = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    else:
        completion = client.completions.create(**asked)
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 0
        shown, logprobs = completion.choices[0].text, completion.choices[0].logprobs
    assert shown == text
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == len(tokens_of(server, text))
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])


def test_echoed_ids_are_scored_as_they_were_generated(server: RunningServer, client: openai.OpenAI) -> None:
    ids = tokens_of(server, PROMPT)
    asked = FIXED | {"prompt": ids, "logit_bias": {"300": 100}}  # a bias that logprobs do not know of
    first = client.completions.create(**asked, max_tokens=1, logprobs=0, echo=True).choices[0]
    again = client.completions.create(model=MODEL, prompt=[*ids, 300], max_tokens=0, logprobs=0, echo=True).choices[0]
    assert first.text == again.text
    assert first.text.startswith(PROMPT)
    assert first.logprobs is not None
    assert again.logprobs is not None
    assert first.logprobs.tokens == again.logprobs.tokens
    assert first.logprobs.text_offset == again.logprobs.text_offset
    mine, theirs = first.logprobs.token_logprobs, again.logprobs.token_logprobs
    assert mine is not None
    assert theirs is not None
    assert len(mine) == len(ids) + 1
    assert mine[1:] == pytest.approx(theirs[1:], abs=1e-4)
    assert mine[0] is theirs[0] is None


def test_the_first_of_several_choices_is_the_one_alone_and_best_of_takes_the_likeliest(client: openai.OpenAI) -> None:
    asked = FIXED | {"max_tokens": 10, "logprobs": 0}
    alone = client.completions.create(**asked).choices[0].text
    four = client.completions.create(**asked, n=4)
    assert four.choices[0].text == alone
    assert len({choice.text for choice in four.choices}) > 1
    means = [sum(choice.logprobs.token_logprobs) / 10 for choice in four.choices]
    best = client.completions.create(**asked, n=1, best_of=4)
    assert len(best.choices) == 1
    assert best.choices[0].text == four.choices[means.index(max(means))].text
    assert best.usage is not None
    assert best.usage.completion_tokens == 40


@pytest.mark.parametrize("speculation", ["off", "ngram"])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}])
def test_a_stop_string_ends_the_text_before_it_and_never_shows(
    client: openai.OpenAI, sampling: dict[str, Any], speculation: str
) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 60} | sampling
    body = {"ignore_eos": True, "speculation": speculation}
    text = client.completions.create(**asked, extra_body=body).choices[0].text
    stop = next(text[i : i + 3] for i in range(len(text) // 2, len(text) - 3) if text[i : i + 3].isascii())
    want = text[: text.index(stop)]
    whole = client.completions.create(**asked, extra_body=body, stop=["never to be seen", stop])
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (want, "stop")
    assert whole.usage is not None
    assert whole.usage.completion_tokens < 60
    streamed = list(client.completions.create(**asked, extra_body=body, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == want
    included = body | {"include_stop_str_in_output": True}
    assert client.completions.create(**asked, extra_body=included, stop=stop).choices[0].text == want + stop
    held_off = body | {"min_tokens": whole.usage.completion_tokens}
    assert client.completions.create(**asked, extra_body=held_off, stop=stop).choices[0].text.startswith(want + stop)


def test_speculation_changes_nothing_but_the_timings(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "la la la la la la la la", "max_tokens": 60, "seed": 9}
    results = {}
    for speculation in ("off", "ngram", "auto"):
        body = {"speculation": speculation, "ignore_eos": True, "logit_bias": {"100": 8, "101": 8}}
        completion = client.completions.create(**asked, temperature=0.7, extra_body=body)
        results[speculation] = completion.choices[0].text
        timings = (completion.model_extra or {})["timings"]
        assert (timings["drafted_tokens"] > 0) == (speculation != "off")
        allowed = {"off": ("none",), "ngram": ("ngram",), "auto": ("ngram", "suffix", "suffix-memory")}
        assert timings["drafter"] in allowed[speculation]
        assert timings["accepted_tokens"] <= timings["drafted_tokens"]
        own = timings["drafters"].values()
        for field in ("drafted_tokens", "accepted_tokens"):
            assert sum(each[field] for each in own) == timings[field]
        assert all(each["mean_length"] == round(each["drafted_tokens"] / each["steps"], 3) for each in own)
    assert results["off"] == results["ngram"] == results["auto"]


def test_an_end_of_text_token_ends_a_text_and_is_not_in_it(client: openai.OpenAI) -> None:
    end = {"2": 100}  # <|im_end|>
    completion = client.completions.create(model=MODEL, prompt=PROMPT, logit_bias=end, temperature=0, logprobs=1)
    (choice,) = completion.choices
    assert (choice.text, choice.finish_reason) == ("", "stop")
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 1
    later = client.completions.create(
        model=MODEL, prompt=PROMPT, logit_bias=end, temperature=0, extra_body={"min_tokens": 3}
    )
    assert later.usage is not None
    assert (later.usage.completion_tokens, later.choices[0].finish_reason) == (4, "stop")


def test_max_tokens_is_16_by_default_and_no_more_than_the_context_has_room_for(client: openai.OpenAI) -> None:
    assert client.completions.create(**FIXED).usage.completion_tokens == 16
    long = client.completions.create(**FIXED | {"prompt": [300] * 2040}, max_tokens=10**9)
    assert long.usage is not None
    assert (long.usage.total_tokens, long.choices[0].finish_reason) == (2048, "length")


def test_a_prompt_seen_before_comes_from_the_cache(client: openai.OpenAI) -> None:
    prompt = list(range(40, 140))
    for cached in (False, True):
        usage = client.completions.create(**FIXED | {"prompt": prompt}, max_tokens=1).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert bool(usage.prompt_tokens_details.cached_tokens) == cached
    assert usage.prompt_tokens_details.cached_tokens >= 80
