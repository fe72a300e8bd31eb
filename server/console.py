"""What the terminal says while the server starts: a few lines, with progress where someone is watching."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from engine.request import EngineInfo

_QUIET_SECONDS = 2.0
"""Where progress cannot stay on its line, it gets a new one only so often."""


class Console:
    """Writes to the terminal; on one that can go back in a line, progress stays on its line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._interactive = self._stream.isatty()
        self._what = ""
        self._said = -1
        self._began = self._last_line = time.monotonic()

    def line(self, text: str = "") -> None:
        """A line of its own."""
        self._end_progress()
        print(text, file=self._stream, flush=True)
        self._last_line = time.monotonic()

    def progress(self, what: str, share: float) -> None:
        """`what` is done to a share of 0 to 1."""
        percent = int(share * 100)
        if what != self._what:
            self._end_progress()
            self._what, self._said = what, -1
            if not self._interactive:
                self._indented(f"{what} ...")
        if self._interactive:
            if percent != self._said:
                print(f"\r\x1b[K  {what}: {percent}%", end="", file=self._stream, flush=True)
                self._said = percent
        elif percent < 100 and time.monotonic() - self._last_line > _QUIET_SECONDS:
            self._indented(f"{what}: {percent}%")

    def ready(self, info: EngineInfo, url: str, name: str, needs_key: bool) -> None:
        """The server takes requests: where, and how to send the first."""
        how = f"{info.dtype} on {info.device} ({info.kernels} kernels), drafters {', '.join(info.drafters)}"
        how += "" if info.default_drafter == "auto" else f" (by default {info.default_drafter})"
        capacity = f"{info.max_model_len} tokens of context, {info.num_blocks * info.block_size} in the KV cache"
        key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
        body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
        self.line(f"  {name}: {how}; {capacity}")
        self.line(f"Ready in {time.monotonic() - self._began:.1f} s: {url}/v1 (documentation at {url}/docs)")
        self.line(f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")

    def _indented(self, text: str) -> None:
        print(f"  {text}", file=self._stream, flush=True)
        self._last_line = time.monotonic()

    def _end_progress(self) -> None:
        if self._what and self._interactive:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
        self._what = ""
