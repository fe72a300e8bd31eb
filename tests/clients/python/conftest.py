"""What the suites share: the server's address and the model, and SDK clients without retries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import openai


@pytest.fixture(scope="session")
def url() -> str:
    return os.environ["PILOTFISH_URL"]


@pytest.fixture(scope="session")
def model() -> str:
    return os.environ["PILOTFISH_MODEL"]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture
async def async_client(url: str) -> openai.AsyncOpenAI:
    import openai

    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
