"""Several passes of a drafter in one captured graph: the drafts are those of pass after pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from pilotfish import LLM
from pilotfish.engine.draft import Draft
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.buckets import buckets
from pilotfish.engine.execution.draft_steps import DraftSteps, Growing
from pilotfish.engine.execution.graphs import EagerGraphs, GraphPlan
from pilotfish.engine.layers.attention.backend import AttentionBatch
from pilotfish.engine.sampling.device_sampler import draw_keyed
from pilotfish.engine.speculation.drafters import draft_model, eagle3
from pilotfish.engine.speculation.drafters.growth import Growth, finished
from tests.engine.execution.test_graphs import Poisoned
from tests.support.texts import GREEDY, PARAMS, SAMPLED, portfolio, prompts, texts

WARM = msgspec.structs.replace(SAMPLED, temperature=0.4)


@pytest.fixture
def make(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, draft: Path, head: Path) -> Callable[..., LLM]:
    """An engine whose drafters grow without the host, as on a GPU, on the twin of captured passes."""

    class SyncFree(Growth):
        def __init__(self, eos_token_ids: Any, keep_probs: bool, sync_free: bool, *rest: Any) -> None:
            super().__init__(eos_token_ids, keep_probs, True, *rest)

    for module in (draft_model, eagle3):
        monkeypatch.setattr(module, "Growth", SyncFree)

    def build(**settings: Any) -> LLM:
        backend = Poisoned()
        monkeypatch.setattr("pilotfish.engine.assembly.graph_backend", lambda *_: lambda: backend)
        made = LLM(
            str(tiny("llama")),
            drafter=portfolio(draft, head),
            kernels="native",
            num_threads=1,
            adaptive_drafts=False,
            max_num_seqs=8,
            **{"kv_cache_memory": 4 << 20, "num_draft_tokens": 8} | settings,
        )
        return made

    return build


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> list[Draft]:
    """All drafts of models."""
    found: list[Draft] = []

    def noted(*grown: Any) -> list[Draft]:
        drafts = finished(*grown)
        found.extend(drafts)
        return drafts

    for module in (draft_model, eagle3):
        monkeypatch.setattr(module, "finished", noted)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["draft-model", "eagle3"])
def test_drafts_are_those_of_single_passes(make, monkeypatch, drafted: list[Draft], drafter: str) -> None:
    ran: list[int] = []
    run = DraftSteps.run

    def counted(steps: DraftSteps, count: int, *rest: Any) -> Any:
        grown = run(steps, count, *rest)
        assert grown is not None
        ran.append(count)
        return grown

    def generated() -> list[Draft]:
        llm = make()
        drafted.clear()
        for params, count in ((GREEDY, 1), (GREEDY, 5), (WARM, 6)):
            llm.generate(prompts(count), params, speculation=drafter)
        return list(drafted)

    monkeypatch.setattr(DraftSteps, "run", counted)
    together = generated()
    assert {2, 4} <= set(ran)
    ran.clear()
    monkeypatch.setattr(DraftSteps, "count", lambda *_: 0)
    apart = generated()
    assert not ran
    assert [draft.tokens for draft in together] == [draft.tokens for draft in apart]
    assert sum(len(draft.tokens) == 8 for draft in together) > 10
    for one, other in zip(together, apart, strict=True):
        assert one.confidences == pytest.approx(other.confidences, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["draft-model", "eagle3"])
def test_other_requests_go_pass_by_pass(make, monkeypatch, drafter: str) -> None:
    """Truncation and biases are not part of the graph."""
    ran: list[int] = []
    monkeypatch.setattr(DraftSteps, "run", lambda *_: ran.append(1))
    llm = make()
    for name in ("bias", "penalties"):
        found = texts(llm.generate(prompts(3), PARAMS[name], speculation=drafter))
        assert found == texts(llm.generate(prompts(3), PARAMS[name], speculation="off"))
    assert not ran


@pytest.mark.slow
def test_no_block_is_lost_in_little_memory(make) -> None:
    per_block = 2 * 3 * 16 * 2 * 16 * 4
    llm = make(kv_cache_memory=26 * per_block, prefix_caching=False, max_batch_tokens=16)
    wanted = texts(llm.generate(prompts(8), SAMPLED, speculation="off"))
    for drafter in ("draft-model", "eagle3"):
        assert texts(llm.generate(prompts(8), SAMPLED, speculation=drafter)) == wanted
    assert llm.core.engine.pool.used == 0


def test_a_row_whose_draft_is_long_enough_stands_still() -> None:
    """It writes to the block of padding, as padding does, and sees what it saw."""
    seen: list[tuple[list[int], ...]] = []

    def step(tokens: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, _: Any) -> Any:
        lengths = batch.context_lens, batch.cu_context_lens.diff()
        seen.append(tuple(each.tolist() for each in (tokens, positions, batch.slots, *lengths)))
        return torch.nn.functional.one_hot(tokens + 1, 100).float(), None

    cpu, padding = torch.device("cpu"), 9
    plan = GraphPlan(backend=EagerGraphs(), buckets=buckets(4, 5, 32), max_len=64, padding_block=padding, memory=0)
    steps = DraftSteps("draft", step, draw_keyed, plan, 4, 16, cpu)
    assert steps.count(3, 7) == 4
    assert steps.count(3, 3) == 2
    assert steps.count(3, 1) == steps.count(5, 4) == 0
    drafts = [
        Growing(Span([0], 14, [3, 5], 1), 4, 0, 20, 0.0),
        Growing(Span([0], 7, [2], 1), 1, 0, 9, 0.0),
        Growing(Span([0], 30, [1, 0, 4], 1), 3, 0, 33, 0.0),
    ]
    seen.clear()
    grown = steps.run(4, drafts, torch.tensor([10, 20, 30]), None)
    assert grown is not None
    assert grown.tokens.tolist() == [[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]]
    assert grown.hidden is None
    at = padding * 16
    slots = [[62, 39, 14], [63, at, 15], [80, at, 64], [81, at, at]]
    for i, (tokens, positions, written, contexts, differences) in enumerate(seen):
        assert tokens[:3] == [10 + i, 20 + i, 30 + i]
        assert positions[:3] == [14 + i, 7, 30 + min(i, 2)]
        assert written[:3] == slots[i]
        assert written[3] == at
        assert contexts == differences == [15 + i, 8, 31 + min(i, 2), 1]
