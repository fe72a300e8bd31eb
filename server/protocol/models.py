"""Responses of GET /v1/models and /v1/models/{id}, in OpenAI's form, and in Anthropic's for its clients."""

from __future__ import annotations

from datetime import datetime

import msgspec


class Model(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "pilotfish"
    root: str
    parent: str | None = None
    """The model that a low-rank adapter adapts."""
    max_model_len: int | None
    """null until the model is loaded."""


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[Model]


class ModelInfo(msgspec.Struct, tag_field="type", tag="model"):
    """A model, for Anthropic's clients."""

    id: str
    display_name: str
    created_at: datetime
    max_input_tokens: int | None
    """null until the model is loaded."""
    max_tokens: int | None
    lifecycle: str = "active"


class ModelPage(msgspec.Struct):
    data: list[ModelInfo]
    first_id: str
    last_id: str
    has_more: bool = False
