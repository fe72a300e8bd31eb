"""Traces that a real server sends to an OTLP receiver."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from pilotfish.errors import ConfigError
from pilotfish.server.telemetry.tracing import open_tracing, traces_url
from tests.support.running_server import MODEL, PROMPT, RunningServer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Receiver:
    """An OTLP receiver over HTTP: the spans that have come in, and the resources that sent them."""

    def __init__(self) -> None:
        receiver = self
        self.spans: list[Span] = []
        self.resource: dict[str, str] = {}
        self.headers: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = ExportTraceServiceRequest()
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                sent.ParseFromString(body)
                receiver.headers.append(f"{self.path} {self.headers.get('x-tenant', '')}".strip())
                for resource in sent.resource_spans:
                    receiver.resource |= {one.key: one.value.string_value for one in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        receiver.spans += scope.spans
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def of(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def start(tiny_llama: Path, tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    started: list[RunningServer] = []

    def make(*flags: str, **variables: str) -> RunningServer:
        own = ("--model", str(tiny_llama), "--kv-cache-memory", "8MiB", *flags)
        quick = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
        started.append(RunningServer(tmp_path / "log", *own, variables=quick | variables))
        started[-1].wait_for("/ready", 200)
        return started[-1]

    yield make
    for server in started:
        server.stop()


def attributes(span: Span) -> dict[str, Any]:
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in span.attributes}


@pytest.mark.process
def test_a_request_is_a_span_with_its_stages_below_the_clients(
    receiver: Receiver, start: Callable[..., RunningServer]
) -> None:
    running = start("--otlp-endpoint", receiver.url)
    traceparent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    with running.client() as client:
        done = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": PROMPT}], max_tokens=12, n=2, temperature=0.5, seed=3,
            extra_headers=traceparent, extra_body={"ignore_eos": True},
        )  # fmt: skip
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=MODEL, prompt=PROMPT, temperature=9)
    running.wait_until(lambda: len(receiver.spans) >= 8, 5)
    (served,) = receiver.of("POST /v1/chat/completions")
    assert (served.trace_id.hex(), served.parent_span_id.hex()) == (TRACE, PARENT)
    assert served.kind == Span.SPAN_KIND_SERVER
    known = attributes(served)
    timings = (done.model_extra or {})["timings"]
    assert done.usage is not None
    wanted = {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "pilotfish", "gen_ai.request.model": MODEL,
        "gen_ai.response.id": done.id, "gen_ai.usage.input_tokens": done.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": 24, "gen_ai.request.max_tokens": 12, "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3, "gen_ai.request.choice.count": 2, "http.response.status_code": 200,
        "http.route": "/v1/chat/completions", "pilotfish.drafter": timings["drafter"],
        "pilotfish.accepted_tokens": timings["accepted_tokens"],
    }  # fmt: skip
    assert {name: known.get(name) for name in wanted} == wanted
    assert [one.string_value for one in known["gen_ai.response.finish_reasons"].values] == ["length", "length"]
    for stage in ("queue", "prefill", "decode"):
        spans = receiver.of(stage)
        assert sorted(attributes(span)["pilotfish.answer"] for span in spans) == [0, 1]
        for span in spans:
            assert (span.trace_id, span.parent_span_id) == (served.trace_id, served.span_id)
            assert served.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= served.end_time_unix_nano
    for answer in (0, 1):  # one stage ends where the next begins
        queue, prefill, decode = (
            next(span for span in receiver.of(name) if attributes(span)["pilotfish.answer"] == answer)
            for name in ("queue", "prefill", "decode")
        )
        assert queue.end_time_unix_nano == prefill.start_time_unix_nano
        assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    (refused,) = receiver.of("POST /v1/completions")
    assert refused.trace_id.hex() != TRACE
    assert attributes(refused)["error.type"] == "invalid_value"
    assert refused.status.code != Status.STATUS_CODE_ERROR  # the client's mistake, says the convention
    assert not [span for span in receiver.spans if PROMPT in str(span)]
    assert not receiver.of("GET /ready")
    assert f"trace_id={TRACE}" in running.log.read_text()
    assert receiver.resource["service.name"] == "pilotfish"
    assert set(receiver.headers) == {"/v1/traces"}


@pytest.mark.process
def test_opentelemetrys_own_variables_are_honoured(receiver: Receiver, start: Callable[..., RunningServer]) -> None:
    running = start(
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
        OTEL_SERVICE_NAME="fish",
        OTEL_EXPORTER_OTLP_HEADERS="x-tenant=blue",
        OTEL_TRACES_SAMPLER="parentbased_always_off",
    )
    with running.client() as client:
        asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 3}
        client.completions.create(**asked)
        client.completions.create(**asked, extra_headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
        client.completions.create(**asked, extra_headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    running.process.terminate()  # what is left is sent at the end
    assert running.process.wait(60) == 0
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE}
    assert len(receiver.of("POST /v1/completions")) == 1
    assert receiver.resource["service.name"] == "fish"
    assert set(receiver.headers) == {"/v1/traces blue"}


@pytest.mark.process
def test_an_unreachable_receiver_does_not_stop_the_server(start: Callable[..., RunningServer]) -> None:
    running = start("--otlp-endpoint", "http://127.0.0.1:9")
    with running.client() as client:
        assert client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3).usage
    running.process.terminate()
    assert running.process.wait(60) == 0


@pytest.mark.parametrize("endpoint", ["collector:4317", "grpc://collector:4317", "4318", "http://", "http://[::1"])
def test_an_invalid_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"otlp_endpoint is .* but must be the URL"):
        open_tracing(endpoint)


@pytest.mark.parametrize("endpoint", ["http://a:4318", "http://a:4318/", "http://a:4318/v1/traces"])
def test_the_path_is_added_where_it_is_not_there(endpoint: str) -> None:
    assert traces_url(endpoint) == "http://a:4318/v1/traces"


WITHOUT = """
import sys
sys.modules["opentelemetry.sdk"] = None  # as if it were not installed
from pilotfish.server.cli.main import main
sys.exit(main(["serve", "--otlp-endpoint", "http://127.0.0.1:4318", "--port", "0", "--model", "none-such"]))
"""


@pytest.mark.process
def test_without_the_extra_the_error_says_how_to_get_it() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "pip install 'pilotfish[otel]'" in result.stderr


def test_tracing_is_off_unless_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_tracing(None) is None
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_tracing("http://127.0.0.1:4318") is None
