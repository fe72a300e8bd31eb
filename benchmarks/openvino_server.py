"""OpenVINO GenAI behind an OpenAI-compatible server, so that `compare_servers.py` can take turns with it.

    python -m venv openvino && openvino/bin/pip install openvino-genai==2026.4.1.0
    openvino/bin/python benchmarks/openvino_server.py model.gguf --pipeline continuous --port 9002

It runs in that environment alone: neither Pilotfish nor a web framework has to be installed there. `--pipeline llm` is
OpenVINO's pipeline for one request at a time (others wait), `continuous` its continuous batching, and `--prompt-lookup`
its n-gram speculation, for either. The pipelines' own threads generate; tokens are turned into text and sent by a
thread of each request.

Served are GET /health and /v1/models, and POST /v1/chat/completions and /v1/completions with `max_tokens`,
`temperature`, `top_p`, `seed`, `ignore_eos`, `stream` and `stream_options.include_usage`; one choice, text alone. Other
fields are ignored. It is for measuring on this machine: there are no keys, and no limits on what a client may ask.
"""

from __future__ import annotations

import argparse
import codecs
import json
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import openvino_genai as genai

Tokens = Callable[[list[int] | Exception | None], None]
"""Takes the next tokens of an answer; at last None, or what has gone wrong."""


LOOKUP = {"num_assistant_tokens": 5, "max_ngram_size": 3}
"""What OpenVINO's own sample of prompt lookup sets."""


class Pipeline(Protocol):
    tokenizer: Any

    def submit(self, prompt: Any, config: Any, tokens: Tokens) -> Callable[[], None]:
        """Begin to generate. prompt: (1, tokens) int64, an OpenVINO tensor. Returns a function that ends it early."""
        ...


class OneAtATime:
    """The LLMPipeline in a thread of its own, one request after the other."""

    def __init__(self, model: Path, properties: dict[str, Any]) -> None:
        self._pipeline = genai.LLMPipeline(str(model), "CPU", **properties)
        self.tokenizer = self._pipeline.get_tokenizer()
        self._waiting: queue.SimpleQueue[tuple[Any, Any, Tokens, threading.Event]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, prompt: Any, config: Any, tokens: Tokens) -> Callable[[], None]:
        gone = threading.Event()
        self._waiting.put((prompt, config, tokens, gone))
        return gone.set

    def _work(self) -> None:
        while True:
            prompt, config, tokens, gone = self._waiting.get()
            if not gone.is_set():
                try:
                    self._pipeline.generate(prompt, config, _Streamer(tokens, gone))
                except Exception as error:  # whatever it is, the client has to hear of it, and the next one is served
                    tokens(error)
            tokens(None)


class _Streamer(genai.StreamerBase):
    def __init__(self, tokens: Tokens, gone: threading.Event) -> None:
        super().__init__()
        self._tokens, self._gone = tokens, gone

    def write(self, token: int | list[int]) -> Any:
        self._tokens([token] if isinstance(token, int) else list(token))
        return genai.StreamingStatus.CANCEL if self._gone.is_set() else genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class Continuous:
    """The ContinuousBatchingPipeline, stepped by a thread of its own."""

    def __init__(self, model: Path, properties: dict[str, Any], cache_gib: int, step_tokens: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_batched_tokens = cache_gib, step_tokens
        self._pipeline = genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        self.tokenizer = self._pipeline.get_tokenizer()
        self._waiting: queue.SimpleQueue[tuple[Any, Any, Tokens, threading.Event]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, prompt: Any, config: Any, tokens: Tokens) -> Callable[[], None]:
        gone = threading.Event()
        self._waiting.put((prompt, config, tokens, gone))
        return gone.set

    def _work(self) -> None:
        running: list[tuple[Any, Tokens, threading.Event]] = []
        number = 0
        while True:
            while not running or not self._waiting.empty():
                prompt, config, tokens, gone = self._waiting.get()
                try:
                    running.append((self._pipeline.add_request(number, prompt, config), tokens, gone))
                except Exception as error:
                    tokens(error)
                number += 1
            try:
                self._pipeline.step()
            except Exception as error:
                for _, tokens, _ in running:
                    tokens(error)
                running.clear()
                continue
            for each in list(running):
                handle, tokens, gone = each
                if gone.is_set():
                    handle.cancel()
                while handle.can_read():
                    tokens(next(iter(handle.read().values())).generated_ids)
                if gone.is_set() or handle.get_status() != genai.GenerationStatus.RUNNING:
                    tokens(None)
                    running.remove(each)


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


def generation_config(body: dict[str, Any], lookup: dict[str, int]) -> Any:
    """The GenerationConfig of a request. Raises ValueError, KeyError or TypeError."""
    tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 128
    temperature = float(body.get("temperature", 1.0))
    sampling = {"temperature": temperature, "top_p": float(body.get("top_p", 1.0))} if temperature else {}
    if temperature and body.get("seed") is not None:
        sampling["rng_seed"] = int(body["seed"])
    return genai.GenerationConfig(
        max_new_tokens=int(tokens),
        do_sample=bool(temperature),
        ignore_eos=bool(body.get("ignore_eos", False)),
        apply_chat_template=False,
        **sampling,
        **lookup,
    )


class Handler(BaseHTTPRequestHandler):
    pipeline: Pipeline
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
            encoded = self.pipeline.tokenizer.encode(text, add_special_tokens=not chat).input_ids
            config = generation_config(body, self.lookup)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            return self._refuse(400, f"{type(error).__name__}: {error}")
        self._generate(body, chat, encoded, config)

    def _chat_prompt(self, messages: list[dict[str, str]]) -> str:
        return str(self.pipeline.tokenizer.apply_chat_template(messages, True))

    def _generate(self, body: dict[str, Any], chat: bool, prompt: Any, config: Any) -> None:
        arrived: queue.SimpleQueue[list[int] | Exception | None] = queue.SimpleQueue()
        end_early = self.pipeline.submit(prompt, config, arrived.put)
        answer = _Answer(self.name, chat, prompt.shape[1], config.max_new_tokens)
        try:
            if body.get("stream"):
                self._start(200, "text/event-stream")
                for piece in answer.pieces(arrived, self.detokenizer.begin()):
                    self._send(answer.chunk(piece))
                self._send(answer.chunk(None))
                if (body.get("stream_options") or {}).get("include_usage"):
                    self._send(answer.usage_chunk())
                self.wfile.write(b"data: [DONE]\n\n")
            else:
                whole = "".join(answer.pieces(arrived, self.detokenizer.begin()))
                self._answer(200, answer.whole(whole))
        except GenerationError as error:
            if body.get("stream"):
                self._send({"error": {"message": str(error), "type": "server_error"}})
            else:
                self._refuse(500, str(error))
        except OSError:  # the client has gone
            end_early()

    def _start(self, status: int, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: %s\n\n" % json.dumps(event, separators=(",", ":")).encode())

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self._start(status, "application/json", len(data))
        self.wfile.write(data)

    def _refuse(self, status: int, message: str) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self._answer(status, {"error": {"message": message, "type": kind}})

    def log_message(self, format: str, *args: Any) -> None:
        pass


class GenerationError(Exception):
    """OpenVINO could not generate."""


class _Answer:
    """What is sent of an answer: pieces of text, chunks, and its usage."""

    def __init__(self, model: str, chat: bool, prompt_tokens: int, max_tokens: int) -> None:
        self._chat, self._prompt_tokens, self._max_tokens, self._tokens = chat, prompt_tokens, max_tokens, 0
        kind = "chat.completion" if chat else "text_completion"
        self._head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._kind = kind

    def pieces(self, arrived: queue.SimpleQueue[list[int] | Exception | None], text: TextPieces) -> Iterator[str]:
        """Raises GenerationError."""
        while True:
            ids = arrived.get()
            if isinstance(ids, Exception):
                raise GenerationError(str(ids)) from ids
            self._tokens += len(ids or ())
            if piece := text.push(ids or [], last=ids is None):
                yield piece
            if ids is None:
                return

    def chunk(self, piece: str | None) -> dict[str, Any]:
        """A piece of text; None: the end."""
        content = {} if piece is None else {"content": piece}
        choice: dict[str, Any] = {"index": 0, "finish_reason": self._finish_reason if piece is None else None}
        choice |= {"delta": content} if self._chat else {"text": piece or ""}
        return self._with_head(".chunk" if self._chat else "", [choice])

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
    if args.pipeline == "llm":
        Handler.pipeline = OneAtATime(args.model, properties)
    else:
        Handler.pipeline = Continuous(args.model, properties, args.cache_gib, args.step_tokens)
    Handler.detokenizer = Detokenizer(Handler.pipeline.tokenizer)
    with ThreadingHTTPServer((args.host, args.port), Handler) as server:
        print(f"ready: http://{args.host}:{server.server_port}/v1, {Handler.name}", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
