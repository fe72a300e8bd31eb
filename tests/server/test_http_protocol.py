"""Requests that offer an upgrade, on the wire, however they are cut."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Sequence
from contextlib import suppress

import httpx
import pytest

from tests.support.running_server import MODEL, RunningServer

pytestmark = pytest.mark.process

BODY = json.dumps({"prompt": "light", "model": MODEL}).encode()
OFFERS = [
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n",
    b"Connection: keep-alive, upgrade\r\nUpgrade: websocket\r\n",
    b"Upgrade: TLS/1.0, HTTP/1.1\r\nconnection: Upgrade\r\n",
    b"",
]


def post(offer: bytes, body: bytes = BODY, chunked: bool = False) -> bytes:
    head = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" + offer
    if chunked:
        return head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def exchange(server: RunningServer, parts: Sequence[bytes], answers: int) -> bytes:
    """Send the parts one after the other, and return what comes back until `answers` answers are there."""
    url = httpx.URL(server.url)
    received = b""
    with socket.create_connection((url.host, url.port or 80), timeout=5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            connection.sendall(part)
            time.sleep(0.02 if len(parts) > 1 else 0)
        while received.count(b"HTTP/1.1 ") < answers or not received.endswith(b"}"):
            more = connection.recv(1 << 16)
            if not more:
                break
            received += more
        connection.settimeout(0.1)
        with suppress(TimeoutError):
            received += connection.recv(1 << 16)
    return received


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("offer", OFFERS, ids=["h2c", "websocket", "TLS", "none"])
def test_an_offer_of_an_upgrade_is_ignored_and_the_body_read(
    server: RunningServer, offer: bytes, chunked: bool
) -> None:
    request = post(offer, chunked=chunked)
    head = request.index(b"\r\n\r\n") + 4
    cuts = [
        [request],
        [request[:head], request[head:]],
        [request[: head - 20], request[head - 20 : head + 5], request[head + 5 :]],
    ]
    for parts in cuts:
        answer = exchange(server, parts, 1)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b'"count":' in answer


def test_requests_may_follow_each_other_with_and_without_offers(server: RunningServer) -> None:
    answer = exchange(server, [post(OFFERS[0]) + post(OFFERS[3]) + post(OFFERS[1], chunked=True) + post(OFFERS[0])], 4)
    assert answer.count(b"HTTP/1.1 200") == answer.count(b'"count":') == 4


def test_a_body_is_never_a_request_of_its_own(server: RunningServer) -> None:
    answer = exchange(server, [post(OFFERS[0], b""), b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"], 2)
    statuses = re.findall(rb"HTTP/1.1 (\d+)", answer)
    assert statuses == [b"400", b"200"]
    inner = b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = exchange(server, [post(OFFERS[0], inner)[: -len(inner)], inner], 1)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith(b"HTTP/1.1 400")


def test_connect_is_refused(server: RunningServer) -> None:
    answer = exchange(server, [b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n"], 1)
    assert answer.startswith(b"HTTP/1.1 400")
