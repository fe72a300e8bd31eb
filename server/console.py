"""Console output while a command starts, runs and stops: lines and progress on a terminal, or log messages."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from typing import TextIO

from pilotfish.engine.request import EngineInfo
from pilotfish.logs import fields

logger = logging.getLogger("pilotfish.server.console")

_QUIET_SECONDS = 2.0
"""Minimum interval between lines of progress when the output is not a terminal."""


class Console:
    """Writes to `stream` (default: standard error), with progress in place on a terminal; with `as_log`, to the log.

    What cannot be written (the disk is full, the reader of a pipe has gone) is lost, and nothing else.
    """

    def __init__(self, stream: TextIO | None = None, *, as_log: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._as_log = as_log
        self._interactive = self._stream.isatty() and not as_log
        self._what = ""
        self._said = -1
        self._began = self._phase_began = self._last_line = time.monotonic()

    def line(self, text: str = "") -> None:
        """Show a line."""
        self._end_progress()
        self._say(text)

    def error(self, text: str) -> None:
        """Show a line that reports an error."""
        self._end_progress()
        self._say(text, logging.ERROR)

    def progress(self, what: str, share: float) -> None:
        """Show the progress of `what`, a share from 0 to 1; always 0 if it cannot be measured."""
        percent = int(share * 100)
        if what != self._what:
            self._end_progress()
            self._what, self._said, self._phase_began = what, -1, time.monotonic()
            if not self._interactive:
                self._say(f"  {what} ...")
        if self._interactive:
            if percent != self._said:
                shown = f": {percent}%" if percent else " ..."
                self._print(f"\r\x1b[K  {what}{shown}", end="")
                self._said = percent
        elif 0 < percent < 100 and time.monotonic() - self._last_line > _QUIET_SECONDS:
            self._say(f"  {what}: {percent}%", percent=percent)

    def ready(self, info: EngineInfo, url: str, name: str, needs_key: bool, page: bool) -> None:
        """Show that the server is ready: the model, its address, and a first request to send."""
        how = f"{described(info)} on {info.device} ({info.kernels} kernels), drafters {', '.join(info.drafters)}"
        how += "" if info.default_drafter == "auto" else f" (by default {info.default_drafter})"
        capacity = f"{info.max_model_len} tokens of context, {info.num_blocks * info.block_size} in the KV cache"
        key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
        body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
        browse = f"a page for browsers at {url}, " if page else ""
        self.line(f"  {name}: {how}; {capacity}")
        self.line(f"Ready in {time.monotonic() - self._began:.1f} s: {url}/v1 ({browse}documentation at {url}/docs)")
        if not self._as_log:
            self.line(f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")

    def _say(self, text: str, level: int = logging.INFO, **own: object) -> None:
        if self._as_log:
            logger.log(level, "%s", text.strip(), extra=fields(**own))
        else:
            self._print(text)
        self._last_line = time.monotonic()

    def _print(self, text: str, end: str = "\n") -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            print(text, end=end, file=self._stream, flush=True)

    def _end_progress(self) -> None:
        """Show how long the last progress took, once it is done."""
        if not self._what:
            return
        seconds = time.monotonic() - self._phase_began
        if self._interactive:
            self._print("\r\x1b[K", end="")
        self._say(f"  {self._what}: {seconds:.1f} s", seconds=round(seconds, 3))
        self._what = ""


def described(info: EngineInfo) -> str:
    """The dtype of the engine, and of its weights if they are in another form."""
    if info.weights in ((), (info.dtype,)):
        return info.dtype
    return f"{info.dtype}, weights in {' and '.join(info.weights)},"
