"""Setup: a configuration's models, as they would be on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pilotfish.engine.config import EngineConfig, with_step_limits
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.eagle3_checkpoint import check_target
from pilotfish.engine.models.layout import MAX_RANKS, use_one_of, what_does_not_divide
from pilotfish.engine.speculation.drafters.drafter import check_vocabulary
from pilotfish.engine.speculation.drafters.registry import lookup_names
from pilotfish.engine.weights.blocks import QUANTIZED_TO, Storage
from pilotfish.engine.weights.quantization import SCHEMES, Quantization
from pilotfish.errors import ConfigError
from pilotfish.tools.planner.devices import Device
from pilotfish.tools.planner.heads import PlannedHead, find_head, read_head
from pilotfish.tools.planner.models import PlannedModel, read_shape

Kind = Literal["lookup", "draft model", "EAGLE-3 head"]


@dataclass(frozen=True, slots=True)
class PlannedDraft:
    """A drafter by its name; `model` is None for a lookup drafter."""

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
    """Ranks of draft models: 1 (whole on rank 0, which is the fullest) or `ranks`. EAGLE-3 heads are always whole."""
    notes: tuple[str, ...] = ()
    """Assumptions that were made, for the report."""

    @property
    def draft_models(self) -> list[PlannedModel | PlannedHead]:
        return [draft.model for draft in self.drafts if draft.model is not None]

    @property
    def split(self) -> list[PlannedModel]:
        """The models that are sharded over the ranks."""
        drafts = self.draft_models if self.draft_ranks > 1 else []
        return [self.target, *(model for model in drafts if isinstance(model, PlannedModel))]

    def ranks_of(self, draft: PlannedModel | PlannedHead) -> int:
        """Return the number of ranks that a draft model is sharded over."""
        return 1 if isinstance(draft, PlannedHead) else self.draft_ranks

    @property
    def max_model_len(self) -> int:
        return self.settings.max_model_len or self.target.shape.max_position

    def with_ranks(self, ranks: int) -> Setup:
        """Return the same setup over so many GPUs."""
        return replace(self, ranks=ranks, draft_ranks=self.draft_ranks if self.draft_ranks == 1 else ranks)

    def quantized(self, scheme: str) -> Setup:
        """Return the setup with all models quantized by a scheme, except EAGLE-3 heads and those quantized already."""
        drafts = tuple(
            replace(draft, model=_quantized(draft.model, scheme)) if isinstance(draft.model, PlannedModel) else draft
            for draft in self.drafts
        )
        return replace(self, target=_quantized(self.target, scheme), drafts=drafts)


def make_setup(settings: EngineConfig, device: Device, draft_ranks: int = 1) -> Setup:
    """Make a setup. Raises ConfigError for settings that cannot work on this device, ModelError for an unknown
    shape."""
    settings = with_step_limits(settings, None if device.threads else device.memory)
    notes: list[str] = []
    target = _planned(settings.model, settings.model, settings, device, notes)
    drafts = []
    for entry in settings.drafter:
        if entry in lookup_names():
            drafts.append(PlannedDraft(entry, None))
        else:
            name, _, model = entry.rpartition("=")
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
    """Return the numbers of ranks, up to MAX_RANKS, that all models can be sharded over; only 1 without a link."""
    most = MAX_RANKS if setup.device.link_bandwidth else 1
    return [n for n in range(1, most + 1) if not any(_obstacles(model, n) for model in setup.split)]


def _obstacles(model: PlannedModel, ranks: int) -> list[str]:
    return what_does_not_divide(model.shape, ranks, model.quantization.scheme if model.quantization else None)


def _check(setup: Setup) -> None:
    for draft in setup.drafts:
        if draft.model is not None:
            check_vocabulary(draft.name, draft.model.shape, setup.target.shape)
        if isinstance(draft.model, PlannedHead):
            check_target(draft.name, draft.model.config, setup.target.shape)
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
            remedy = use_one_of(ranks_that_divide(setup))
            raise ConfigError(
                f"tensor_parallel_size is {setup.ranks}, but of {model.name} {' and '.join(reasons)}: {remedy}"
            )
    if setup.max_model_len > setup.target.shape.max_position:
        raise ConfigError(
            f"max_model_len is {setup.settings.max_model_len}, but the model's context is "
            f"{setup.target.shape.max_position}"
        )


def _draft(
    model: str, name: str, settings: EngineConfig, device: Device, notes: list[str]
) -> PlannedModel | PlannedHead:
    files = find_head(model)
    if files is None:
        return _planned(model, name, settings, device, notes)
    return read_head(files, name, *_dtypes(settings, device, read_shape(settings.model)), notes)


def _planned(model: str, name: str, settings: EngineConfig, device: Device, notes: list[str]) -> PlannedModel:
    shape = read_shape(model)
    dtype, kv_dtype = _dtypes(settings, device, shape)
    if dtype not in device.flops:
        raise ConfigError(f"dtype is {dtype!r}, but {device.name} computes in {', '.join(device.flops)}")
    quantization, setting = shape.quantization, settings.quantization
    if setting in QUANTIZED_TO:
        if not device.threads or dtype != "float32":
            raise ConfigError(
                f"quantization is {setting!r}, which is for CPUs and float32: not {dtype} on {device.name}"
            )
        layers, vocabulary = QUANTIZED_TO[setting]
        storage = Storage(layers=layers, vocabulary=vocabulary)
        return PlannedModel(name=name, shape=shape, dtype=dtype, kv_dtype=kv_dtype, storage=storage)
    if setting in SCHEMES and not _computes(device, setting, dtype):
        raise ConfigError(f"quantization is {setting!r}, but {device.name} computes in {', '.join(device.flops)}")
    if setting == "none":
        quantization = None
    elif setting in SCHEMES:
        quantization = quantization or Quantization(setting)
    elif quantization is not None and not _computes(device, quantization.scheme, dtype):
        notes.append(
            f"{name} has {quantization.scheme} weights, which {device.name} does not compute with: planned in {dtype}"
        )
        quantization = None
    return PlannedModel(name=name, shape=shape, dtype=dtype, kv_dtype=kv_dtype, quantization=quantization)


def _dtypes(settings: EngineConfig, device: Device, shape: ModelConfig) -> tuple[str, str]:
    """Return the dtypes of activations and of the KV cache, for a target of that shape and its draft models."""
    auto = "float32" if device.threads else shape.dtype
    dtype = auto if settings.dtype == "auto" else settings.dtype
    kept = dtype if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype
    if kept not in (dtype, "fp8") and not (device.threads and dtype == "float32"):
        raise ConfigError(
            f"kv_cache_dtype is {kept!r}, which only the CPU's kernels read, in models that they compute in float32: "
            f"use 'auto' or 'fp8' for one in {dtype} on {device.name}"
        )
    return dtype, kept


def _computes(device: Device, scheme: str, dtype: str) -> bool:
    return (SCHEMES[scheme].arithmetic or dtype) in device.flops


def _quantized(model: PlannedModel, scheme: str) -> PlannedModel:
    return model if model.quantization is not None else replace(model, quantization=Quantization(scheme))
