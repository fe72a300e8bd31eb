"""What the planner's tests share: setups of published models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from pilotfish.engine.config import EngineConfig
from pilotfish.tools.planner.devices import find_device
from pilotfish.tools.planner.setup import Setup, make_setup

DRAFTS = ("ngram", "8b=meta-llama/Llama-3.1-8B-Instruct", "1b=meta-llama/Llama-3.2-1B-Instruct")


@pytest.fixture
def setup_of() -> Callable[..., Setup]:
    """`setup_of(gpu, ranks, **settings)`: Llama-3.1-70B with two drafts, unless the settings say otherwise."""

    def make(gpu: str = "h100", ranks: int = 4, draft_ranks: int = 1, **settings: Any) -> Setup:
        chosen = {"model": "meta-llama/Llama-3.1-70B-Instruct", "drafter": DRAFTS, "kv_cache_share": 0.9} | settings
        whole = msgspec.convert({**chosen, "tensor_parallel_size": ranks}, EngineConfig)
        return make_setup(whole, find_device(gpu), draft_ranks)

    return make
