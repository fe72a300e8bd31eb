"""LLM with texts and conversations: the same tokens as with ids, decoded, cut at stop strings, streamed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pilotfish import LLM, SamplingParams
from pilotfish.engine.request import Delta
from pilotfish.errors import ParameterError
from tests.support.paths import ROOT

PARAMS = SamplingParams(seed=5, max_tokens=24, ignore_eos=True)
PROMPTS = ["The sea was calm", "and the light on the water"]


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama), kv_cache_memory=4 << 20, num_threads=1) as made:
        yield made


def test_texts_are_the_same_as_their_ids(llm: LLM) -> None:
    by_text = llm.generate(PROMPTS, PARAMS)
    by_ids = llm.generate([llm.tokenizer.encode(prompt) for prompt in PROMPTS], PARAMS)
    assert [each.token_ids for each in by_text] == [each.token_ids for each in by_ids]
    assert [each.text for each in by_text] == [llm.tokenizer.decode(each.token_ids) for each in by_text]
    assert [each.outputs[0].text for each in by_text] == [each.text for each in by_ids]
    assert [each.prompt for each in by_text] == PROMPTS
    assert {each.prompt for each in by_ids} == {None}


def test_one_prompt_needs_no_list(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[0])
    (text,), (one,) = llm.generate(PROMPTS[0], PARAMS), llm.generate(ids, PARAMS)
    assert text.token_ids == one.token_ids
    assert llm.generate([], PARAMS) == []


def test_a_stop_string_ends_the_answer_it_is_in_and_no_other(llm: LLM) -> None:
    whole = llm.generate(PROMPTS, PARAMS, n=2)
    stop = whole[1].text[4:7]
    for full, cut in zip(whole, llm.generate(PROMPTS, PARAMS, n=2, stop=stop), strict=True):
        assert cut.text == full.text.partition(stop)[0]
        assert cut.finish_reason == ("stop" if stop in full.text else "length")
        assert cut.token_ids == full.token_ids[: len(cut.token_ids)]
    assert not llm.core.has_work()


@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_a_stream_is_the_same_text_token_by_token(llm: LLM, speculation: str) -> None:
    (whole,) = llm.generate(PROMPTS[0], PARAMS)
    tokens = list(llm.stream(PROMPTS[0], PARAMS, speculation=speculation))
    assert [token.token_id for token in tokens] == whole.token_ids
    assert "".join(token.text for token in tokens) == whole.text
    assert [token.finish_reason for token in tokens] == [None] * 23 + ["length"]
    assert {token.drafter for token in tokens} <= {None, speculation}
    stop = whole.text[4:7]
    assert "".join(token.text for token in llm.stream(PROMPTS[0], PARAMS, stop=stop)) == whole.text.partition(stop)[0]
    assert not llm.core.has_work()


def test_deltas_have_the_tokens_that_were_rejected(tiny_llama: Path) -> None:
    """Those after the accepted ones, of which the first is not what the target drew."""
    rejected = 0
    with LLM(str(tiny_llama), kv_cache_memory=4 << 20, num_threads=1, adaptive_drafts=False) as llm:
        params = SamplingParams(seed=5, max_tokens=200, temperature=0.7, ignore_eos=True)
        for delta in llm.stream(llm.requests([[5, 6, 7] * 8], params, speculation="ngram")):
            assert len(delta.rejected) == delta.drafted - delta.accepted
            if delta.rejected:
                assert delta.rejected[0] != delta.token_ids[delta.accepted]
                rejected += len(delta.rejected)
    assert rejected > 10


def test_requests_are_streamed_as_deltas(llm: LLM) -> None:
    deltas = list(llm.stream(llm.requests([[5, 6, 7]], PARAMS)))
    assert all(isinstance(delta, Delta) for delta in deltas)


def test_a_conversation_is_rendered_by_the_template_and_what_it_says_stays_text(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    (answer,) = llm.chat(messages, PARAMS)
    (again, other) = llm.chat([messages, [{"role": "user", "content": "Hi"}]], PARAMS)
    assert answer.token_ids == again.token_ids
    special = llm.tokenizer.special_ids
    ends = [sum(id_ in special for id_ in each.prompt_ids) for each in (answer, other)]
    assert "<|im_end|>" in {llm.tokenizer.token(id_) for id_ in special}
    assert ends[0] == ends[1]
    assert "".join(token.text for token in llm.stream(messages, PARAMS)) == answer.text


def test_an_answer_keeps_to_a_grammar(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    (answer,) = llm.generate(
        PROMPTS[0], SamplingParams(seed=1, max_tokens=64, grammar=llm.grammar("json_schema", schema))
    )
    assert json.loads(answer.text)["a"] in (True, False)
    (chosen,) = llm.generate(
        PROMPTS[0], SamplingParams(seed=1, max_tokens=64, grammar=llm.grammar("choice", ["yes", "no"]))
    )
    assert chosen.text in ("yes", "no")


def test_the_engine_alone_has_no_texts(llm: LLM) -> None:
    completion = super(LLM, llm).generate([[5, 6]], PARAMS)[0]
    with pytest.raises(ParameterError, match="token ids only"):
        _ = completion.text


PAGE = (ROOT / "docs" / "library.md").read_text()


@pytest.mark.process
@pytest.mark.parametrize("program", re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE), ids=range(3))
def test_the_programs_of_the_page_run(program: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "smollm2-135m" in program
    program = program.replace('"smollm2-135m"', f"{str(tiny_llama)!r}, kv_cache_memory=4 << 20")
    exec(compile(program, "library.md", "exec"), {})
    assert capsys.readouterr().out.strip()
