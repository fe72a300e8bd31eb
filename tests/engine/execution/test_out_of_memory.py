"""A step that the device's memory does not suffice for: its requests end with an error, the others do not notice.

Stands in for a GPU: the error is raised at any operation of torch that a step makes, which is where it allocates.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pilotfish.engine.core import OUT_OF_MEMORY, FinishedStep
from pilotfish.engine.llm import LLM
from pilotfish.engine.request import Request
from tests.support.texts import DRAFTERS, PARAMS, portfolio, prompts

NAMES = ("greedy", "sampled", "penalties", "schema", "stops")
DRAWN = ("auto", *DRAFTERS)


PARTS = ("draft", "run", "verify", "publish")


class Operations(TorchDispatchMode):
    """Counts the operations in the parts of steps, and has no memory left for some of them: (part, number) each."""

    part: str = ""
    """Of all instances: where the engine is."""

    def __init__(self, failing: Iterable[tuple[str, int]] = ()) -> None:
        super().__init__()
        self.failing, self.failed = set(failing), 0
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = Operations.part, self.count[Operations.part]
        self.count[Operations.part] += 1
        if place in self.failing:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return func(*args, **(kwargs or {}))


def noted(owner: Any, part: str) -> None:
    """`Operations` knows while the owner's method of this name is called."""
    method = getattr(owner, part)

    def call(*args: Any) -> Any:
        Operations.part, before = part, Operations.part
        try:
            return method(*args)
        finally:
            Operations.part = before

    setattr(owner, part, call)


@pytest.fixture(scope="module")
def llm(tiny: Callable[[str], Path], draft: Path, head: Path) -> LLM:
    made = LLM(
        str(tiny("llama")),
        drafter=portfolio(draft, head),
        kernels="torch",
        kv_cache_memory=4 << 20,
        num_threads=1,
        max_batch_tokens=48,
        adaptive_drafts=False,
        num_draft_tokens=3,
    )
    engine = made.core.engine
    owners = (engine.speculator, engine.runner, engine.verifier, engine.speculator.features)
    for owner, part in zip(owners, PARTS, strict=True):
        noted(owner, part)
    return made


def requests_of(llm: LLM, salt: bytes) -> list[Request]:
    params = [msgspec.structs.replace(PARAMS[NAMES[i % len(NAMES)]], max_tokens=12, min_tokens=0) for i in range(8)]
    made = llm.requests(prompts(8), params, speculation=[DRAWN[i % len(DRAWN)] for i in range(8)])
    return [msgspec.structs.replace(request, salt=salt) for request in made]


class Outcome:
    """What became of requests: their tokens and how they ended, in the order of `requests_of`."""

    def __init__(self, llm: LLM, seed: int, inside: AbstractContextManager[Any], salt: bytes | None = None) -> None:
        """Requests come at any time, and a step is settled while the next one runs, as on a GPU. With a new salt they
        find nothing in the prefix cache."""
        core, chance = llm.core, random.Random(seed)
        self.salt = os.urandom(8) if salt is None else salt
        requests = requests_of(llm, self.salt)
        self.tokens: dict[str, list[int]] = {request.id: [] for request in requests}
        self.ends: dict[str, list[str]] = {request.id: [] for request in requests}
        self.errors: set[str | None] = set()
        waiting, finished = list(requests), None
        while waiting or core.has_work():
            while waiting and chance.random() < 0.4:
                core.add(waiting.pop())
            finished = self._step(llm, finished, inside)
        assert finished is not None
        core.settle(finished)
        self.texts = [(self.tokens[request.id], self.ends[request.id]) for request in requests]

    def _step(self, llm: LLM, before: FinishedStep | None, inside: AbstractContextManager[Any]) -> FinishedStep:
        with inside:
            step = llm.core.launch()
            if before is not None:
                llm.core.settle(before)
            finished = llm.core.finish(step)
        for delta in finished.deltas:
            assert not self.ends[delta.request_id], "a delta behind the last one"
            self.tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                self.ends[delta.request_id].append(delta.finish_reason)
                self.errors.add(delta.error)
        return finished


def nothing_is_held(llm: LLM) -> None:
    engine = llm.core.engine
    assert engine.pool.used == 0
    for drafter in engine.speculator.model_drafters.values():
        assert drafter._pool.used == 0  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def undisturbed(llm: LLM) -> tuple[list[tuple[list[int], list[str]]], Counter[str]]:
    """The texts of a run in which memory suffices, and the operations of its parts."""
    operations = Operations()
    outcome = Outcome(llm, 0, operations)
    assert outcome.errors == {None}
    nothing_is_held(llm)
    assert set(operations.count) == set(PARTS)  # so there is none elsewhere
    return outcome.texts, operations.count


@pytest.mark.slow
@settings(max_examples=10)
@given(
    seed=st.integers(0, 100),
    places=st.lists(st.tuples(st.sampled_from(PARTS), st.floats(0, 0.9)), min_size=1, max_size=3),
)
def test_any_operation_may_run_out_of_memory(
    seed: int, places: list[tuple[str, float]], llm: LLM, undisturbed: tuple[Any, Counter[str]]
) -> None:
    wanted, count = undisturbed
    operations = Operations((part, int(place * count[part])) for part, place in places)
    disturbed = Outcome(llm, seed, operations)
    for (tokens, ends), (all_tokens, all_ends) in zip(disturbed.texts, wanted, strict=True):
        assert len(ends) == 1
        if ends == ["error"]:
            assert tokens == all_tokens[: len(tokens)]
        else:
            assert (tokens, ends) == (all_tokens, all_ends)
    assert disturbed.errors <= {None, OUT_OF_MEMORY}
    assert (OUT_OF_MEMORY in disturbed.errors) == bool(operations.failed)
    nothing_is_held(llm)
    # Nor has the prefix cache what was never computed.
    assert Outcome(llm, seed, nullcontext(), disturbed.salt).texts == wanted
    nothing_is_held(llm)


@pytest.mark.parametrize("part", PARTS)
def test_requests_beside_the_step_go_on(part: str, llm: LLM, undisturbed: tuple[Any, Counter[str]]) -> None:
    """Not every request ends: those that are waiting, or come later, get their texts."""
    operations = Operations([(part, undisturbed[1][part] // 3)])
    ends = [ends for _, ends in Outcome(llm, 0, operations).texts]
    assert operations.failed == 1
    assert ["error"] in ends
    assert [one for one in ends if one != ["error"]]
    nothing_is_held(llm)


def test_the_log_says_what_to_lower(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    Outcome(llm, 0, Operations([("run", 50)]))
    (said,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "kv_cache_share, max_batch_tokens or max_num_seqs" in said
    assert said.endswith("CUDA out of memory. Tried to allocate 2.00 GiB")
