"""Requests of POST /v1/load_lora_adapter and /v1/unload_lora_adapter, compatible with vLLM."""

from __future__ import annotations

from pilotfish.server.protocol.common import ApiModel


class LoadAdapterRequest(ApiModel):
    lora_name: str
    """The name by which requests choose it, as their model."""
    lora_path: str
    """A folder that PEFT has written, on the server's machine."""


class UnloadAdapterRequest(ApiModel):
    lora_name: str
