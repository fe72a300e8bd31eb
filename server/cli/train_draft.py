"""`pilotfish train-draft`: a draft for a target, from the target's own text. See docs/training.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilotfish.engine.config import EngineConfig
from pilotfish.errors import ConfigError
from pilotfish.server.cli.command_flags import positive
from pilotfish.server.cli.prompts import encode, read_prompts
from pilotfish.server.console import Console

if TYPE_CHECKING:
    from pilotfish.text.tokenizer import Tokenizer
    from pilotfish.tools.training.loop import Progress
    from pilotfish.tools.training.write import Frame

OBJECTIVES = ("lk", "kl", "tv", "lk-log")
KINDS = ("eagle3", "draft-model")
_MARK = "7f3c9a pilotfish 7f3c9a"


def add_parser(commands: Any) -> None:
    """`commands`: what `add_subparsers` returned."""
    parser = commands.add_parser(
        "train-draft",
        help="train a draft for a model",
        description="Train a draft for a model, from text that the model writes itself. A run that is interrupted goes "
        "on where it stopped when the same command is given again.",
        allow_abbrev=False,
    )
    number, real = positive, float
    parser.add_argument("--target", required=True, metavar="MODEL", help="the target, named as --model is for serve")
    parser.add_argument("--kind", choices=KINDS, default="eagle3", help="(default: eagle3)")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the draft is written")
    parser.add_argument(
        "--work",
        metavar="DIR",
        help="text, features, checkpoint; they may be deleted afterwards (default: DIR/work in --out)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help='JSON lines with your own prompts ("prompt", or "turns" whose first is taken), which the target answers',
    )
    for name, kind, default, text in (
        ("tokens", number, 1_000_000, "tokens of training text"),
        ("turn-tokens", number, 64, "most tokens of a prompt that the target makes up"),
        ("answer-tokens", number, 192, "most tokens of an answer"),
        ("steps", int, 0, "optimizer steps; 0: as --epochs says"),
        ("epochs", real, 3.0, "times that the text is gone over"),
        ("batch-tokens", number, 2048, "tokens of an optimizer step"),
        ("learning-rate", real, 1e-3, "the highest"),
        ("unroll", number, 3, "drafted tokens that training looks ahead"),
        ("draft-vocab-size", number, 8192, "eagle3: the target's most frequent tokens, which the draft can say"),
        ("hidden-size", int, 0, "draft-model; 0: the target's"),
        ("num-layers", number, 2, "draft-model"),
        ("intermediate-size", int, 0, "0: the target's, in proportion"),
        ("seed", int, 0, "of text and training"),
        ("num-threads", int, 0, "CPU threads; 0: all"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--feature-layers",
        type=_layers,
        default=(),
        metavar="N,N,N",
        help="eagle3: layers of the target that the draft reads (default: a third, two thirds and all "
        "of the way through)",
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="lk",
        help="what training makes smaller: see docs/training.md (default: lk)",
    )
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="matrix products in bfloat16: faster where the processor has units for it, slower elsewhere",
    )
    parser.set_defaults(run=train_draft)


def train_draft(options: dict[str, Any]) -> int:
    """Run the command; returns its exit status. Raises ConfigError, ParameterError or ModelError."""
    from tqdm import tqdm

    from pilotfish.checkpoints.catalog import resolve
    from pilotfish.text.tokenizer import load_tokenizer
    from pilotfish.tools.training.pipeline import Callbacks, TrainSettings
    from pilotfish.tools.training.pipeline import train_draft as run

    console = Console(sys.stderr)
    files = resolve(options["target"], console.progress)
    tokenizer = load_tokenizer(files)
    prompts = [tuple(encode(tokenizer, text)) for path in options["data"] for text in read_prompts(path)]
    names = TrainSettings.__dataclass_fields__
    settings = TrainSettings(**{name: options[name] for name in names if name in options})
    out = Path(options["out"])
    work = Path(options["work"]) if options["work"] else out / "work"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out is {str(out)!r}, where no folder can be made: {error}") from error
    config = EngineConfig(
        model=options["target"],
        max_num_seqs=32,
        max_batch_tokens=256,
        num_threads=options["num_threads"],
        drafter=("ngram",),  # what comes with the target may not be there yet
    )
    bars = _Bars(tqdm, settings.tokens)
    curve = run(
        files, config, frame_of(tokenizer), prompts, out, work, settings, Callbacks(bars.text, bars.features, bars.loop)
    )
    bars.close()
    last = curve[-1]["acceptance"]
    console.line(f"Written: {out} (held-out acceptance {', '.join(f'{rate:.2f}' for rate in last)})")
    console.line(f"  pilotfish serve --model {options['target']} --drafter {out}")
    return 0


def frame_of(tokenizer: Tokenizer) -> Frame:
    """What stands before and after a user's turn in the model's own chat template; its begin-of-text without one."""
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


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


class _Bars:
    """A progress bar for each stage, one after the other."""

    def __init__(self, bar: Any, tokens: int) -> None:
        self._bar, self._tokens = bar, tokens
        self._current: Any = None
        self._name = ""

    def text(self, count: int) -> None:
        self._to("writing", self._tokens, "tok", count)

    def features(self, done: int, total: int) -> None:
        self._to("reading", total, "shard", done)

    def loop(self, progress: Progress) -> None:
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
