"""Answers under grammars: what they may be, that speculation does not change them, and how they end."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
import torch
from llguidance import LLTokenizer

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.answer_grammar import AnswerGrammar
from pilotfish.engine.kernels.native import load_library, mask_logits
from pilotfish.engine.llm import LLM, Completion
from pilotfish.engine.params import SamplingParams, Thinking
from pilotfish.engine.request import Request
from pilotfish.engine.sampling.restrict import unpack
from pilotfish.errors import ParameterError
from pilotfish.text.grammar import compose
from pilotfish.text.grammar.grammar import Grammar
from pilotfish.text.grammar.matcher import KEPT, Compiler, Matcher, load_vocabulary
from pilotfish.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.texts import GREEDY, OBJECT, SAMPLED, prompts, stats_of, texts
from tests.support.tiny import IM_END, VOCAB_SIZE


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Path], draft: Path) -> Iterator[LLM]:
    with LLM(
        str(tiny("llama")), drafter=("ngram", f"draft={draft}"), num_threads=1, kv_cache_memory=4 << 20, seed=1
    ) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer(llm: LLM) -> Tokenizer:
    return load_tokenizer(resolve(llm.config.model))


@pytest.fixture(scope="module")
def vocabulary(llm: LLM) -> LLTokenizer:
    return load_vocabulary(resolve(llm.config.model), VOCAB_SIZE, (IM_END,))


def matcher_of(vocabulary: LLTokenizer, grammar: Grammar) -> Matcher:
    compiler = Compiler(lambda: vocabulary)
    started = compiler.start(grammar)
    assert not isinstance(started, Matcher)
    return compiler.finish(grammar, started)


def schema_of(grammar: Grammar) -> Any:
    return json.loads(grammar.source)["grammars"][0]["json_schema"]


def answer(tokenizer: Tokenizer, completion: Completion) -> str:
    return tokenizer.decode(completion.token_ids)


@pytest.mark.parametrize("base", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_match_their_schema(llm: LLM, tokenizer: Tokenizer, base: SamplingParams) -> None:
    params = msgspec.structs.replace(base, grammar=OBJECT, max_tokens=100)
    for completion in llm.generate(prompts(8), params):
        assert completion.finish_reason == "stop"
        assert completion.stop_token == IM_END
        jsonschema.validate(json.loads(answer(tokenizer, completion)), schema_of(OBJECT))


def test_an_answer_that_is_cut_off_says_so(llm: LLM, tokenizer: Tokenizer) -> None:
    params = msgspec.structs.replace(GREEDY, grammar=OBJECT, max_tokens=5)
    (completion,) = llm.generate(prompts(1), params)
    assert completion.finish_reason == "length"
    assert answer(tokenizer, completion).startswith('{"')


def test_what_is_forced_is_drafted_and_right(llm: LLM) -> None:
    params = msgspec.structs.replace(GREEDY, grammar=OBJECT, max_tokens=100)
    plain = llm.generate(prompts(8), params, speculation="off")
    drafted = llm.generate(prompts(8), params, speculation="grammar")
    assert texts(drafted) == texts(plain)
    stats = [stats_of(completion) for completion in drafted]
    assert {one.drafter for one in stats} == {"grammar"}
    assert sum(one.accepted_tokens for one in stats) > 0.5 * sum(one.drafted_tokens for one in stats) > 0
    assert sum(one.steps for one in stats) < sum(stats_of(completion).steps for completion in plain)


@pytest.mark.parametrize("forced", ["at once", "after a choice"])
def test_a_grammar_that_forces_tens_of_thousands_of_tokens_holds_nobody_up(
    llm: LLM, vocabulary: LLTokenizer, forced: str
) -> None:
    """It goes on without drafts of them, and does not run into the limits of the grammar's compiler."""
    many = {"type": "array", "items": {"const": 1}, "minItems": 100_000}
    schema = (
        many if forced == "at once" else {"type": "array", "prefixItems": [{"enum": ["a", "b"]}, many], "minItems": 2}
    )
    grammar = compose.json_value(schema)
    matcher = matcher_of(vocabulary, grammar)
    while matcher.forced():
        matcher.advance(matcher.forced()[:1])
    if forced != "at once":
        allowed = np.unpackbits(matcher.masks((), 1).view(np.uint8), bitorder="little").nonzero()[0]
        matcher.advance(allowed[:1].tolist())
    assert matcher.forced() == []
    assert matcher.problem == ""
    params = msgspec.structs.replace(SAMPLED, grammar=grammar, max_tokens=100)
    plain, drafted = (llm.generate(prompts(2), params, speculation=way) for way in ("off", "grammar"))
    assert [completion.finish_reason for completion in drafted] == ["length", "length"]
    assert texts(drafted) == texts(plain)


def test_what_is_forced_is_looked_for_once(vocabulary: LLTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of forced tokens is drafted from step by step."""
    matcher = matcher_of(vocabulary, compose.choice(["a text that is forced to its end"]))
    answer, asked = AnswerGrammar(matcher, None, VOCAB_SIZE), list[list[int]]()
    look = matcher.forced

    def counted() -> list[int]:
        asked.append(look())
        return asked[-1]

    monkeypatch.setattr(matcher, "forced", counted)
    run = answer.forced(1000)
    assert len(run) > 8
    answer.advance(run[:3])
    assert answer.forced(2) == run[3:5]
    answer.advance(run[3:4])
    assert answer.forced(1000) == run[4:]
    assert len(asked) == 1


@pytest.mark.parametrize("conflict", ["allowed_token_ids", "bad_words", "min_tokens", "bias"])
def test_a_grammar_goes_before_what_else_is_forbidden(llm: LLM, tokenizer: Tokenizer, conflict: str) -> None:
    """Where both leave nothing, the grammar holds alone: the answer still matches, and ends."""
    grammar = compose.choice(["yes", "no"])
    others: dict[str, Any] = {
        "allowed_token_ids": (5, 6),
        "bad_words": tuple((i,) for i in range(3, VOCAB_SIZE)),
        "min_tokens": 20,
        "bias": 0,
    }
    change = {"logit_bias": dict.fromkeys(range(100), 100.0)} if conflict == "bias" else {conflict: others[conflict]}
    params = msgspec.structs.replace(SAMPLED, grammar=grammar, **change)
    for completion in llm.generate(prompts(4), params):
        assert (completion.finish_reason, answer(tokenizer, completion) in ("yes", "no")) == ("stop", True)


def test_end_of_text_may_be_ignored_while_more_may_follow(llm: LLM, tokenizer: Tokenizer) -> None:
    params = msgspec.structs.replace(SAMPLED, grammar=compose.pattern("[a-z]*"), max_tokens=12)
    for completion in llm.generate(prompts(4), params):
        assert completion.finish_reason == "length"
        assert re.fullmatch("[a-z]*", answer(tokenizer, completion))


def test_rows_under_a_grammar_are_counted(llm: LLM) -> None:
    params = msgspec.structs.replace(GREEDY, grammar=OBJECT, max_tokens=100)
    constrained, free = llm.requests(prompts(2), [params, GREEDY], speculation="off")
    for request in (constrained, free):
        llm.core.add(request)
    rows = tokens = 0
    while llm.core.has_work():
        result = llm.core.step()
        rows += result.stats.constrained_rows
        tokens += sum(len(delta.token_ids) for delta in result.deltas if delta.request_id == constrained.id)
    assert rows == tokens > 0


@pytest.mark.parametrize("speculation", ["off", "auto", "ngram", "draft", "grammar"])
def test_reasoning_is_closed_when_its_budget_is_used_up(llm: LLM, speculation: str) -> None:
    end = (61, 62, 63)
    params = msgspec.structs.replace(SAMPLED, thinking=Thinking(budget=7, end=end))
    for completion in llm.generate(prompts(4), params, speculation=speculation):
        assert tuple(completion.token_ids[7:10]) == end
        assert len(completion.token_ids) == params.max_tokens


def test_a_grammar_begins_after_reasoning(llm: LLM, tokenizer: Tokenizer) -> None:
    end = "</think>"
    grammar = compose.after_reasoning(OBJECT, end)
    thinking = Thinking(budget=12, end=tuple(tokenizer.encode(end, add_special_tokens=False)))
    params = msgspec.structs.replace(SAMPLED, grammar=grammar, thinking=thinking, max_tokens=120)
    plain = llm.generate(prompts(4), params, speculation="off")
    assert texts(llm.generate(prompts(4), params, speculation="auto")) == texts(plain)
    for completion in plain:
        thought, _, rest = answer(tokenizer, completion).partition(end)
        assert completion.finish_reason == "stop"
        assert "\ufffd" not in thought
        assert tokenizer.decode(completion.token_ids[:12]) == thought
        jsonschema.validate(json.loads(rest), schema_of(OBJECT))


def test_a_grammar_that_does_not_compile_ends_its_request_alone(llm: LLM) -> None:
    bad = msgspec.structs.replace(GREEDY, grammar=compose.lark("start: @nope"))
    wrong, right = llm.generate(prompts(2), [bad, GREEDY])
    assert wrong.finish_reason == "error"
    assert wrong.error is not None
    assert "nope" in wrong.error
    assert right.finish_reason == "length"
    assert llm.core.engine.pool.used == 0
    assert not llm.core.has_work()


def test_a_request_may_leave_while_its_grammar_is_compiled(llm: LLM) -> None:
    params = msgspec.structs.replace(GREEDY, grammar=compose.pattern("[a-z]{3,2000}x"))
    llm.core.add(Request(id="gone", prompt_ids=(5, 6, 7), params=params))
    llm.core.abort("gone")
    assert [delta.finish_reason for delta in llm.core.step().deltas] == ["abort"]
    assert not llm.core.has_work()


def test_compiling_stalls_no_other_request(llm: LLM) -> None:
    """A step goes on while a grammar is compiled; the request joins later."""
    compiler = llm.core.engine.grammars
    params = msgspec.structs.replace(GREEDY, grammar=compose.choice(["never", "compiled", "before"]))
    llm.core.add(Request(id="other", prompt_ids=(5, 6, 7), params=GREEDY))
    gate = Event()
    blocked = [compiler._threads.submit(gate.wait, 10) for _ in range(2)]
    llm.core.add(Request(id="slow", prompt_ids=(5, 6, 7), params=params))
    for _ in range(5):
        assert {delta.request_id for delta in llm.core.step().deltas} <= {"other"}
    gate.set()
    assert all(one.result() for one in blocked)
    ended = set()
    while llm.core.has_work():
        ended |= {delta.request_id for delta in llm.core.step().deltas if delta.finish_reason is not None}
    assert ended == {"other", "slow"}


def test_compiled_grammars_are_kept(vocabulary: LLTokenizer) -> None:
    compiler = Compiler(lambda: vocabulary)
    for i in range(KEPT + 1):
        grammar = compose.literal(f"answer {i}")
        started = compiler.start(grammar)
        assert not isinstance(started, Matcher)
        compiler.finish(grammar, started)
        assert isinstance(compiler.start(grammar), Matcher)
    assert not isinstance(compiler.start(compose.literal("answer 0")), Matcher)
    assert isinstance(compiler.start(compose.literal("answer 1")), Matcher)
    compiler.close()


def test_a_budget_is_checked(llm: LLM) -> None:
    for wrong in (Thinking(budget=-1, end=(1,)), Thinking(budget=1, end=())):
        with pytest.raises(ParameterError, match="thinking"):
            llm.generate(prompts(1), msgspec.structs.replace(GREEDY, thinking=wrong))


def allowed(masks: np.ndarray) -> list[set[int]]:
    bits = unpack(torch.from_numpy(np.ascontiguousarray(masks)), VOCAB_SIZE, torch.device("cpu"))
    return [set(row.nonzero().squeeze(1).tolist()) for row in bits]


@pytest.mark.parametrize("seed", range(5))
def test_masks_along_a_draft_are_those_of_its_tokens_committed(vocabulary: LLTokenizer, seed: int) -> None:
    """Whatever is drafted, planned, cut and taken back: position by position the same masks as one token at a time."""
    rng = random.Random(seed)
    end = (61, 62)
    grammar = compose.sequence(compose.text_until("a"), OBJECT)
    thinking = Thinking(budget=6, end=end) if seed % 2 else None

    def fresh() -> AnswerGrammar:
        return AnswerGrammar(matcher_of(vocabulary, grammar), thinking, VOCAB_SIZE)

    one, other = fresh(), fresh()
    for _ in range(12):
        draft: list[int] = []
        for _ in range(rng.randrange(5)):
            choices = sorted(allowed(one.masks(draft, 1))[0])
            draft.append(rng.choice(choices) if rng.random() < 0.9 else rng.randrange(VOCAB_SIZE))
        count = one.count_allowed(draft)
        draft = draft[:count]
        ahead = allowed(one.masks(draft, len(draft) + 1))
        for i, token in enumerate(draft):
            assert allowed(other.masks((), 1)) == [ahead[i]]
            assert token in ahead[i]
            if token == IM_END:
                return
            other.advance([token])
        assert allowed(other.masks((), 1)) == [ahead[-1]]
        token = rng.choice(sorted(ahead[-1]))
        if token == IM_END:
            return
        one.advance([*draft, token])
        other.advance([token])


def test_further_reasoning_counts_to_the_same_budget() -> None:
    thinking = Thinking(budget=3, begin=(50, 51), end=(52,), again=(50, 51))
    answer = AnswerGrammar(None, thinking, VOCAB_SIZE)
    answer.advance([50, 51, 1, 2, 52, 7, 50, 51])
    assert len(allowed(answer.masks((), 1))[0]) > 1
    assert allowed(answer.masks((9, 52, 50, 51), 5))[1:] == [{52}, *[set(range(VOCAB_SIZE))] * 2, {52}]
    assert answer.count_allowed((9, 8)) == 1
    answer.advance([9, 52, *[7] * 20, 50, 51])
    assert answer.forced(4) == [52]
    once = AnswerGrammar(None, msgspec.structs.replace(thinking, again=()), VOCAB_SIZE)
    once.advance([50, 51, 1, 2, 3, 52, 50, 51])
    assert once.forced(4) == []


def test_forced_tokens_are_the_only_text(vocabulary: LLTokenizer) -> None:
    matcher = matcher_of(vocabulary, compose.literal("const"))
    forced = matcher.forced()
    assert vocabulary.decode_str(forced[:-1]) == "const"
    assert forced[-1] == IM_END
    assert matcher.count_allowed(forced) == len(forced)
    assert matcher.count_allowed([*forced, 5]) == len(forced)
    assert matcher.count_allowed([IM_END]) == 0


LEVELS = range(3)


@pytest.mark.parametrize("vocab", [1, 31, 32, 101, 4096])
@pytest.mark.parametrize("level", LEVELS)
def test_masked_logits_keep_what_is_allowed_to_the_last_bit(level: int, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    words = rng.integers(-(2**31), 2**31, (5, -(-vocab // 32) + 1), dtype=np.int32)
    words[0], words[1] = 0, -1
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(1))
    masked = logits.clone()
    library = load_library()
    if library is None or level > library.pilotfish_level():
        pytest.skip(f"the processor, or the installation, has no kernels of level {level}")
    assert mask_logits(masked, torch.from_numpy(words), level)
    bits = unpack(torch.from_numpy(words), vocab, torch.device("cpu"))
    for row in range(5):
        assert [bool(int(words[row, i // 32]) >> i % 32 & 1) for i in range(vocab)] == bits[row].tolist()
    assert torch.equal(masked, logits.masked_fill(~bits, -torch.inf))
