"""What goes between host and GPU in a step, and what a captured pass may do, on torch's fake CUDA tensors: see
test_cuda_by_fake_tensors. A look at a value, which fake tensors do not have, is counted here and answered with
zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from pilotfish.engine.draft import Draft
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.buckets import buckets
from pilotfish.engine.execution.graphs import EagerGraphs, GraphPlan, Replay, graph_backend
from pilotfish.engine.execution.runner import HeadRunner
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.backend import AttentionBackend
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.memory.block_table import BlockTable
from pilotfish.engine.models.checkpoint import read_hf_config
from pilotfish.engine.models.config import Eagle3Config, ModelConfig
from pilotfish.engine.models.decoder_model import DecoderModel
from pilotfish.engine.models.eagle3 import Eagle3Model, SharedWeights
from pilotfish.engine.models.features import FeatureRows, FeatureTap
from pilotfish.engine.models.registry import expected_shapes
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.engine.sampling.logit_spans import LogitSpan
from pilotfish.engine.sequence import Sequence as Decoding
from pilotfish.engine.speculation.drafters.draft_model import DraftModelDrafter
from pilotfish.engine.speculation.drafters.drafter import DraftRequest
from pilotfish.engine.speculation.drafters.eagle3 import Eagle3Drafter
from pilotfish.engine.verification.choose import make_verifier
from tests.support.fake_cuda import BACKENDS, CUDA, on_cuda
from tests.support.parity import DecoderRunner
from tests.support.tiny import KINDS

pytestmark = pytest.mark.usefixtures("fake_cuda")

GREEDY = SamplingParams(temperature=0.0, max_tokens=100)
MIXED = (
    GREEDY,
    SamplingParams(temperature=0.7, seed=1, max_tokens=100),
    SamplingParams(temperature=1.0, top_p=0.9, seed=2, max_tokens=100),
    SamplingParams(temperature=0.5, top_k=5, min_p=0.1, seed=3, max_tokens=100),
)


class Traffic(TorchDispatchMode):
    """Counts copies to the device, and looks at it: `.tolist()`, `.item()`, copies back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.copies_in = self.looks = 0

        def tolist(tensor: FakeTensor) -> Any:
            if tensor.device.type == "cuda":
                self.looks += 1
            return _zeros(tuple(tensor.shape))

        monkeypatch.setattr(FakeTensor, "tolist", tolist, raising=False)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given, made = ({t.device.type for t in _tensors(values) if t.numel() > 1} for values in (args, (out,)))
        self.copies_in += "cpu" in given and "cuda" in made
        self.looks += "cuda" in given and "cpu" in made
        self.looks += function.name() in ("aten::_local_scalar_dense", "aten::nonzero")
        return out


def _zeros(shape: tuple[int, ...]) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0


class CapturedOnly(TorchDispatchMode):
    """Refuses what cannot be recorded: host tensors, looks at values, sizes that depend on them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::_pin_memory"):
            raise AssertionError(f"{function.name()} in a captured pass")
        out = function(*args, **(kwargs or {}))
        for tensor in (*_tensors(args), *_tensors((out,))):
            assert tensor.device.type == "cuda", f"{function.name()} with a host tensor in a captured pass"
        return out


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class Recording(EagerGraphs):
    """Captures under CapturedOnly; counts replays, which launch nothing."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def capture(
        self, function: Callable[[], None], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> Replay:
        with CapturedOnly():
            function()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1

        return replay


@pytest.fixture(scope="session")
def shapes(tiny: Callable[[str], Path]) -> dict[str, tuple[ModelConfig, dict[str, list[int]]]]:
    found = {}
    for kind in KINDS:
        shape = read_hf_config(tiny(kind))
        found[kind] = shape, {name: list(size) for name, size in expected_shapes(shape).items()}
    return found


def make_runner(shape: tuple[ModelConfig, dict[str, list[int]]], backend: AttentionBackend) -> DecoderRunner:
    config, sizes = shape
    weights = ((name, torch.empty(size, dtype=torch.bfloat16)) for name, size in sizes.items())
    with torch.inference_mode():
        model = DecoderModel(config, TorchKernels(), backend, weights, 256, CUDA)
    caches = kv_cache.allocate(config, backend, 9, backend.block_size, torch.bfloat16, CUDA)
    return DecoderRunner(model, caches, backend.block_size, CUDA)


def make_head(runner: DecoderRunner, backend: AttentionBackend) -> HeadRunner:
    decoder = runner.model.config
    size, heads, kv = decoder.hidden_size, decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    shapes = {
        "fc": (size, 3 * size),
        "layer.self_attn.q_proj": (heads, 2 * size),
        "layer.self_attn.k_proj": (kv, 2 * size),
        "layer.self_attn.v_proj": (kv, 2 * size),
        "layer.self_attn.o_proj": (size, heads),
        "layer.mlp.gate_proj": (decoder.intermediate_size, size),
        "layer.mlp.up_proj": (decoder.intermediate_size, size),
        "layer.mlp.down_proj": (size, decoder.intermediate_size),
        "lm_head": (128, size),
    }
    norms = ("layer.input_layernorm", "layer.hidden_norm", "layer.post_attention_layernorm", "norm")
    weights = {f"{name}.weight": torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    weights |= {f"{name}.weight": torch.empty(size, dtype=torch.bfloat16) for name in norms}
    config = Eagle3Config(decoder=decoder, draft_vocab_size=128, target_hidden_size=size, feature_layers=(0, 1, 2))
    shared = SharedWeights(runner.model.embedding, runner.model.head)
    with torch.inference_mode():
        model = Eagle3Model(config, TorchKernels(), backend, weights, 256, CUDA, torch.bfloat16, shared)
        # What is read once, at loading, has numbers here.
        model.target_ids = torch.empty(128, dtype=torch.int64, device=CUDA)
    (cache,) = kv_cache.allocate(decoder, backend, 9, backend.block_size, torch.bfloat16, CUDA)[:1]
    return HeadRunner(model, cache, backend.block_size, CUDA)


def plan(backend: EagerGraphs, drafted: int = 4) -> GraphPlan:
    every = buckets(4, drafted, 64)
    return GraphPlan(backend=backend, buckets=every, max_len=256, padding_block=8, memory=1)


FLASH = [name for name in BACKENDS if name != "torch"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", FLASH)
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_pass_has_nothing_to_do_with_the_host(shapes, kind, backend):
    runner, graphs = make_runner(shapes[kind], BACKENDS[backend]()), Recording()
    runner.capture("target", plan(graphs), (0, 2))
    assert graphs.captured == len(plan(graphs).buckets)


@pytest.mark.parametrize("backend", FLASH)
def test_so_has_a_heads(shapes, backend):
    attention, graphs = BACKENDS[backend](), Recording()
    head = make_head(make_runner(shapes["llama"], attention), attention)
    head.capture("head", plan(graphs))
    assert graphs.captured == len(plan(graphs).buckets)


def test_what_cannot_be_captured_is_noticed(shapes):
    class Looks(BACKENDS["flash2"]().__class__):
        def attend(self, query, key, value, cache, batch, *rest):
            torch.empty(3).to(CUDA)
            return super().attend(query, key, value, cache, batch, *rest)

    with pytest.raises(AssertionError, match="captured pass"):
        make_runner(shapes["llama"], Looks(on_cuda, on_cuda)).capture("target", plan(Recording(), 0))


def test_the_backends_that_can_be_captured():
    assert {name for name, make in BACKENDS.items() if make().capturable} == {"flash2", "flash4"}
    flash, torch_ = BACKENDS["flash2"](), BACKENDS["torch"]()
    assert graph_backend(False, flash, CUDA) is not None
    assert graph_backend(True, flash, CUDA) is None
    assert graph_backend(False, torch_, CUDA) is None
    assert graph_backend(False, flash, torch.device("cpu")) is None


@pytest.mark.parametrize("graphs", [False, True])
def test_a_pass_is_one_copy_and_no_look(shapes, graphs, monkeypatch):
    runner = make_runner(shapes["llama"], BACKENDS["flash2"]())
    recording = Recording()
    if graphs:
        runner.capture("target", plan(recording), (0, 2))
    blocks = list(range(8))
    steps = [[Span([1], 7, blocks, 1)] * 3, [Span([1] * 5, 7, blocks, 5), Span([1] * 2, 9, blocks, 2)]]
    steps += [[Span([1] * 40, 0, blocks, 1), Span([1], 7, blocks, 1)]]
    for step in steps:
        with Traffic(monkeypatch) as traffic:
            logits = runner.run(step, FeatureTap((0, 2)))
        assert (traffic.copies_in, traffic.looks) == (1, 0)
        assert logits.shape == (sum(span.logit_rows for span in step), runner.model.config.vocab_size)
    assert recording.replayed == (3 if graphs else 0)


def decoding(params: SamplingParams, place: int) -> Decoding:
    sequence = Decoding(
        Request(id=str(place), prompt_ids=(1, 2, 3), params=params), params.seed or 0, BlockTable(BlockPool(64, 256))
    )
    sequence.tokens = [1, 2, 3, 4]
    sequence.computed = 3
    return sequence


@pytest.mark.parametrize("drafted", [0, 4])
@pytest.mark.parametrize(
    ("kind", "params", "copies"),
    [("coupled", (GREEDY,) * 4, 0), ("coupled", MIXED, 1), ("rejection", MIXED, 1)],
    ids=["greedy", "mixed", "rejection"],
)
def test_verification_is_one_look_and_at_most_one_copy(kind, params, copies, drafted, monkeypatch):
    probs = torch.empty(5, 512, device=CUDA)
    lengths = [drafted - i % 2 if drafted else 0 for i in range(4)]
    drafts = [Draft((0,) * length, probs[:length] if i < 2 else None) for i, length in enumerate(lengths)]
    rows = [len(draft.tokens) + 1 for draft in drafts]
    spans = [
        LogitSpan(decoding(each, i), draft.tokens, rows=count)
        for i, (each, draft, count) in enumerate(zip(params, drafts, rows, strict=True))
    ]
    with Traffic(monkeypatch) as traffic:
        verdicts = make_verifier(kind, (0,), CUDA).verify(torch.empty(sum(rows), 512, device=CUDA), spans, drafts)
    assert [len(verdict.tokens) for verdict in verdicts] == rows
    assert (traffic.copies_in, traffic.looks) == (copies, 1)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize(("params", "drawn"), [((GREEDY,) * 3, 0), (MIXED[:3], 1)], ids=["greedy", "mixed"])
def test_a_draft_is_one_look_however_long_it_is(shapes, params, drawn, graphs, monkeypatch):
    """And for each of its passes one copy, and one for drawing unless that is greedy."""
    attention = BACKENDS["flash2"]()
    runner = make_runner(shapes["llama"], attention)
    head = make_head(runner, attention)
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: _zeros(tuple(tensor.shape)), raising=False)
    sequences = [decoding(each, i) for i, each in enumerate(params)]
    model = DraftModelDrafter("draft", runner, BlockPool(64, 256), (0,), 64)
    eagle = Eagle3Drafter("head", head, (0, 1, 2), BlockPool(64, 256), (0,), 64)
    if graphs:
        runner.capture("draft", plan(Recording(), 3))
        head.capture("head", plan(Recording(), 2))
    features = torch.empty(3, 3 * runner.model.config.hidden_size, dtype=torch.bfloat16, device=CUDA)
    for drafter in (model, eagle):
        if drafter is eagle:
            for sequence in sequences:
                eagle.observe_features(sequence, 0, FeatureRows(features, 0, 3))
        with torch.inference_mode(), Traffic(monkeypatch) as traffic:
            drafts = drafter.propose([DraftRequest(sequence, 5) for sequence in sequences])
        assert [len(draft.tokens) for draft in drafts] == [5, 5, 5]
        assert len(drafter.passes) == 5
        assert (traffic.copies_in, traffic.looks) == (5 * (1 + drawn), 1)
