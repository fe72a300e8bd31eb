"""Pilotfish: a serving engine built around speculative decoding that never changes the text.

What a program that uses it as a library needs; the rooms below are `server`, `tools`, `engine`, `text` and
`checkpoints`, each a folder of its own at the top of the repository. Nothing is imported before it is asked for: `LLM`
needs torch, and the command line and the server's process do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pilotfish.engine.llm import LLM
    from pilotfish.engine.params import SamplingParams

    __version__: str

__all__ = ["LLM", "SamplingParams", "__version__"]

_HOMES = {"LLM": "pilotfish.engine.llm", "SamplingParams": "pilotfish.engine.params"}


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
