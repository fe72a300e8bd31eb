"""uvicorn's HTTP protocol, ignoring offers to upgrade the connection, as RFC 9110, 7.8, lets a server that takes none.

httptools' parser ends at the head of a request that offers an upgrade, such as `Upgrade: h2c`, which Java's client
sends by default: its body would be lost, or read as a request of its own. Here another parser gets the head without
the offer, and goes on with the body.
"""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_OFFER = frozenset({b"upgrade", b"http2-settings"})
"""What an offer of an upgrade consists of, beside the names of these headers in Connection."""


class NoUpgradeProtocol(HttpToolsProtocol):
    """Costs a request without an offer three calls, and a chunk of an answer nothing."""

    _offered = False
    """Whether the head that was read last offers an upgrade: it is read again, without."""

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
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
                self.logger.warning("Invalid HTTP request received.")
                return self.send_400_response("Invalid HTTP request received.")

    def on_headers_complete(self) -> None:
        self._offered = self.parser.should_upgrade()
        if not self._offered:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._offered:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._offered:
            super().on_message_complete()

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
