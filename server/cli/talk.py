"""What `pilotfish run` and `pilotfish chat` talk to: a server, or a model in this process; and how tokens are shown."""

from __future__ import annotations

import argparse
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pilotfish.errors import ConfigError, PilotfishError
from pilotfish.server.cli.command import positive

if TYPE_CHECKING:
    from rich.console import Console as Terminal

    from pilotfish.library.llm import LLM

Message = dict[str, str]
COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_red")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal may execute, which a model's text must not reach."""


class ServerError(PilotfishError):
    """The server that was asked cannot be reached, or answered with an error."""


class Bit(NamedTuple):
    """Part of an answer."""

    text: str
    drafter: str | None
    """The drafter that proposed it; None for the model's own."""


@dataclass(slots=True, kw_only=True)
class Settings:
    """How answers are drawn. `/set` changes them by these names."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    speculation: str | None = None
    """A drafter, "auto" or "off"; None: the default."""

    def set(self, name: str, text: str) -> None:
        """Set a field from its text; an empty one is its default. Raises ConfigError."""
        kinds: dict[str, Any] = {
            "temperature": float, "top_p": float, "max_tokens": positive, "seed": int, "speculation": str,
        }  # fmt: skip
        if name not in kinds:
            raise ConfigError(f"there is no setting {name!r}: there are {', '.join(kinds)}")
        try:
            setattr(self, name, kinds[name](text) if text else getattr(Settings(), name))
        except (ValueError, argparse.ArgumentTypeError):
            raise ConfigError(f"{name} is {text!r}, but must be a number") from None


class Partner(Protocol):
    """Who answers."""

    name: str

    def answer(self, messages: Sequence[Message], settings: Settings) -> Iterator[Bit]:
        """Yield an answer as it comes. Closing the iterator ends it. Raises PilotfishError."""
        ...


class Model:
    """A model in this process."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.name = llm.info.model

    def answer(self, messages: Sequence[Message], settings: Settings) -> Iterator[Bit]:
        from pilotfish.engine.params import SamplingParams

        params = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            seed=settings.seed,
        ).check()
        templated = self._llm.tokenizer.chat_template is not None
        asked: Any = messages if templated else "\n".join(message["content"] for message in messages)
        for token in self._llm.stream(asked, params, speculation=settings.speculation):
            if token.error is not None:
                raise ServerError(token.error)
            if token.text:
                yield Bit(token.text, token.drafter)


class Server:
    """A server of OpenAI's API; drafters are known of Pilotfish's own."""

    def __init__(self, url: str, key: str | None, model: str | None = None) -> None:
        self._base = url.rstrip("/").removesuffix("/v1")
        if not self._base.startswith(("http://", "https://")):
            raise ConfigError(f"url is {url!r}, but must begin with http:// or https://")
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self.name = model or self._first_model()

    def _first_model(self) -> str:
        with self._open("/v1/models", None) as response:
            return str(json.load(response)["data"][0]["id"])

    def answer(self, messages: Sequence[Message], settings: Settings) -> Iterator[Bit]:
        body: dict[str, Any] = {
            "model": self.name, "messages": list(messages), "stream": True, "include_provenance": True,
            "temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": settings.max_tokens,
        }  # fmt: skip
        for name in ("seed", "speculation"):
            if getattr(settings, name) is not None:
                body[name] = getattr(settings, name)
        with self._open("/v1/chat/completions", body) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield from _bits(json.loads(line[6:]))

    def _open(self, path: str, body: dict[str, Any] | None) -> AbstractContextManager[Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, self._headers)
        try:
            opened: AbstractContextManager[Any] = urllib.request.urlopen(request)  # nosec B310  # the address is the user's own
        except urllib.error.HTTPError as error:
            try:
                said = json.load(error)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                said = error.reason
            raise ServerError(f"the server at {self._base} answered {error.code}: {said}") from None
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(f"no server at {self._base}: {reason}. Start one with: pilotfish serve") from None
        return opened


def _bits(chunk: dict[str, Any]) -> Iterator[Bit]:
    """Yield the bits of a chunk, cut at its tokens; a token whose text is not there belongs to the one before."""
    if "error" in chunk:
        raise ServerError(chunk["error"]["message"])
    for choice in chunk["choices"]:
        text = choice["delta"].get("content") or ""
        drafter = None
        for origin in choice.get("provenance") or ():
            at = text.find(origin["token"])
            if at < 0 or not origin["token"]:
                continue
            if at:
                yield Bit(text[:at], drafter)
            drafter = origin["drafter"]
            yield Bit(origin["token"], drafter)
            text = text[at + len(origin["token"]) :]
        if text:
            yield Bit(text, drafter)


def add_talking_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `run` and `chat` share."""
    parser.add_argument("--model", metavar="MODEL", help="a model to load in this process, named as for serve")
    parser.add_argument("--url", metavar="URL", help="a server to ask, such as http://127.0.0.1:8000")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("PILOTFISH_API_KEY"),
        help="the server's API key (default: PILOTFISH_API_KEY)",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    defaults = Settings()
    parser.add_argument("--max-tokens", type=positive, default=defaults.max_tokens, metavar="N", help="default: 512")
    parser.add_argument("--temperature", type=float, default=defaults.temperature, metavar="X", help="default: 0.7")
    parser.add_argument("--top-p", type=float, default=defaults.top_p, metavar="X", help="default: 1")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text (default: random)")
    parser.add_argument("--speculation", metavar="NAME", help="a drafter, auto or off (default: the model's)")
    parser.add_argument("--colours", action="store_true", help="colour tokens by the drafter that proposed them")


def settings_of(options: dict[str, Any]) -> Settings:
    return Settings(**{name: options[name] for name in Settings.__slots__})


@contextmanager
def partner(options: dict[str, Any], default_model: str | None) -> Iterator[Partner]:
    """Yield who answers: with --url a server, else the model, which is loaded now."""
    if options["url"] or (default_model is None and not options["model"]):
        yield Server(options["url"] or "http://127.0.0.1:8000", options["api_key"], options["model"])
        return
    from pilotfish.library.llm import LLM
    from pilotfish.server.console import Console

    console = Console()
    with LLM(options["model"] or default_model, on_loading=console.progress) as llm:
        console.line(f"  {llm.info.model}: {llm.info.dtype} on {llm.info.device}")
        yield Model(llm)


def terminal() -> Terminal:
    """Return standard output; colours only on a terminal, and not with NO_COLOR."""
    from rich.console import Console as Terminal

    return Terminal(highlight=False, markup=False, soft_wrap=True)


def show(out: Terminal, bits: Iterator[Bit], colours: bool) -> str:
    """Print an answer as it comes, and return it. Control characters do not reach a terminal."""
    from rich.text import Text

    parts, known = [], list[str]()
    for text, drafter in bits:
        parts.append(text)
        style = ""
        if colours and drafter is not None:
            if drafter not in known:
                known.append(drafter)
            style = COLOURS[known.index(drafter) % len(COLOURS)]
        if out.is_terminal:
            out.print(Text(_CONTROL.sub("\ufffd", text), style), end="")
        else:
            out.file.write(text)
        out.file.flush()
    out.file.write("\n")
    if known and out.is_terminal:
        legend = Text("  ").join(Text(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(known))
        out.print(Text("drafted by: ", "dim") + legend)
    return "".join(parts)
