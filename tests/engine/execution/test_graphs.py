"""Captured passes by their twin on the CPU: the same functions on the same static buffers, only that nothing is
captured. And by a twin that leaves nothing where it was: whoever reads an input or a result of an earlier pass gets
nonsense."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.execution.batch import Span, pack
from pilotfish.engine.execution.buckets import FREE_ROWS, WASTE, buckets, fitting
from pilotfish.engine.execution.graphs import CudaGraphs, EagerGraphs, GraphPlan, Replay
from pilotfish.engine.layers.communicator import Alone
from pilotfish.engine.llm import LLM
from pilotfish.engine.speculation.drafters.drafter import DraftRequest
from pilotfish.engine.stats import StepStats
from tests.support.pairwise import pairwise
from tests.support.texts import GREEDY, PARAMS, SAMPLED, portfolio, prompts, stats_of, texts


class Poisoned(EagerGraphs):
    """After a replay the inputs are lost, and before one the outputs: token ids that no vocabulary has, blocks that no
    cache has, NaN. Counts replays."""

    name = "poisoned"

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def capture(
        self, function: Callable[[], None], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> Replay:
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            for output in outputs:
                output.fill_(torch.nan if output.is_floating_point() else -1)
            function()
            inputs[0].fill_(0x7F)
            for hidden in inputs[1:]:
                hidden.fill_(1e3)

        return replay


@pytest.fixture
def make(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """An LLM on a graph backend; None: eager. On the native kernels, whose rows are bit-equal in every company."""

    def build(backend: EagerGraphs | None = None, **given: object) -> LLM:
        monkeypatch.setattr("pilotfish.engine.assembly.graph_backend", lambda *_: backend and (lambda: backend))
        defaults: dict[str, Any] = {
            "model": str(tiny("llama")),
            "kernels": "native",
            "kv_cache_memory": 4 << 20,
            "num_threads": 1,
            "adaptive_drafts": False,
            "max_num_seqs": 8,
        }
        return LLM(**{**defaults, **given})

    return build


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["off", "ngram", "draft-model", "eagle3"])
def test_the_text_is_the_eager_one(drafter: str, make: Callable[..., LLM], draft: Path, head: Path) -> None:
    drafters, backend = portfolio(draft, head), Poisoned()
    eager, graphed = make(drafter=drafters), make(backend, drafter=drafters)
    for name in ("greedy", "sampled", "penalties", "bias"):
        wanted = texts(eager.generate(prompts(7), PARAMS[name], speculation=drafter))
        before = backend.replayed
        assert texts(graphed.generate(prompts(7), PARAMS[name], speculation=drafter)) == wanted
        assert backend.replayed > before
    alone = [graphed.generate([prompt], GREEDY, speculation=drafter)[0] for prompt in prompts(7)]
    assert texts(alone) == texts(eager.generate(prompts(7), GREEDY, speculation="off"))


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["ngram", "draft-model", "eagle3"])
def test_what_was_in_memory_before_does_not_matter(
    drafter: str, make: Callable[..., LLM], draft: Path, head: Path, request: pytest.FixtureRequest
) -> None:
    """Rows of padding stand behind a sequence's own, where nobody has written."""
    wanted = texts(make(drafter=("ngram",)).generate(prompts(7), GREEDY, speculation="off"))
    request.getfixturevalue("soiled_memory")
    graphed = make(Poisoned(), drafter=portfolio(draft, head))
    assert texts(graphed.generate(prompts(7), GREEDY, speculation=drafter)) == wanted


def test_every_step_is_replayed_whatever_its_drafts_and_chunks_are(make: Callable[..., LLM]) -> None:
    steps: list[StepStats] = []
    backend = Poisoned()
    llm = make(backend, drafter=("ngram",), num_draft_tokens=4, on_stats=steps.append, max_batch_tokens=64)
    llm.generate(prompts(8), SAMPLED)
    assert backend.replayed == len(steps) > 20
    assert any(step.prompt_tokens and step.rows > 40 for step in steps)
    ragged = [step for step in steps if step.drafted and len({*step.step_tokens.get("none", ())}) and step.rows % 5]
    assert ragged


def test_the_numbers_are_the_eager_ones(make: Callable[..., LLM]) -> None:
    """Log-probabilities to the last bit."""
    params = msgspec.structs.replace(SAMPLED, logprobs=3)
    eager = make(drafter=("ngram",)).generate(prompts(6), params)
    graphed = make(Poisoned(), drafter=("ngram",)).generate(prompts(6), params)
    assert [completion.logprobs for completion in graphed] == [completion.logprobs for completion in eager]


def test_preemption_and_chunks(make: Callable[..., LLM], draft: Path) -> None:
    eager = make(drafter=portfolio(draft))
    per_block = 2 * 3 * 16 * 2 * 16 * 4
    small = make(
        Poisoned(), drafter=portfolio(draft), kv_cache_memory=13 * per_block, prefix_caching=False, max_batch_tokens=16
    )
    wanted = texts(eager.generate(prompts(8), SAMPLED, speculation="off"))
    for drafter in ("ngram", "draft-model"):
        got = small.generate(prompts(8), SAMPLED, speculation=drafter)
        assert texts(got) == wanted
        assert sum(stats_of(completion).preemptions for completion in got) > 0
    assert small.core.engine.pool.available == small.info.num_blocks


def test_the_padding_block_is_no_sequences(make: Callable[..., LLM]) -> None:
    llm = make(Poisoned(), drafter=("ngram",))
    caches = llm.core.engine.runner._caches
    assert all(len(cache.values) == llm.info.num_blocks + 1 for cache in caches)
    llm.generate(prompts(3), GREEDY)
    assert all(cache.values[llm.info.num_blocks].isfinite().all() for cache in caches)
    block = 2 * 2 * 16 * 2 * 16 * 4
    assert make(Poisoned(), kv_cache_memory=20 * block).info.num_blocks == 19
    assert make(kv_cache_memory=20 * block).info.num_blocks == 20


def test_capture_stops_at_the_memory_limit(make: Callable[..., LLM], caplog: pytest.LogCaptureFixture) -> None:
    """The larger half is left out, and half of what is left, until the rest fits; the largest comes first."""

    class Hungry(Poisoned):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[int] = []
            self.most: list[int] = []

        def capture(self, function, inputs, outputs):
            self.sizes.append(len(outputs[0]))
            return super().capture(function, inputs, outputs)

        def memory(self) -> int:
            return max(self.sizes, default=0) << 20

        def drop(self) -> None:
            self.most.append(self.sizes[0])
            self.sizes.clear()

    caplog.set_level("INFO")
    backend = Hungry()
    llm = make(backend, drafter=("ngram",), cuda_graph_memory=20 << 20, max_batch_tokens=128)
    assert backend.most == [72, 64, 32]  # rows of logits: a step with a chunk of 128 wants 72
    assert backend.sizes == sorted(backend.sizes, reverse=True)
    graphs = llm.core.engine.runner._graphs
    assert graphs is not None
    assert graphs.captured == tuple(bucket for bucket in buckets(8, 8, 128) if bucket.rows <= 16)
    assert any("up to 8 sequences and 16 rows" in message for message in caplog.messages)
    assert any("exceed cuda_graph_memory" in message for message in caplog.messages)
    wanted = texts(make(drafter=("ngram",)).generate(prompts(8), GREEDY))
    assert texts(llm.generate(prompts(8), GREEDY)) == wanted  # what was not captured is computed eagerly


def test_all_ranks_stop_where_one_has_no_memory_left(make: Callable[..., LLM]) -> None:
    class Other(Alone):
        """The second of two ranks has memory for 64 rows."""

        size, votes = 2, 0

        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape != (1, 1):  # the model's own
                return x
            self.votes += 1
            return x + float(self.votes > 1)

    runner = make(drafter=("ngram",)).core.engine.runner
    runner.model.comm = Other()
    backend = Poisoned()
    plan = GraphPlan(
        backend=backend,
        buckets=buckets(8, 8, 128),
        max_len=100,
        padding_block=0,
        memory=1,
    )
    runner.capture("target", plan)
    captured = sum(bucket.rows <= 64 for bucket in plan.buckets)
    assert backend.captured == 1 + captured < len(plan.buckets)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drafter", "name", "graphs"),
    pairwise(["draft-model", "eagle3"], ["greedy", "sampled", "bias", "penalties"], (False, True)),
)
def test_drafts_that_grow_on_the_device_are_the_same(
    drafter: str, name: str, graphs: bool, make: Callable[..., LLM], draft: Path, head: Path
) -> None:
    wanted = make(drafter=portfolio(draft, head)).generate(prompts(7), PARAMS[name], speculation=drafter)
    llm = make(Poisoned() if graphs else None, drafter=portfolio(draft, head))
    asked: Any = llm.core.engine.speculator.model_drafters[drafter]
    asked.growth.sync_free = True
    got = llm.generate(prompts(7), PARAMS[name], speculation=drafter)
    assert texts(got) == texts(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert stats_of(one).drafted_tokens == stats_of(other).drafted_tokens
        assert stats_of(one).accepted_tokens == stats_of(other).accepted_tokens
        assert stats_of(one).drafted_tokens > 0


def test_a_draft_on_the_device_ends_where_its_confidence_does(
    make: Callable[..., LLM], draft: Path, head: Path
) -> None:
    drafts = {}
    for sync_free in (False, True):
        llm = make(drafter=portfolio(draft, head))
        core = llm.core
        for request in llm.requests(prompts(5), SAMPLED, speculation="eagle3"):
            core.add(request)
        for _ in range(3):
            core.step()
        drafters: dict[str, Any] = core.engine.speculator.model_drafters
        for drafter in drafters.values():
            drafter.growth.sync_free = sync_free
            floors = zip(core._scheduler.decoding(), (0.5, 0.1, 1e-2, 1e-3, 0.0), strict=True)
            requests = [DraftRequest(sequence, 8, floor) for sequence, floor in floors]
            with torch.inference_mode():
                drafts[drafter.name, sync_free] = drafter.propose(requests)
    for name in ("draft-model", "eagle3"):
        for one, other in zip(drafts[name, True], drafts[name, False], strict=True):
            assert one.tokens == other.tokens
            assert one.confidences == pytest.approx(other.confidences, rel=1e-4)
        assert len({len(draft.tokens) for draft in drafts[name, True]}) > 1


@given(st.integers(1, 300), st.integers(0, 20), st.integers(1, 4096), st.data())
@settings(max_examples=60)
def test_buckets(max_num_seqs: int, drafted: int, max_rows: int, data: st.DataObject) -> None:
    max_rows = max(max_rows, max_num_seqs)
    every = buckets(max_num_seqs, drafted, max_rows)
    assert list(every) == sorted(set(every))
    assert every[0].rows == 1
    assert every[-1].rows <= max_rows
    for spans in range(1, max_num_seqs + 1):  # plain decoding
        found = fitting(every, spans, 1, spans, spans)
        assert found is not None
        assert found.length == 1
        assert found.rows <= max(FREE_ROWS, WASTE * spans)
    lengths = data.draw(st.lists(st.integers(1, drafted + 1), min_size=1, max_size=max_num_seqs))
    rows = sum(lengths)
    found = fitting(every, len(lengths), max(lengths), rows, rows)
    if found is None:
        assert rows > max(bucket.rows for bucket in every if bucket.length <= drafted + 1) or max(lengths) == 1
        return
    assert found.spans >= len(lengths)
    assert found.length >= max(lengths)
    assert rows <= found.rows <= max(FREE_ROWS, WASTE * rows)
    assert found.rows - rows <= found.length * (found.spans + found.spare - len(lengths))


@pytest.mark.parametrize("sequences", [1, 2, 4, 8, 12, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("max_num_seqs", [64, 256])
def test_drafts_of_unequal_lengths_are_captured(sequences: int, max_num_seqs: int) -> None:
    """In simulated traffic: every sequence drafts, half of them do, one does."""
    every, chance = buckets(max_num_seqs, 8, 2048), random.Random(sequences)
    traffic = [
        *([1 + chance.randint(0, 8) for _ in range(sequences)] for _ in range(300)),
        *([1 + chance.choice((0, chance.randint(4, 8))) for _ in range(sequences)] for _ in range(300)),
        [9] + [1] * (sequences - 1),
    ]
    found = [fitting(every, sequences, max(lengths), sum(lengths), sum(lengths)) for lengths in traffic]
    assert sum(bucket is not None for bucket in found) >= 0.98 * len(traffic)
    padded = sum(bucket.rows for bucket in found if bucket is not None)
    assert padded <= 1.35 * sum(map(sum, traffic))


@pytest.mark.parametrize("chunk", [10, 60, 100, 200, 400])
def test_steps_with_chunks_of_prompts_are_captured(chunk: int) -> None:
    every = buckets(64, 8, 2048)
    for sequences in (1, 5, 20):
        lengths = [1 + i % 9 for i in range(sequences)] + [chunk]
        drawn = sum(lengths) - chunk + 1
        found = fitting(every, len(lengths), chunk, sum(lengths), drawn)
        assert found is not None
        assert found.rows <= max(64, 2 * sum(lengths))
    # Log-probabilities of a whole prompt want more rows of logits than a step draws.
    assert fitting(buckets(1, 8, 2048), 1, 400, 400, 400) is None


def test_a_token_from_the_device_needs_its_own_row(make: Callable[..., LLM]) -> None:
    runner = make(Poisoned(), drafter=("ngram",)).core.engine.runner
    host = pack([Span([1, 2], 0, [0], 2)], 16)
    with pytest.raises(ValueError, match="one row per span"):
        runner.run_batch(host, None, torch.tensor([1, 2]))


@pytest.mark.parametrize(("backend", "gpu"), [("flash2", (8, 0)), ("flash4", (9, 0)), ("flash4", (10, 0))])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_over_flash_attn(
    kind: str, backend: str, gpu: tuple[int, int], make: Callable[..., LLM], tiny: Callable[[str], Path], flash_attn
) -> None:
    """Its stand-ins, which check every bound and load whole pages where the real kernels do."""
    flash = flash_attn(gpu)
    common = {
        "model": str(tiny(kind)),
        "kernels": "auto",
        "dtype": "bfloat16",
        "device": "cpu",
        "attention_backend": backend,
        "kv_cache_memory": 1 << 24,
        "drafter": ("ngram",),
    }
    wanted = make(**common).generate(prompts(6), SAMPLED, speculation="ngram")
    poisoned = Poisoned()
    llm = make(poisoned, **common)
    before = len(flash.calls)
    got = llm.generate(prompts(6), SAMPLED, speculation="ngram")
    assert texts(got) == texts(wanted)
    assert poisoned.replayed > 10
    assert len(flash.calls) > before


def test_cuda_graphs_are_captured_as_torch_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch.cuda, held against its signatures: warmed up on the stream of the capture, behind what is
    there already, and captured into the pool that all graphs share."""
    happened: list[str] = []

    class Stream:
        def __init__(self, device: torch.device | None = None, name: str = "capture") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            happened.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            happened.append("replay")

    @contextmanager
    def stream(current: Stream) -> Iterator[None]:
        happened.append(f"on {current.name}:")
        yield

    @contextmanager
    def graph(*args: object, **kwargs: object) -> Iterator[None]:
        bound = inspect.signature(signature_of).bind(None, *args, **kwargs).arguments
        assert isinstance(bound["cuda_graph"], Graph)
        happened.append(f"capture on {bound['stream'].name} into {bound['pool']}, {bound['capture_error_mode']}:")
        yield

    signature_of = torch.cuda.graph.__init__
    free = iter([100, 70, 40])
    for name, stand_in in {
        "graph_pool_handle": lambda: "the pool",
        "Stream": Stream,
        "current_stream": lambda device: Stream(name="current"),
        "stream": stream,
        "CUDAGraph": Graph,
        "graph": graph,
        "mem_get_info": lambda device: (next(free), 200),
    }.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    backend = CudaGraphs(torch.device("cuda", 0))
    replay = backend.capture(lambda: happened.append("pass"), (), ())
    assert happened == [
        *("capture waits for current", "on capture:", "pass", "pass", "current waits for capture"),
        *("capture on capture into the pool, thread_local:", "pass"),
    ]
    replay()
    assert happened[-1] == "replay"
    assert (backend.memory(), backend.memory()) == (30, 60)
