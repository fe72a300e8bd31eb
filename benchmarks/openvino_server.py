"""OpenVINO GenAI behind an OpenAI-compatible server, so that `compare_servers.py` can take turns with it.

    python -m venv openvino && openvino/bin/pip install openvino-genai==2026.4.1.0
    openvino/bin/python benchmarks/openvino_server.py model.gguf --pipeline continuous --port 9002

It runs in that environment alone: neither Pilotfish nor a web framework has to be installed there. `--pipeline llm` is
OpenVINO's pipeline for one request at a time (others wait), `continuous` its continuous batching, and `--prompt-lookup`
its n-gram speculation, for either. The pipeline has a process of its own; one thread here turns tokens into text and
sends them.

Served are GET /health and /v1/models, and POST /v1/chat/completions and /v1/completions with `max_tokens`,
`temperature`, `top_p`, `seed`, `ignore_eos`, `stream` and `stream_options.include_usage`; one choice, text alone. Other
fields are ignored. It is for measuring on this machine: there are no keys, and no limits on what a client may ask.
"""

from __future__ import annotations

import argparse
import codecs
import json
import multiprocessing
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

LOOKUP = {"num_assistant_tokens": 5, "max_ngram_size": 3}
"""What OpenVINO's own sample of prompt lookup sets."""

Tokens = Callable[[list[int] | str | None], None]
"""Takes the next tokens of an answer; at last None, or, as text, what has gone wrong."""
Events = list[tuple[int, list[int] | str | None]]
"""What has come of requests, by their numbers."""


@dataclass(frozen=True)
class Settings:
    """How OpenVINO's pipeline is made."""

    model: str
    kind: str
    properties: dict[str, Any]
    cache_gib: int
    step_tokens: int


class Pipeline:
    """OpenVINO's pipeline in a process of its own: it holds the interpreter's lock while it computes, so that in one
    process neither its tokens could be sent meanwhile, nor would it go on before they are."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        work = run_one_at_a_time if settings.kind == "llm" else run_continuous
        self._process = context.Process(target=work, args=(settings, there), daemon=True)
        self._process.start()
        there.close()
        self._takers: dict[int, Tokens] = {}
        self._lock, self._count = threading.Lock(), 0
        self._connection.recv()  # it is ready
        threading.Thread(target=self._read, daemon=True).start()

    def submit(self, ids: list[int], config: dict[str, Any], tokens: Tokens) -> Callable[[], None]:
        """Begin to generate. Returns a function that ends it early."""
        with self._lock:
            number = self._count
            self._count += 1
            self._takers[number] = tokens
            self._connection.send((number, ids, config))
        return lambda: self._cancel(number)

    def _cancel(self, number: int) -> None:
        with self._lock:
            self._connection.send((number, None, None))

    def _read(self) -> None:
        try:
            while True:
                for number, what in self._connection.recv():
                    taker = self._takers[number] if isinstance(what, list) else self._takers.pop(number)
                    taker(what)
        except EOFError:
            for taker in list(self._takers.values()):
                taker("OpenVINO's process has ended")


def run_one_at_a_time(settings: Settings, connection: Connection) -> None:
    """The LLMPipeline's process: one request after the other."""
    pipeline = genai.LLMPipeline(settings.model, "CPU", **settings.properties)
    connection.send("ready")
    waiting: dict[int, tuple[list[int], dict[str, Any]]] = {}

    class Streamer(genai.StreamerBase):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def write(self, token: int | list[int]) -> Any:
            connection.send([(self.number, [token] if isinstance(token, int) else list(token))])
            gone = False
            while connection.poll():
                number, ids, config = connection.recv()
                if ids is not None:
                    waiting[number] = ids, config
                elif number != self.number:
                    waiting.pop(number, None)
                else:
                    gone = True
            return genai.StreamingStatus.CANCEL if gone else genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    while True:
        if not waiting:
            try:
                number, ids, config = connection.recv()
            except EOFError:
                return
            if ids is not None:
                waiting[number] = ids, config
            continue
        number = next(iter(waiting))
        ids, config = waiting.pop(number)
        end: str | None = None
        try:
            pipeline.generate(openvino.Tensor(np.array([ids])), genai.GenerationConfig(**config), Streamer(number))
        except Exception as error:  # whatever it is, the client has to hear of it, and the next one is served
            end = str(error)
        connection.send([(number, end)])


def run_continuous(settings: Settings, connection: Connection) -> None:
    """The ContinuousBatchingPipeline's process."""
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens = settings.cache_gib, settings.step_tokens
    pipeline = genai.ContinuousBatchingPipeline(settings.model, scheduler, "CPU", settings.properties)
    connection.send("ready")
    running: dict[int, Any] = {}
    while True:
        while not running or connection.poll():
            try:
                number, ids, config = connection.recv()
            except EOFError:
                return
            if ids is None:
                if number in running:
                    running.pop(number).cancel()
                    connection.send([(number, None)])
                continue
            try:
                tensor = openvino.Tensor(np.array([ids]))
                running[number] = pipeline.add_request(number, tensor, genai.GenerationConfig(**config))
            except Exception as error:
                connection.send([(number, str(error))])
        try:
            pipeline.step()
        except Exception as error:
            connection.send([(number, str(error)) for number in running])
            running.clear()
            continue
        events: Events = []
        for number, handle in list(running.items()):
            ids = []
            while handle.can_read():
                ids += next(iter(handle.read().values())).generated_ids
            if ids:
                events.append((number, ids))
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                events.append((number, None))
                del running[number]
        connection.send(events)


BYTE_TOKEN = re.compile(rb"<0x([0-9A-F]{2})>")


class Detokenizer:
    """Tokens as text. The bytes of each are found once, at the start: a call of OpenVINO's tokenizer takes a hundredth
    of a pass, and threads that the pass needs."""

    def __init__(self, tokenizer: Any) -> None:
        entries: dict[bytes, int] = tokenizer.get_vocab()
        vocabulary = [b""] * (1 + max(entries.values()))
        for spelled, token in entries.items():
            vocabulary[token] = spelled
        before = int(tokenizer.encode("a", add_special_tokens=False).input_ids.data[0][-1])  # or a space would be lost
        self._bytes: list[bytes] = []
        for start in range(0, len(vocabulary), 1024):
            some = vocabulary[start : start + 1024]
            texts = tokenizer.decode([[before, start + i] for i in range(len(some))])
            self._bytes += (_bytes_of(each, text[1:]) for each, text in zip(some, texts, strict=True))

    def begin(self) -> TextPieces:
        return TextPieces(self._bytes)


def _bytes_of(spelled: bytes, text: str) -> bytes:
    """The bytes of a token with this entry in the vocabulary and this text, which lacks incomplete characters, and is
    empty for special tokens."""
    if byte := BYTE_TOKEN.fullmatch(spelled):
        return bytes.fromhex(byte[1].decode())
    try:
        spelled.decode()
    except UnicodeDecodeError:
        return spelled
    return text.encode()


class TextPieces:
    """An answer's tokens as text, in pieces that are whole characters."""

    def __init__(self, bytes_of: list[bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: list[int], last: bool = False) -> str:
        return self._decoder.decode(b"".join(self._bytes_of[each] for each in ids), final=last)


def generation_config(body: dict[str, Any], lookup: dict[str, int]) -> dict[str, Any]:
    """The GenerationConfig of a request, as its arguments. Raises ValueError, KeyError or TypeError."""
    tokens = int(body.get("max_completion_tokens") or body.get("max_tokens") or 128)
    if tokens < 1:  # OpenVINO would never end, or crash
        raise ValueError(f"max_tokens is {tokens}, but must be at least 1")
    temperature = float(body.get("temperature", 1.0))
    sampling = {"temperature": temperature, "top_p": float(body.get("top_p", 1.0))} if temperature else {}
    if temperature and body.get("seed") is not None:
        sampling["rng_seed"] = int(body["seed"])
    return {
        "max_new_tokens": tokens,
        "do_sample": bool(temperature),
        "ignore_eos": bool(body.get("ignore_eos", False)),
        "apply_chat_template": False,
        **sampling,
        **lookup,
    }


class Handler(BaseHTTPRequestHandler):
    pipeline: Pipeline
    tokenizer: Any
    detokenizer: Detokenizer
    name: str
    """The model's, for clients."""
    lookup: dict[str, int]
    """Settings of prompt lookup for every request."""
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {"status": "ok"})
        elif self.path == "/v1/models":
            self._answer(
                200, {"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "openvino"}]}
            )
        else:
            self._refuse(404, f"no path {self.path!r}")

    def do_POST(self) -> None:
        if self.path not in ("/v1/chat/completions", "/v1/completions"):
            return self._refuse(404, f"no path {self.path!r}")
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chat = self.path == "/v1/chat/completions"
            text = self._chat_prompt(body["messages"]) if chat else body["prompt"]
            encoded = self.tokenizer.encode(text, add_special_tokens=not chat).input_ids.data[0].tolist()
            config = generation_config(body, self.lookup)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            return self._refuse(400, f"{type(error).__name__}: {error}")
        self._generate(body, chat, encoded, config)

    def _chat_prompt(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, True))

    def _generate(self, body: dict[str, Any], chat: bool, ids: list[int], config: dict[str, Any]) -> None:
        streams, pieces = bool(body.get("stream")), list[str]()
        answer = _Answer(self.name, chat, len(ids), config["max_new_tokens"], self.detokenizer.begin())

        def send(piece: str) -> None:
            self.wfile.write(answer.chunk(piece))

        try:
            if streams:
                self._start(200, "text/event-stream")
            end_early = self.pipeline.submit(ids, config, answer.taker(send if streams else pieces.append))
            try:
                answer.wait()
            except OSError:  # the client has gone
                return end_early()
            if not streams:
                return self._answer(200, answer.whole("".join(pieces)))
            self.wfile.write(answer.chunk(None))
            if (body.get("stream_options") or {}).get("include_usage"):
                self._send(answer.usage_chunk())
            self.wfile.write(b"data: [DONE]\n\n")
        except GenerationError as error:
            if streams:
                self._send({"error": {"message": str(error), "type": "server_error"}})
            else:
                self._refuse(500, str(error))
        except OSError:
            pass

    def _start(self, status: int, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, event: dict[str, Any]) -> None:
        self.wfile.write(_event(event))

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self._start(status, "application/json", len(data))
        self.wfile.write(data)

    def _refuse(self, status: int, message: str) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self._answer(status, {"error": {"message": message, "type": kind}})

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _event(event: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % json.dumps(event, separators=(",", ":")).encode()


class GenerationError(Exception):
    """OpenVINO could not generate."""


class _Answer:
    """What is sent of an answer: pieces of text, chunks, and its usage."""

    def __init__(self, model: str, chat: bool, prompt_tokens: int, max_tokens: int, text: TextPieces) -> None:
        self._chat, self._prompt_tokens, self._max_tokens, self._tokens = chat, prompt_tokens, max_tokens, 0
        self._text, self._kind = text, "chat.completion" if chat else "text_completion"
        self._head = {"id": f"{self._kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._ended: queue.SimpleQueue[OSError | str | None] = queue.SimpleQueue()
        choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        choice |= {"delta": {"content": 0}} if chat else {"text": 0}
        self._before, self._after = _event(self._with_head(".chunk" if chat else "", [choice])).rsplit(b"0", 1)

    def taker(self, deliver: Callable[[str], object]) -> Tokens:
        """Returns a function for `Pipeline.submit`, which delivers pieces of text. It is called by one thread for all
        answers, which saves a switch of threads for each token."""

        def take(what: list[int] | str | None) -> None:
            if isinstance(what, str):
                return self._ended.put(what)
            self._tokens += len(what or ())
            try:
                if piece := self._text.push(what or [], last=what is None):
                    deliver(piece)
            except OSError as error:
                self._ended.put(error)
            else:
                if what is None:
                    self._ended.put(None)

        return take

    def wait(self) -> None:
        """Wait for the end. Raises GenerationError, or OSError if it could not be delivered."""
        end = self._ended.get()
        if isinstance(end, OSError):
            raise end
        if end is not None:
            raise GenerationError(end)

    def chunk(self, piece: str | None) -> bytes:
        """The event of a piece of text; None: the end."""
        if piece is not None:
            return b"%s%s%s" % (self._before, json.dumps(piece).encode(), self._after)
        choice: dict[str, Any] = {"index": 0, "finish_reason": self._finish_reason}
        choice["delta" if self._chat else "text"] = {} if self._chat else ""
        return _event(self._with_head(".chunk" if self._chat else "", [choice]))

    def usage_chunk(self) -> dict[str, Any]:
        return self._with_head(".chunk" if self._chat else "", []) | {"usage": self._usage}

    def whole(self, text: str) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": self._finish_reason}
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return self._with_head("", [choice]) | {"usage": self._usage}

    def _with_head(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self._kind + suffix, "choices": choices}

    @property
    def _finish_reason(self) -> str:
        return "length" if self._tokens >= self._max_tokens else "stop"

    @property
    def _usage(self) -> dict[str, int]:
        prompt, answer = self._prompt_tokens, self._tokens
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a .gguf file, or the folder of a model in OpenVINO's format")
    parser.add_argument("--name", help="the model's, for clients (default: the file's)")
    parser.add_argument("--pipeline", choices=["llm", "continuous"], default="continuous")
    parser.add_argument(
        "--prompt-lookup", action="store_true", help="speculate by n-grams of the prompt and the answer"
    )
    parser.add_argument("--threads", type=int, default=0, help="inference threads (default: OpenVINO's own choice)")
    parser.add_argument("--cache-gib", type=int, default=2, help="KV cache of --pipeline continuous")
    parser.add_argument("--step-tokens", type=int, default=256, help="most tokens of a step of --pipeline continuous")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9002, help="0: any that is free")
    args = parser.parse_args()
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": args.threads} if args.threads else {}
    if args.prompt_lookup:
        properties["prompt_lookup"] = True
    Handler.name, Handler.lookup = args.name or args.model.stem, LOOKUP if args.prompt_lookup else {}
    Handler.pipeline = Pipeline(Settings(str(args.model), args.pipeline, properties, args.cache_gib, args.step_tokens))
    Handler.tokenizer = genai.Tokenizer(str(args.model))
    Handler.detokenizer = Detokenizer(Handler.tokenizer)
    with ThreadingHTTPServer((args.host, args.port), Handler) as server:
        print(f"ready: http://{args.host}:{server.server_port}/v1, {Handler.name}", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
