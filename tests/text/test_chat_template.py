"""What chat templates take of a conversation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pilotfish.text.chat_template import TemplateTraits, traits_of
from pilotfish.text.tokenizer import Tokenizer
from tests.support.templates import TEMPLATES
from tests.support.tiny import CHAT_TEMPLATE, train_tokenizer

NO_CALLS = {"calls": "", "parallel_calls": False, "results": False}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "gemma2": {"system": False, "later_system": False, "repeated_roles": False, "tools": "", **NO_CALLS},
    "gemma3": {"later_system": False, "repeated_roles": False, "tools": "", **NO_CALLS},
    "phi4_mini": {"tools": "system", **NO_CALLS},
    "llama3": {"parallel_calls": False},
    "mistral": {"later_system": False, "repeated_roles": False, "user_after_results": False},
    "deepseek": {"calls": "text", "no_content": None},
    "harmony": {"later_system": False, "parallel_calls": False, "thinking": True},
    "qwen3": {},
    "kimi": {},
    "chatml": {"tools": "", **NO_CALLS},
    "refuses": {},
}
ALL = {**TEMPLATES, "chatml": CHAT_TEMPLATE, "refuses": "{{ raise_exception('never') }}"}


@pytest.mark.parametrize("name", ALL)
def test_traits(name: str) -> None:
    inner = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), eos_token="<|im_end|>", chat_template=ALL[name])
    found, usual = asdict(traits_of(Tokenizer(inner).apply_chat_template)), asdict(TemplateTraits())
    assert {key: value for key, value in found.items() if value != usual[key]} == DIFFERENCES[name]
