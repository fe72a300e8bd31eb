"""Chat templates under limits of time and size: rendered in a process of their own, which can be stopped.

A template comes from a model's files and runs on a client's data. No sandbox within a process can stop all that a
template can do: `'%1000000000d'`, nested ranges, and comparisons of nested lists are loops or memory in single calls
into C. A process can be killed, and its memory is limited by the system.

Both ends are here: `TemplateProcess`, for the server, and `main`, for the process, which renders as transformers does.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import Any, BinaryIO

import msgspec
from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

START_SECONDS = 60.0
"""Until a process is ready, which takes one second on an idle machine."""
SECONDS = 2.0
"""That a template may take, and more for large conversations."""
SECONDS_PER_BYTE = 1 / 2**20
MEMORY = 2**30
"""Bytes of address space of the process, of which 200 MB are its own."""
MOST_TEXT = 2**26
"""Bytes of a rendered text."""
MOST_COMPLAINT = 2000
LARGE = 2**16
"""Bytes of a conversation from which it is rendered by another process, so that short ones do not wait for it."""
_LENGTH = struct.Struct("<q")
_READ = 2**20
_READY, _DONE, _REFUSED, _TOO_LARGE = b"r", b"d", b"e", b"m"
_MESSAGEPACK, _JSON = b"p", b"j"


class TemplateError(Exception):
    """A template refuses what it is given."""


class TemplateLimitError(Exception):
    """A template takes too long, or too much memory. The message follows "the model's chat template"."""


class TemplateProcesses:
    """One process for short conversations and one for long ones, started when they are needed first."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._short = TemplateProcess(seconds)
        self._long = TemplateProcess(seconds)

    def render(self, template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """Return the text. Blocks its thread, but no other. Raises TemplateError and TemplateLimitError."""
        asked = packed((template, messages, variables))
        return (self._short if len(asked) < LARGE else self._long).render(asked)

    def start(self) -> None:
        """Start the process for short conversations, without waiting for it."""
        self._short.start()

    def close(self) -> None:
        self._short.close()
        self._long.close()


class TemplateProcess:
    """A process that renders one conversation after another. Safe to use from several threads, which take turns."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._closed = False

    def start(self) -> None:
        with self._turn:
            self._started()

    def render(self, asked: bytes) -> str:
        """Return the text of a (template, messages, variables), `packed`."""
        with self._turn:
            process = self._started()
            allowed = self._seconds + len(asked) * SECONDS_PER_BYTE
            try:
                if not self._ready:
                    self._answer(process, START_SECONDS)
                    self._ready = True
                assert process.stdin is not None
                process.stdin.write(_LENGTH.pack(len(asked)) + asked)
                process.stdin.flush()
                kind, text = self._answer(process, allowed)
            except TimeoutError:
                self._end()
                self._started()
                raise TemplateLimitError(f"takes more than {allowed:.3g} s, which is the limit") from None
            except (OSError, EOFError):  # the system has ended it, probably for want of memory
                self._end()
                raise TemplateLimitError("takes more memory than there is") from None
            if kind == _TOO_LARGE:
                self._end()  # with all its memory
                raise TemplateLimitError(text)
            if kind == _REFUSED:
                raise TemplateError(text)
            return text

    def close(self) -> None:
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()  # whoever waits for it gets an error
        with self._turn:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise TemplateLimitError("cannot be rendered, because the server is stopping")
        if self._process is None:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
            self._process = subprocess.Popen(
                (sys.executable, "-P", "-m", "pilotfish.text.template_process"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(BrokenPipeError), self._process:
                pass
        self._process, self._ready = None, False

    def _answer(self, process: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, str]:
        """Return the kind and the text of an answer. Raises TimeoutError, EOFError at the process's end."""
        assert process.stdout is not None
        descriptor, deadline = process.stdout.fileno(), time.monotonic() + seconds
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        data, length = bytearray(), _LENGTH.size
        while len(data) < length:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise TimeoutError
            part = os.read(descriptor, _READ)
            if not part:
                raise EOFError
            data += part
            if len(data) >= _LENGTH.size:
                length = _LENGTH.size + 1 + _LENGTH.unpack_from(data)[0]
        return bytes(data[_LENGTH.size : _LENGTH.size + 1]), data[_LENGTH.size + 1 :].decode("utf-8", "surrogatepass")


class _Generation(Extension):
    """transformers' tag for what an assistant has said, as far as reading it goes."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def fault_of(template: str) -> str | None:
    """Return what is wrong with the syntax of a template, or None. It is read and not compiled, since compiling
    computes what is constant in it."""
    try:
        Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"]).parse(template)  # nosec B701  # no HTML
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except RecursionError:
        return "it is nested too deep"
    return None


def packed(asked: tuple[str, list[dict[str, Any]], dict[str, Any]]) -> bytes:
    """Return plain values as MessagePack, or as JSON if there are lone surrogates or integers of more than 64 bits
    among them, both of which clients can send. Raises TypeError for what is no plain value."""
    try:
        return _MESSAGEPACK + msgspec.msgpack.encode(asked)
    except (UnicodeEncodeError, OverflowError):
        return _JSON + json.dumps(asked).encode()


def unpacked(data: bytes) -> Any:
    """Return what was `packed`, tuples as lists."""
    form, content = data[:1], memoryview(data)[1:]
    return msgspec.msgpack.decode(content) if form == _MESSAGEPACK else json.loads(bytes(content))


def main() -> None:
    """Answer requests until standard input ends, as it does with the server."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the server's to act on
        signal.signal(number, signal.SIG_IGN)
    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    _send(target, _READY, "")
    while head := source.read(_LENGTH.size):
        try:
            template, messages, variables = unpacked(source.read(*_LENGTH.unpack(head)))
            rendered: Any = render_jinja_template([messages], chat_template=template, **variables)
            kind, text = _DONE, str(rendered[0][0])
            if len(text.encode("utf-8", "surrogatepass")) > MOST_TEXT:
                raise MemoryError
        except MemoryError:
            kind, text = _TOO_LARGE, "makes a text that is too large, or takes too much memory for it"
        except Exception as error:  # model's template, client's data: anything can be raised
            kind, text = _REFUSED, str(error)[:MOST_COMPLAINT]
        _send(target, kind, text)
        del text


def _send(target: BinaryIO, kind: bytes, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    target.write(_LENGTH.pack(len(data)) + kind + data)
    target.flush()


if __name__ == "__main__":
    main()
