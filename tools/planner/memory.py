"""Bytes on each GPU: weights, activations, CUDA graphs, KV cache; whether they fit, and what would."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from pilotfish.engine.config import cache_share
from pilotfish.engine.execution.buckets import GRAPH_SHARE, buckets
from pilotfish.engine.weights.quantization import SCHEMES
from pilotfish.tools.planner.devices import DEVICES
from pilotfish.tools.planner.heads import PlannedHead
from pilotfish.tools.planner.models import BYTES, PlannedModel
from pilotfish.tools.planner.roofline import kernel_count
from pilotfish.tools.planner.setup import Setup, ranks_that_divide

DRAWING_BYTES = 60
"""Bytes for each of the logits from which tokens are drawn at the same time, with top_p: sorted, summed, drawn from."""
DRAWN_AT_ONCE = 1 << 23
"""Logits from which tokens are drawn at the same time: `_DRAWN` of engine.sampling.sampler."""
GRAPH_KERNEL_BYTES = 8 * 2**10
"""Assumed memory of a kernel in a captured graph; not measured."""
MIN_CONTEXT = 2048
"""A plan whose cache holds less than a request of this length (or the model's limit) does not count as fitting."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of one GPU, in bytes. The parts add up to `total`."""

    total: int
    reserved: int
    weights: int
    draft_weights: dict[str, int]
    """Bytes by the draft model's name."""
    activations: int
    graphs: int
    kv_cache: int
    """Bytes that the settings give the cache, or their share of what is free."""
    unused: int
    """Bytes that are left; negative: bytes that are missing."""
    kv_bytes_per_token: int
    """Bytes for the target and all draft models, whose caches hold the same number of tokens."""

    @property
    def cached_tokens(self) -> int:
        return max(0, self.kv_cache) // self.kv_bytes_per_token

    @property
    def fixed(self) -> int:
        """Bytes of everything but the cache."""
        return self.reserved + self.weights + sum(self.draft_weights.values()) + self.activations + self.graphs


def plan_memory(setup: Setup) -> MemoryPlan:
    """Plan the memory of each of the setup's GPUs; the first one is the fullest."""
    device, settings, ranks = setup.device, setup.settings, setup.ranks
    weights = setup.target.weight_bytes(ranks)
    drafts = {d.name: _draft_bytes(d.model, setup) for d in setup.drafts if d.model is not None}
    working = max(
        activation_bytes(model, setup, part)
        for model, part in [(setup.target, ranks), *((model, setup.ranks_of(model)) for model in setup.draft_models)]
    )
    captured = device.graphs and not settings.enforce_eager
    graphs = graph_bytes(setup) if captured else 0
    per_token = setup.target.kv_bytes_per_token(ranks)
    per_token += sum(model.kv_bytes_per_token(setup.ranks_of(model)) for model in setup.draft_models)
    # As the engine does: a share of what is free once the weights are there, less what a step was seen to take on a GPU
    # and what graphs may take.
    free = device.memory - device.reserved - weights - sum(drafts.values())
    left = max(0, free if device.threads else free - working)
    aside = (settings.cuda_graph_memory or int(GRAPH_SHARE * left)) if captured else 0
    share = cache_share(settings.kv_cache_share, on_gpu=not device.threads)
    cache = settings.kv_cache_memory or max(0, int(share * (left - aside)))
    return MemoryPlan(
        total=device.memory,
        reserved=device.reserved,
        weights=weights,
        draft_weights=drafts,
        activations=working,
        graphs=graphs,
        kv_cache=cache,
        unused=free - working - graphs - cache,
        kv_bytes_per_token=per_token,
    )


def _draft_bytes(draft: PlannedModel | PlannedHead, setup: Setup) -> int:
    if isinstance(draft, PlannedHead):
        return draft.weight_bytes(setup.target, setup.ranks)
    return draft.weight_bytes(setup.draft_ranks)


def activation_bytes(model: PlannedModel | PlannedHead, setup: Setup, ranks: int) -> int:
    """Return the peak of a pass: the widest moment of a layer at `max_batch_tokens` rows, or the logits after it."""
    shape, width = model.shape, BYTES[model.dtype]
    rows = setup.settings.max_batch_tokens
    heads = (shape.num_heads + 2 * max(1, shape.num_kv_heads // ranks) * ranks) * shape.head_dim
    layer = rows * width * (3 * shape.hidden_size + max(3 * shape.intermediate_size, 2 * heads) // ranks)
    logits = drawn_rows(setup) * model.logit_size
    logits = logits * width + min(logits, DRAWN_AT_ONCE) * DRAWING_BYTES
    features = rows * 3 * model.config.target_hidden_size * width if isinstance(model, PlannedHead) else 0
    return features + max(layer, logits + rows * shape.hidden_size * width)


def drawn_rows(setup: Setup) -> int:
    """Return the most rows of a step that a token is drawn from: those that are decoded and verified."""
    longest = setup.settings.num_draft_tokens if setup.drafts else 0
    return min(setup.settings.max_batch_tokens, setup.settings.max_num_seqs * (1 + longest))


def graph_bytes(setup: Setup) -> int:
    """Return the bytes of captured passes, as `engine.execution.buckets` chooses them."""
    settings = setup.settings

    def passes(chunks: bool) -> int:
        return len(buckets(settings.max_num_seqs, settings.num_draft_tokens, settings.max_batch_tokens, chunks))

    target = passes(True) * kernel_count(setup.target)
    drafts = passes(False) * sum(kernel_count(model) for model in setup.draft_models)
    return (target + drafts) * GRAPH_KERNEL_BYTES


def fits(memory: MemoryPlan, setup: Setup) -> bool:
    """Return whether nothing is missing, and the cache holds a request of MIN_CONTEXT tokens."""
    return memory.unused >= 0 and memory.cached_tokens >= min(MIN_CONTEXT, setup.max_model_len)


def largest_context(memory: MemoryPlan, setup: Setup) -> int:
    """Return the tokens of the longest request that fits alone."""
    return min(setup.max_model_len, memory.cached_tokens)


def largest_batch(memory: MemoryPlan, context: int) -> int:
    """Return the number of requests of `context` tokens that fit at once."""
    return memory.cached_tokens // context


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change that makes a setup fit."""

    what: str
    ranks: int
    cached_tokens: int


def remedies(setup: Setup) -> list[Remedy]:
    """Return what would fit, the first of each kind: more GPUs, quantized weights, no draft models, larger GPUs; each
    with less cache if need be."""
    found = []
    kinds: list[tuple[str, Setup]] = [("as configured", setup)]
    for scheme in SCHEMES.values():
        if scheme.arithmetic in setup.device.flops and setup.quantized(scheme.name) != setup:
            kinds.append((f"{scheme.name} weights", setup.quantized(scheme.name)))
    if setup.draft_models:
        kept = tuple(draft for draft in setup.drafts if draft.model is None)
        kinds.append(("without draft models", replace(setup, drafts=kept)))
    larger = [] if setup.device.threads else [d for d in DEVICES.values() if d.memory > setup.device.memory]
    for device in sorted(larger, key=lambda device: device.memory):
        if setup.target.dtype in device.flops:
            kinds.append((f"on {device.name}", replace(setup, device=device)))
    for what, changed in kinds:
        for ranks in ranks_that_divide(changed):
            trial = _with_room(changed.with_ranks(ranks))
            memory = plan_memory(trial)
            if fits(memory, trial):
                found.append(Remedy(what, ranks, memory.cached_tokens))
                break
    return found


def _with_room(setup: Setup) -> Setup:
    """Return the setup with as much cache as there is room for, if its settings ask for more."""
    memory = plan_memory(setup)
    room = memory.kv_cache + memory.unused
    if memory.unused >= 0 or room <= 0:
        return setup
    return replace(setup, settings=msgspec.structs.replace(setup.settings, kv_cache_memory=room))
