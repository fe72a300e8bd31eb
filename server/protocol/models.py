"""Responses of GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import msgspec


class Model(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "pilotfish"
    root: str
    max_model_len: int | None
    """null until the model is loaded."""


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[Model]
