"""`pilotfish train-draft`: train a draft model for a target on the target's own text. See docs/training.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilotfish.engine.config import EngineConfig
from pilotfish.errors import ConfigError
from pilotfish.server.cli.command import Command, make_folder
from pilotfish.server.cli.prompts import encode, read_prompts
from pilotfish.server.cli.settings import add_flags, load
from pilotfish.server.console import Console
from pilotfish.tools.training.settings import TrainSettings

if TYPE_CHECKING:
    from pilotfish.text.tokenizer import Tokenizer
    from pilotfish.tools.training.loop import TrainingProgress
    from pilotfish.tools.training.write import Frame

_MARK = "7f3c9a pilotfish 7f3c9a"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", required=True, metavar="MODEL", help="the target, named as for serve")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write the draft model to")
    parser.add_argument(
        "--work",
        metavar="DIR",
        help="folder for text, features and checkpoint, which may be deleted afterwards (default: work in --out)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help='JSON lines with your own prompts ("prompt", or "turns" whose first is taken), which the target answers',
    )
    parser.add_argument("--num-threads", type=int, default=0, metavar="N", help="CPU threads; 0: all (default: 0)")
    add_flags(parser, TrainSettings, "training")


def _run(options: dict[str, Any]) -> int:
    from tqdm import tqdm

    from pilotfish.checkpoints.catalog import resolve
    from pilotfish.text.tokenizer import load_tokenizer
    from pilotfish.tools.training.pipeline import Callbacks, train_draft

    console = Console(sys.stderr)
    settings = load(TrainSettings, options)
    files = resolve(options["target"], console.progress)
    tokenizer = load_tokenizer(files)
    prompts = [tuple(encode(tokenizer, text)) for path in options["data"] for text in read_prompts(path)]
    out = make_folder(options["out"])
    work = Path(options["work"]) if options["work"] else out / "work"
    config = EngineConfig(
        model=options["target"],
        max_num_seqs=32,
        max_batch_tokens=256,
        num_threads=options["num_threads"],
        drafter=("ngram",),  # the target's default drafter may not exist yet
    )
    bars = _Bars(tqdm, settings.tokens)
    curve = train_draft(
        files, config, frame_of(tokenizer), prompts, out, work, settings, Callbacks(bars.text, bars.features, bars.loop)
    )
    bars.close()
    last = curve[-1]["acceptance"]
    console.line(f"Written: {out} (held-out acceptance {', '.join(f'{rate:.2f}' for rate in last)})")
    console.line(f"  pilotfish serve --model {options['target']} --drafter {out}")
    return 0


def frame_of(tokenizer: Tokenizer) -> Frame:
    """Return the tokens around a user's message in the chat template; without a template, the begin-of-text token."""
    from pilotfish.tools.training.write import Frame

    if tokenizer.chat_template is None:
        if tokenizer.bos_token_id is None:
            raise ConfigError("the target has neither a chat template nor a begin-of-text token: nothing to begin with")
        return Frame(before=(tokenizer.bos_token_id,), after=())
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}])
    before, after = text.split(_MARK, 1)
    return Frame(
        before=tuple(tokenizer.encode(before, add_special_tokens=False)),
        after=tuple(tokenizer.encode(after, add_special_tokens=False)),
    )


class _Bars:
    """Progress bars of the stages, one after the other."""

    def __init__(self, bar: Any, tokens: int) -> None:
        self._bar, self._tokens = bar, tokens
        self._current: Any = None
        self._name = ""

    def text(self, count: int) -> None:
        self._to("writing", self._tokens, "tok", count)

    def features(self, done: int, total: int) -> None:
        self._to("reading", total, "shard", done)

    def loop(self, progress: TrainingProgress) -> None:
        self._to("training", None, "step", progress.step)
        if progress.rates is not None:
            rates = ", ".join(f"{rate:.3f}" for rate in progress.rates)
            self._current.write(
                f"step {progress.step}: loss {progress.loss:.3f}, held-out acceptance {rates}, "
                f"{progress.accepted_length:.2f} tokens a step"
            )

    def close(self) -> None:
        if self._current is not None:
            self._current.close()

    def _to(self, name: str, total: int | None, unit: str, count: int) -> None:
        if name != self._name:
            self.close()
            self._name = name
            self._current = self._bar(total=total, desc=name, unit=unit, initial=count)
        self._current.update(count - self._current.n)


COMMAND = Command(
    name="train-draft",
    help="train a draft model",
    description="Train a draft model for a target, on text that the target writes itself. The same command continues "
    "an interrupted run.",
    example="pilotfish train-draft --target smollm2-135m --out my-draft\n"
    "pilotfish serve --model smollm2-135m --drafter my-draft",
    add_arguments=_add_arguments,
    run=_run,
)
