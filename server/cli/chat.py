"""`pilotfish chat`: a conversation in the terminal, with a server or with a model in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from pilotfish.checkpoints.catalog import cache_folder
from pilotfish.errors import PilotfishError
from pilotfish.server.cli.command import Command
from pilotfish.server.cli.talk import (
    Message,
    Partner,
    Settings,
    add_talking_flags,
    partner,
    settings_of,
    show,
    terminal,
)

if TYPE_CHECKING:
    from rich.console import Console as Terminal

HELP = """\
/settings              what is set
/set NAME VALUE        set it; without a value: the default
/system TEXT           set the system prompt
/colours               colour tokens by drafter, or no longer
/again                 another answer to the last message
/clear                 begin anew
/exit                  as Ctrl-D; Ctrl-C stops an answer"""


@dataclass(slots=True)
class Conversation:
    """A conversation and how it goes on."""

    partner: Partner
    settings: Settings
    out: Terminal
    system: str = ""
    colours: bool = False
    messages: list[Message] = field(default_factory=list)

    def take(self, line: str) -> bool:
        """Take a line: a command, or a message. Returns whether to go on. Errors are shown."""
        try:
            if line.startswith("/"):
                return self._command(*line[1:].partition(" ")[::2])
            if line.strip():
                self.messages.append({"role": "user", "content": line})
                self._answer()
        except PilotfishError as error:
            self.out.print(f"pilotfish: {error}", style="red")
        return True

    def _answer(self) -> None:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        bits = self.partner.answer([*system, *self.messages], self.settings)
        said: list[str] = []

        def kept() -> Any:
            for bit in bits:
                said.append(bit.text)
                yield bit

        try:
            show(self.out, kept(), self.colours)
        except KeyboardInterrupt:
            self.out.print("\n(stopped)", style="dim")
        finally:
            with suppress(AttributeError):
                bits.close()  # type: ignore[attr-defined]  # a generator
            if said:
                self.messages.append({"role": "assistant", "content": "".join(said)})
            elif self.messages:
                self.messages.pop()  # a message that was not answered

    def _command(self, name: str, rest: str) -> bool:
        match name:
            case "exit" | "quit":
                return False
            case "settings":
                for each in fields(self.settings):
                    self.out.print(f"{each.name}: {getattr(self.settings, each.name)}")
                self.out.print(f"system: {self.system or None}\nmodel: {self.partner.name}")
            case "set":
                self.settings.set(*rest.strip().partition(" ")[::2])
            case "system":
                self.system = rest.strip()
            case "colours":
                self.colours = not self.colours
            case "clear":
                self.messages.clear()
            case "again" if len(self.messages) >= 2:
                self.messages.pop()
                self._answer()
            case _:
                self.out.print(HELP)
        return True


def _reader() -> Callable[[], str]:
    """Return what asks for a line, with history and editing."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    commands = [line.split()[0] for line in HELP.splitlines()]
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(folder / "chat_history")),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
    )
    return lambda: session.prompt("> ")


def _run(options: dict[str, Any]) -> int:
    settings, out = settings_of(options), terminal()
    with partner(options, None) as answering:
        if not sys.stdin.isatty():  # one message, and only its answer
            system = [{"role": "system", "content": options["system"]}] if options["system"] else []
            messages = [*system, {"role": "user", "content": sys.stdin.read()}]
            show(out, answering.answer(messages, settings), options["colours"])
            return 0
        conversation = Conversation(answering, settings, out, options["system"] or "", options["colours"])
        out.print(f"{answering.name}. /help lists the commands.", style="dim")
        read = _reader()
        with suppress(EOFError):
            while True:
                try:
                    if not conversation.take(read()):
                        break
                except KeyboardInterrupt:
                    continue
    return 0


COMMAND = Command(
    name="chat",
    help="chat in the terminal",
    description="Chat in the terminal, with a server (by default the one on this machine, port 8000) or, with --model "
    "and no --url, with a model in this process. From a pipe: one message, one answer.",
    example="pilotfish chat --model smollm2-135m --colours\necho 'Name three fish.' | pilotfish chat --url http://127.0.0.1:8000",
    add_arguments=add_talking_flags,
    run=_run,
)
