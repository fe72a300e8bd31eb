"""Attempt: work that the device's memory may not suffice for, and that can be given up."""

from __future__ import annotations

from types import TracebackType

import torch


class Attempt:
    """A context that ends where its body runs out of the device's memory; `problem` then has torch's message.

    Leave it before giving back memory: until then the error holds on to all that the body had computed.
    """

    def __init__(self) -> None:
        self.problem: str | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, torch.OutOfMemoryError):
            return False
        self.problem = " ".join(str(error).split()) or "out of memory"
        return True
