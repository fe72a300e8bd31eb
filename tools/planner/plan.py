"""Plan: a setup's memory and predicted speeds, for vanilla and each drafter, over batch sizes and draft lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pilotfish.errors import ConfigError
from pilotfish.tools.planner.memory import (
    MemoryPlan,
    Remedy,
    fits,
    largest_batch,
    largest_context,
    plan_memory,
    remedies,
)
from pilotfish.tools.planner.models import PlannedModel
from pilotfish.tools.planner.roofline import StepSeconds, draft_seconds, step_seconds
from pilotfish.tools.planner.setup import Kind, PlannedDraft, Setup
from pilotfish.tools.planner.speculation import acceptance_for, expected_tokens

VANILLA = "vanilla"
ASSUMED: Mapping[Kind, float] = {"draft model": 0.7, "EAGLE-3 head": 0.7, "lookup": 0.3}
"""Acceptance rates where none is given: placeholders, as acceptance depends on models and texts, not on the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The predicted speed of one way to decode `batch` sequences."""

    drafter: str
    batch: int
    draft_length: int
    """0 for vanilla."""
    acceptance: float | None
    step: StepSeconds
    """Time of the target's step, verification included."""
    draft_seconds: float
    tokens_per_step: float
    """Expected tokens of each sequence."""
    tokens_per_second: float
    """Tokens per second of all sequences together."""
    speedup: float
    """Speed as a multiple of vanilla's at this batch size."""
    break_even: float | None
    """The acceptance rate at which this is as fast as vanilla; None for vanilla, and where none in [0, 1] is."""
    fits: bool
    """Whether the KV cache holds so many sequences of the plan's context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes in bytes, times in seconds, lengths in tokens."""

    model: str
    device: str
    device_source: str
    tensor_parallel_size: int
    draft_tensor_parallel_size: int
    dtype: str
    """The weights' dtype: "fp8" if most are in fp8."""
    parameters: int
    context: int
    memory: MemoryPlan
    fits: bool
    largest_context: int
    largest_batch: int
    """Sequences of `context` tokens that the cache holds; more than max_num_seqs do not run at once."""
    remedies: list[Remedy]
    """Changes with which it would fit, if it does not."""
    predictions: list[Prediction]
    notes: list[str]

    def best(self, drafter: str, batch: int) -> Prediction:
        """Return a drafter's fastest draft length at a batch size. Raises ValueError if it has none there."""
        found = [each for each in self.predictions if (each.drafter, each.batch) == (drafter, batch)]
        return max(found, key=lambda each: each.tokens_per_second)


def make_plan(
    setup: Setup, context: int, batches: Sequence[int], lengths: Sequence[int], acceptances: Mapping[str, float]
) -> Plan:
    """Plan a setup. context: tokens of each sequence; acceptances: by drafter's name, `ASSUMED` for those missing.

    Draft lengths are left out at batch sizes at which they would take more than `max_batch_tokens` rows. Raises
    ConfigError for a context, batch or length that the settings do not allow, and an acceptance of an unknown drafter.
    """
    settings = setup.settings
    if max(batches) > settings.max_num_seqs:
        raise ConfigError(f"batch is {max(batches)}, but max_num_seqs is {settings.max_num_seqs}: raise that, too")
    if max(lengths) > settings.num_draft_tokens:
        raise ConfigError(
            f"draft_lengths has {max(lengths)}, but num_draft_tokens is {settings.num_draft_tokens}: raise that, too"
        )
    if context > setup.max_model_len:
        raise ConfigError(f"context is {context}, but a request may have {setup.max_model_len} tokens (max_model_len)")
    names = [draft.name for draft in setup.drafts]
    for name in acceptances:
        if name not in names:
            listed = ", ".join(map(repr, names)) or "none"
            raise ConfigError(f"acceptance is given for {name!r}, but the drafters are: {listed}")
    memory = plan_memory(setup)
    predictions: list[Prediction] = []
    for batch in batches:
        room = batch * context <= memory.cached_tokens
        vanilla = predict(setup, None, batch, context, 0, None, room)
        predictions.append(vanilla)
        for draft in setup.drafts:
            acceptance = acceptances.get(draft.name, ASSUMED[draft.kind])
            verifiable = [k for k in lengths if batch * (1 + k) <= settings.max_batch_tokens]
            predictions += [predict(setup, draft, batch, context, k, acceptance, room) for k in verifiable]
    ok = fits(memory, setup)
    return Plan(
        model=setup.target.name,
        device=setup.device.name,
        device_source=setup.device.source,
        tensor_parallel_size=setup.ranks,
        draft_tensor_parallel_size=setup.draft_ranks,
        dtype=_form(setup.target),
        parameters=setup.target.params,
        context=context,
        memory=memory,
        fits=ok,
        largest_context=largest_context(memory, setup),
        largest_batch=largest_batch(memory, context),
        remedies=[] if ok else remedies(setup),
        predictions=predictions,
        notes=list(setup.notes),
    )


def _form(model: PlannedModel) -> str:
    """The dtype of a model's weights, or how those of its layers are quantized."""
    if model.storage.layers is not None:
        return model.storage.layers.name
    return model.dtype if model.quantization is None else model.quantization.scheme


def predict(
    setup: Setup,
    draft: PlannedDraft | None,
    batch: int,
    context: int,
    length: int,
    acceptance: float | None,
    room: bool = True,
) -> Prediction:
    """Predict the decoding of `batch` sequences with drafts of `length` tokens; `draft` None and length 0: vanilla."""
    rate = acceptance or 0.0
    plain = step_seconds(setup.target, setup.device, setup.ranks, batch, batch, context).total
    step = step_seconds(setup.target, setup.device, setup.ranks, batch * (1 + length), batch, context)
    drafting = _drafting(setup, draft, batch, context, length, rate)
    tokens = expected_tokens(rate, length)
    return Prediction(
        drafter=VANILLA if draft is None else draft.name,
        batch=batch,
        draft_length=length,
        acceptance=acceptance,
        step=step,
        draft_seconds=drafting,
        tokens_per_step=tokens,
        tokens_per_second=batch * tokens / (step.total + drafting),
        speedup=tokens * plain / (step.total + drafting),
        break_even=None if draft is None else acceptance_at(setup, draft, batch, context, length, 1.0),
        fits=room,
    )


def acceptance_at(
    setup: Setup, draft: PlannedDraft, batch: int, context: int, length: int, speedup: float
) -> float | None:
    """Return the acceptance rate at which drafts of `length` give `speedup`; None if none in [0, 1] does."""
    plain = step_seconds(setup.target, setup.device, setup.ranks, batch, batch, context).total
    step = step_seconds(setup.target, setup.device, setup.ranks, batch * (1 + length), batch, context).total
    rate = 0.0
    for _ in range(8):  # the draft reads a token more after a draft that was accepted whole: hardly any difference
        found = acceptance_for(speedup * (step + _drafting(setup, draft, batch, context, length, rate)) / plain, length)
        if found is None or abs(found - rate) < 1e-6:
            return found
        rate = found
    return rate


def _drafting(
    setup: Setup, draft: PlannedDraft | None, batch: int, context: int, length: int, acceptance: float
) -> float:
    if draft is None or draft.model is None or length == 0:
        return 0.0
    new_rows = 1 + acceptance**length  # one more after a draft that was accepted whole: its last token was never read
    if draft.kind == "EAGLE-3 head":
        new_rows = expected_tokens(acceptance, length)  # it reads the target's features of all that was accepted
    return draft_seconds(draft.model, setup.device, setup.ranks_of(draft.model), length, batch, context, new_rows)
