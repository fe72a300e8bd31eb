"""What a step takes is measured before the KV cache is sized. The measuring itself needs a GPU; here it is a number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.engine import assembly, step_memory
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.loader import load_model
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.llm import LLM
from pilotfish.engine.sampling import sampler
from pilotfish.engine.sampling.logit_spans import LogitRow
from pilotfish.errors import ConfigError
from tests.support.texts import PARAMS, prompts

MEASURED = 300 << 20


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_the_largest_steps_are_tried(
    kind: str, verification: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(
        model=str(tiny(kind)),
        block_size=16,
        max_num_seqs=5,
        max_batch_tokens=70,
        max_model_len=32,
        num_draft_tokens=3,
        verification=verification,  # type: ignore[arg-type]
    )
    model, platform, _ = load_model(config.model, None, config, 0, lambda what, share: None)
    tried: list[tuple[int, int]] = []
    run = ModelRunner.run

    def watched(self: ModelRunner, spans: list[Any], *rest: Any) -> torch.Tensor:
        assert all(len(span.token_ids) <= config.max_model_len for span in spans)
        logits = run(self, spans, *rest)
        tried.append((sum(len(span.token_ids) for span in spans), len(logits)))
        return logits

    monkeypatch.setattr(ModelRunner, "run", watched)
    step_memory.try_steps(model, [model], platform, config)
    assert tried == [(70, 3), (70, 3), (20, 20)]


def blocks(model: Path, **settings: Any) -> int:
    with LLM(str(model), kv_cache_share=0.5, **settings) as llm:
        return llm.info.num_blocks


def test_what_a_step_takes_is_left_free(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "free_memory", lambda device: 2 * MEASURED)
    without = blocks(tiny_llama)
    monkeypatch.setattr(step_memory, "peak_memory", lambda device, work: (work(), MEASURED)[1])
    assert blocks(tiny_llama) == without // 2
    monkeypatch.setattr(step_memory, "peak_memory", lambda device, work: 3 * MEASURED)
    with pytest.raises(ConfigError, match="raise kv_cache_memory or lower block_size"):
        blocks(tiny_llama)


def test_a_step_that_does_not_fit_is_an_error(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(device: torch.device, work: Callable[[], object]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(step_memory, "peak_memory", none_left)
    said = r"128 rows and 32 sequences does not fit .* lower max_batch_tokens or max_num_seqs \(CUDA out of memory"
    with pytest.raises(ConfigError, match=said):
        blocks(tiny_llama, max_batch_tokens=128, max_num_seqs=32)


@pytest.fixture(scope="module")
def sequences(tiny: Callable[[str], Path]) -> list[Any]:
    with LLM(str(tiny("llama")), kv_cache_memory=1 << 20) as llm:
        names = ("sampled", "greedy", "hot", "bias")
        for request in llm.requests(prompts(4), [PARAMS[name] for name in names]):
            llm.core.add(request)
        return list(llm.core._sequences.values())


class OnGpu(torch.Tensor):
    """Logits that say that they are not on the CPU."""

    @property
    def device(self) -> Any:  # type: ignore[override]
        return torch.device("meta")


@given(count=st.integers(1, 40), most=st.integers(1, 12), which=st.lists(st.integers(0, 3), min_size=40, max_size=40))
def test_tokens_drawn_in_parts_are_those_drawn_at_once(
    count: int, most: int, which: list[int], sequences: list[Any]
) -> None:
    vocab = 64
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(count))
    rows = [LogitRow(i, sequences[which[i]], 20 + i) for i in range(count)]
    parts: list[int] = []

    def draw(adjusted: torch.Tensor, rows: list[LogitRow]) -> tuple[torch.Tensor, None]:
        parts.append(len(rows))
        plain = adjusted.as_subclass(torch.Tensor)
        return torch.tensor(sampler._draw(plain, rows)[0]), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_DRAWN", most * vocab)
        patch.setattr(sampler.device_sampler, "draw", draw)
        found = sampler.choose(logits.as_subclass(OnGpu), rows)
    assert found == sampler._draw(logits, rows)[0]
    assert sum(parts) == count
    if any(not row.sequence.params.greedy for row in rows):
        assert max(parts) <= most
