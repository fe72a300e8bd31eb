"""The KV cache in less than float32 on the CPU: the same text with and without speculation, in each form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.loader import load_model
from pilotfish.engine.execution.platform import Platform
from pilotfish.engine.llm import LLM
from pilotfish.engine.memory import kv_cache
from pilotfish.errors import ConfigError
from tests.support.native import needs_native
from tests.support.parity import in_pieces, runner_of
from tests.support.texts import PARAMS, SAMPLED, portfolio, prompts, stats_of, texts

pytestmark = needs_native

FORMS = ("bfloat16", "int8")
MIXED = ("off", "ngram", "eagle3", "draft-model", "suffix", "auto", "ngram", "draft-model")


@pytest.fixture(scope="module", params=FORMS)
def make(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Callable[..., LLM]:
    def build(**settings: object) -> LLM:
        defaults: dict[str, Any] = {
            "model": str(tiny("llama")),
            "kernels": "native",
            "kv_cache_dtype": request.param,
            "kv_cache_memory": 4 << 20,
            "num_threads": 1,
        }
        return LLM(**{**defaults, **settings})

    return build


@pytest.fixture(scope="module")
def vanilla(make: Callable[..., LLM]) -> dict[str, list[tuple[list[int], str | None]]]:
    """Each prompt alone, without speculation."""
    llm = make(speculation="none", prefix_caching=False)
    names = ("greedy", "sampled")
    return {name: [texts(llm.generate([prompt], PARAMS[name]))[0] for prompt in prompts(8)] for name in names}


@pytest.fixture(scope="module")
def speculative(make: Callable[..., LLM], draft: Path, head: Path) -> LLM:
    return make(drafter=portfolio(draft, head), adaptive_drafts=False, num_draft_tokens=5)


@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_drafters_batches_and_prefix_hits(name: str, speculative: LLM, vanilla: dict) -> None:
    for hits in (False, True):
        got = speculative.generate(prompts(8), PARAMS[name], speculation=MIXED)
        assert texts(got) == vanilla[name]
        assert sum(stats_of(completion).accepted_tokens for completion in got) > 0
        assert not hits or sum(stats_of(completion).cached_prompt_tokens for completion in got) > 0


def test_verified_rows_are_decoded_rows(speculative: LLM) -> None:
    params = msgspec.structs.replace(SAMPLED, logprobs=3)
    alone = [speculative.generate([prompt], params, speculation="off")[0] for prompt in prompts(8)]
    together = speculative.generate(prompts(8), params, speculation="ngram")
    assert [one.logprobs for one in together] == [one.logprobs for one in alone]


def test_preemption_and_chunks(make: Callable[..., LLM], draft: Path, head: Path, vanilla: dict) -> None:
    """A pool that cannot hold half of the batch, and prompts in pieces of 9 rows."""
    info = make(drafter=portfolio(draft, head)).info
    block = (4 << 20) // info.num_blocks
    llm = make(
        drafter=portfolio(draft, head),
        kv_cache_memory=12 * block,
        prefix_caching=False,
        max_batch_tokens=9,
        max_num_seqs=8,
    )
    for name in ("greedy", "sampled"):
        got = llm.generate(prompts(8), PARAMS[name], speculation=MIXED)
        assert texts(got) == vanilla[name]
        assert sum(stats_of(completion).preemptions for completion in got) > 0
    assert llm.core.engine.pool.available == llm.info.num_blocks


def test_memory_is_counted_as_it_is_taken(make: Callable[..., LLM], tiny: Callable[[str], Path]) -> None:
    """The bytes of a block, which decide how many there are, are those of the tensors."""
    llm = make(speculation="none")
    runner = llm.core.engine.runner
    caches: list[Any] = runner._caches
    taken = sum(part.nbytes for cache in caches for part in (cache.keys, cache.values))
    form = caches[0].keys.dtype
    block = kv_cache.block_bytes(llm.core.engine.runner.model.config, llm.info.block_size, form)
    assert taken == (llm.info.num_blocks * block)
    assert (4 << 20) - block < taken <= 4 << 20


@pytest.mark.parametrize(("form", "bound"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_logits_are_close_to_those_of_float32(tiny: Callable[[str], Path], form: str, bound: float) -> None:
    """Whatever the pieces; and in pieces they are the same, to the last bit, though never those of float32."""
    tokens, model = list(range(3, 63)), str(tiny("llama"))
    exact = in_pieces(runner_of(model, "native"), tokens, [len(tokens)])
    whole = in_pieces(runner_of(model, "native", kv_cache_dtype=form), tokens, [len(tokens)])
    pieces = in_pieces(runner_of(model, "native", kv_cache_dtype=form), tokens, [1, 7, 30, 31, len(tokens)])
    assert torch.equal(whole, pieces)
    assert 0 < float((whole - exact).abs().max()) < bound * float(exact.abs().max())


def platform_of(model: Path, **settings: Any) -> Platform:
    config = EngineConfig(model=str(model), device="cpu", **settings)
    return load_model(config.model, None, config, 0, lambda what, share: None)[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernels": "torch"}, "kv_cache_dtype is 'int8', but .*CPU's native kernels"),
        ({"dtype": "bfloat16"}, "kv_cache_dtype is 'int8', but .*CPU's native kernels"),
        ({"attention_backend": "torch"}, "attention_backend is 'torch', but .*int8"),
        ({"attention_backend": "native", "dtype": "bfloat16"}, "float32 on the CPU"),
        ({"kv_cache_dtype": "fp8", "attention_backend": "native"}, "float32, bfloat16 or int8, not in fp8"),
    ],
)
def test_what_cannot_read_int8_says_so(tiny: Callable[[str], Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        platform_of(tiny("llama"), **{"kv_cache_dtype": "int8", **settings})


def test_torch_reads_bfloat16(tiny: Callable[[str], Path]) -> None:
    """The same numbers but for last bits, which may round a key of the second layer otherwise."""
    tokens, model = list(range(3, 43)), str(tiny("llama"))

    def logits(**settings: Any) -> torch.Tensor:
        return in_pieces(runner_of(model, "native", **settings), tokens, [9, 40])

    exact, native = logits(), logits(kv_cache_dtype="bfloat16")
    torchs = logits(kv_cache_dtype="bfloat16", attention_backend="torch")
    assert float((native - torchs).abs().mean()) < 0.05 * float((native - exact).abs().mean())
