"""Setup: the models of a configuration as they would be on a device. From settings to nouns; what they cost is next
door."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.models.layout import MAX_RANKS, what_does_not_divide
from pilotfish.engine.speculation.drafters.registry import lookup_names
from pilotfish.errors import ConfigError
from pilotfish.tools.planner.devices import Device
from pilotfish.tools.planner.heads import PlannedHead, find_head, read_head
from pilotfish.tools.planner.models import PlannedModel, read_shape

Kind = Literal["lookup", "draft model", "EAGLE-3 head"]


@dataclass(frozen=True, slots=True)
class PlannedDraft:
    """A drafter by its name; `model` None: a lookup."""

    name: str
    model: PlannedModel | PlannedHead | None

    @property
    def kind(self) -> Kind:
        if self.model is None:
            return "lookup"
        return "EAGLE-3 head" if isinstance(self.model, PlannedHead) else "draft model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    settings: EngineConfig
    device: Device
    target: PlannedModel
    drafts: tuple[PlannedDraft, ...]
    ranks: int
    draft_ranks: int
    """Of draft models. 1: rank 0 has each whole, and is the fullest; else as `ranks`: sharded. EAGLE-3 heads are always
    whole."""
    notes: tuple[str, ...] = ()
    """What was decided on the way, for the reader."""

    @property
    def draft_models(self) -> list[PlannedModel | PlannedHead]:
        return [draft.model for draft in self.drafts if draft.model is not None]

    @property
    def split(self) -> list[PlannedModel]:
        """The models that are divided over the ranks."""
        drafts = self.draft_models if self.draft_ranks > 1 else []
        return [self.target, *(model for model in drafts if isinstance(model, PlannedModel))]

    def ranks_of(self, draft: PlannedModel | PlannedHead) -> int:
        """Over how many ranks a draft is divided."""
        return 1 if isinstance(draft, PlannedHead) else self.draft_ranks

    @property
    def max_model_len(self) -> int:
        return self.settings.max_model_len or self.target.shape.max_position

    def with_ranks(self, ranks: int) -> Setup:
        """The same over so many GPUs."""
        return replace(self, ranks=ranks, draft_ranks=self.draft_ranks if self.draft_ranks == 1 else ranks)

    def with_fp8(self) -> Setup:
        """The same with all models' matrices in fp8; heads stay as they are."""
        drafts = tuple(
            replace(draft, model=_in_fp8(draft.model)) if isinstance(draft.model, PlannedModel) else draft
            for draft in self.drafts
        )
        return replace(self, target=_in_fp8(self.target), drafts=drafts)


def make_setup(settings: EngineConfig, device: Device, draft_ranks: int = 1) -> Setup:
    """Raises ConfigError for what cannot work on this device, ModelError for a model whose shape is not to be had."""
    notes: list[str] = []
    target = _planned(settings.model, settings.model, settings, device, notes)
    drafts = []
    for entry in settings.drafter:
        name, _, model = entry.rpartition("=")
        if entry in lookup_names():
            drafts.append(PlannedDraft(entry, None))
        else:
            name = name or Path(model).name
            drafts.append(PlannedDraft(name, _draft(model, name, settings, device, notes)))
    setup = Setup(
        settings=settings,
        device=device,
        target=target,
        drafts=tuple(drafts),
        ranks=settings.tensor_parallel_size,
        draft_ranks=draft_ranks,
        notes=tuple(notes),
    )
    _check(setup)
    return setup


def ranks_that_divide(setup: Setup) -> list[int]:
    """From 1 to MAX_RANKS, those that all models can be split over; only 1 where there is no link between devices."""
    most = MAX_RANKS if setup.device.link_bandwidth else 1
    return [n for n in range(1, most + 1) if not any(_obstacles(model, n) for model in setup.split)]


def _obstacles(model: PlannedModel, ranks: int) -> list[str]:
    return what_does_not_divide(model.shape, ranks, fp8=model.fp8_except is not None)


def _check(setup: Setup) -> None:
    for draft in setup.drafts:
        if draft.model is not None and draft.model.shape.vocab_size != setup.target.shape.vocab_size:
            raise ConfigError(
                f"drafter {draft.name!r} has a vocabulary of {draft.model.shape.vocab_size} tokens, the target of "
                f"{setup.target.shape.vocab_size}: a draft needs the target's own tokenizer"
            )
        if isinstance(draft.model, PlannedHead):
            _check_head(draft.name, draft.model, setup.target)
    if setup.draft_ranks not in (1, setup.ranks):
        raise ConfigError(
            f"draft_tensor_parallel_size is {setup.draft_ranks}, but must be 1 or tensor_parallel_size ({setup.ranks})"
        )
    if setup.ranks > 1 and not setup.device.link_bandwidth:
        raise ConfigError(
            f"tensor_parallel_size is {setup.ranks}, but {setup.device.name} has no link to others: use 1"
        )
    for model in setup.split:
        if reasons := _obstacles(model, setup.ranks):
            would = ", ".join(map(str, ranks_that_divide(setup)))
            raise ConfigError(
                f"tensor_parallel_size is {setup.ranks}, but of {model.name} {' and '.join(reasons)}: {would} would do"
            )
    if setup.max_model_len > setup.target.shape.max_position:
        raise ConfigError(
            f"max_model_len is {setup.settings.max_model_len}, but the model's context is "
            f"{setup.target.shape.max_position}"
        )


def _check_head(name: str, head: PlannedHead, target: PlannedModel) -> None:
    size, wanted = head.config.target_hidden_size, target.shape.hidden_size
    if size != wanted:
        raise ConfigError(
            f"drafter {name!r} reads hidden states of size {size}, the target's are {wanted}: it was made for another "
            "target"
        )
    layers = head.config.features_of(target.shape)
    if max(layers) > target.shape.num_layers:
        raise ConfigError(
            f"drafter {name!r} reads layers {layers}, the target has {target.shape.num_layers}: it was made for "
            "another target"
        )


def _draft(
    model: str, name: str, settings: EngineConfig, device: Device, notes: list[str]
) -> PlannedModel | PlannedHead:
    files = find_head(model)
    if files is None:
        return _planned(model, name, settings, device, notes)
    dtype = settings.dtype
    if dtype == "auto":  # as its target computes
        dtype = "float32" if device.threads else read_shape(settings.model).shape.dtype  # type: ignore[assignment]
    kv_dtype = dtype if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype
    return read_head(files, name, dtype, kv_dtype, notes)


def _planned(model: str, name: str, settings: EngineConfig, device: Device, notes: list[str]) -> PlannedModel:
    published = read_shape(model)
    shape, fp8_except = published.shape, published.fp8_except
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "float32" if device.threads else shape.dtype  # type: ignore[assignment]
    if dtype not in device.flops:
        raise ConfigError(f"dtype is {dtype!r}, but {device.name} computes in {', '.join(device.flops)}")
    if settings.quantization == "fp8" and "fp8" not in device.flops:
        raise ConfigError(f"quantization is 'fp8', but {device.name} computes in {', '.join(device.flops)}")
    if settings.quantization == "none":
        fp8_except = None
    elif settings.quantization == "fp8" and fp8_except is None:
        fp8_except = ()
    elif fp8_except is not None and "fp8" not in device.flops:
        notes.append(f"{name or model} has fp8 weights, which {device.name} does not compute with: planned in {dtype}")
        fp8_except = None
    kv_dtype = dtype if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype
    return PlannedModel(name=name or model, shape=shape, dtype=dtype, kv_dtype=kv_dtype, fp8_except=fp8_except)


def _in_fp8(model: PlannedModel) -> PlannedModel:
    return model if model.fp8_except is not None else replace(model, fp8_except=())
