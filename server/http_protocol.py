"""uvicorn's HTTP protocol with limits on what a client may take (`server.connections`), and without upgrades.

Offers to upgrade the connection are ignored, as RFC 9110, 7.8, lets a server that takes none. httptools' parser ends at
the head of a request that offers an upgrade, such as `Upgrade: h2c`, which Java's client sends by default: its body
would be lost, or read as a request of its own. Here another parser gets the head without the offer, and goes on with
the body.

A client has a time for the head of a request, for its body, and for reading the answer. uvicorn itself has one only
between requests, and no bound on the size of a head.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pilotfish.server.connections import BODY_RATE, LARGEST_HEAD, LINGER_SECONDS, MOST_LINGERING, ConnectionLimits

_OFFER = frozenset({b"upgrade", b"http2-settings"})
"""What an offer of an upgrade consists of, beside the names of these headers in Connection."""


class LimitedProtocol(HttpToolsProtocol):
    """A connection. Limits cost a request two timers, and a chunk of an answer nothing."""

    _offered = False
    """Whether the head that was read last offers an upgrade: it is read again, without."""
    _timer: asyncio.TimerHandle | None = None
    """Of the head, the body, or the time before the first request."""
    _head_timed = False
    """Whether it is that of a head."""
    _stalled: asyncio.TimerHandle | None = None
    """Of an answer that the client does not read."""
    _refused = False
    """Whether the connection only waits for its end."""
    _in_head = False
    _head_received = 0
    """Bytes received since the head began."""
    _head_found = 0
    """Bytes of it that the parser has found."""
    _body_received = 0
    _body_since = 0.0

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits

    # Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        if len(self.connections) >= self._limits.most:
            self.transport = transport
            return self._refuse(503, "This server has as many connections as it can hold. Try again later.", "limit")
        super().connection_made(transport)
        self._timer = self.loop.call_later(self._limits.idle, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._stalled is not None:
            self._stalled.cancel()
        if self._refused:
            self._limits.lingering -= 1
        super().connection_lost(exc)

    def _refuse(self, status: int, message: str, reason: str) -> None:
        """Answer, and end the connection once the client has had time to read it: what it is still sending would reset
        the connection of one that is closed at once."""
        if self._refused:
            return
        self._limits.ended(reason)
        self._disarm()
        self._refused = True
        self._limits.lingering += 1
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            return self.transport.abort()  # it would become a part of the answer before
        phrase = HTTPStatus(status).phrase
        retry = "retry-after: 1\r\n" if status == 503 else ""
        self.transport.write(
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {len(message)}"
            f"\r\n{retry}connection: close\r\n\r\n{message}".encode()
        )
        if self._limits.lingering > MOST_LINGERING or not self.transport.can_write_eof():
            return self.transport.close()
        self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    # Time

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._head_timed = None, False

    def _arm_head(self) -> None:
        self._disarm()
        self._timer, self._head_timed = self.loop.call_later(self._limits.patience, self._head_is_late), True

    def _head_is_late(self) -> None:
        if not self.transport.is_closing():
            self._refuse(408, "The head of the request did not come in time.", "head")

    def _check_body(self) -> None:
        """End a request whose body comes too slowly. Time in which this server did not read does not count."""
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        left = self._limits.patience + self._body_received / BODY_RATE - (self.loop.time() - self._body_since)
        if self.flow.read_paused:
            self._body_since, left = self.loop.time(), self._limits.patience
        if left > 0:
            self._timer = self.loop.call_later(left, self._check_body)
        else:
            self.cycle.disconnected = True  # the application sees a client that has left
            self.cycle.message_event.set()
            self._refuse(408, "The body of the request did not come in time.", "body")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self._limits.patience, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _cut(self) -> None:
        self._limits.ended("answer")
        self.transport.abort()

    # What the parser finds

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
        if not self._head_timed and (self.cycle is None or self.cycle.response_complete):
            self._arm_head()
        self._head_received += len(data)
        self._feed(data)
        if self._in_head and self._head_received > LARGEST_HEAD:
            self._refuse_head()

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                if self.parser.get_method() == b"CONNECT":  # an upgrade by itself: there is no request without it
                    return self.send_400_response("Invalid HTTP request received.")
                data = self._without_offer() + data[offer.args[0] :]
                self._offered = False
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            except httptools.HttpParserError:
                if self._head_found > LARGEST_HEAD:
                    return self._refuse_head()
                self.logger.warning("Invalid HTTP request received.")
                return self.send_400_response("Invalid HTTP request received.")

    def _refuse_head(self) -> None:
        self._refuse(431, f"The head of the request has more than {LARGEST_HEAD} bytes.", "head")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_received, self._head_found = True, 0, 0

    def on_url(self, url: bytes) -> None:
        self._found(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._found(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _found(self, size: int) -> None:
        self._head_found += size
        if self._head_found > LARGEST_HEAD:
            raise ValueError  # which the parser turns into an error of its own

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._offered = self.parser.should_upgrade()
        if not self._offered:
            self._disarm()
            super().on_headers_complete()
            self._body_received, self._body_since = 0, self.loop.time()
            self._timer = self.loop.call_later(self._limits.patience, self._check_body)

    def on_body(self, body: bytes) -> None:
        if not self._offered:
            self._body_received += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._offered:
            self._disarm()
            super().on_message_complete()
            if self.cycle.response_complete and not self.transport.is_closing():  # before the end of its request
                self._unset_keepalive_if_required()
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

    def _without_offer(self) -> bytes:
        """Return the head that was read, with all its headers but those of the offer."""
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                tokens = map(bytes.strip, value.split(b","))
                value = b", ".join(token for token in tokens if token.lower() not in _OFFER)
            if name not in _OFFER:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])
