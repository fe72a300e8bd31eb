"""Pilotfish: a serving engine built around speculative decoding that never changes the text.

This module exports what a library user needs. The subpackages `server`, `tools`, `engine`, `text` and `checkpoints`
are folders at the top of the repository. Exports are imported on first use: `LLM` needs torch, and the command line and
the server's process do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pilotfish.engine.params import SamplingParams
    from pilotfish.library.async_llm import AsyncLLM
    from pilotfish.library.llm import LLM

    __version__: str

__all__ = ["LLM", "AsyncLLM", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "pilotfish.library.llm",
    "AsyncLLM": "pilotfish.library.async_llm",
    "SamplingParams": "pilotfish.engine.params",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pilotfish")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"
