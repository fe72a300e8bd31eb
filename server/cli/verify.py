"""`pilotfish verify`: check that speculation does not change the text. See docs/benchmarking.md."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from pilotfish.engine.config import EngineConfig
from pilotfish.server.cli.command import Command
from pilotfish.server.cli.measuring import OMITTED, add_measuring_flags, engine_config, title
from pilotfish.server.cli.prompts import encode, read_suites
from pilotfish.server.cli.table import aligned
from pilotfish.server.console import Console

if TYPE_CHECKING:
    from pilotfish.text.tokenizer import Tokenizer
    from pilotfish.tools.bench.compare import Comparison, Difference

MODEL = EngineConfig().model
BATCHES = (1, 8)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=MODEL, help=f"the target, named as for serve (default: {MODEL})")
    add_measuring_flags(parser, questions=8, max_tokens=64, omit=OMITTED | {"verification"})


def _run(options: dict[str, Any]) -> int:
    suites = read_suites(options["prompts"], options["questions"])
    config = engine_config(options)
    # Imported here: --help and mistakes need none of it.
    from tqdm import tqdm

    from pilotfish.checkpoints.catalog import resolve
    from pilotfish.engine.llm import LLM
    from pilotfish.text.tokenizer import load_tokenizer
    from pilotfish.tools.bench.arms import arms_of
    from pilotfish.tools.bench.compare import bound_of, compare, greedy_and_sampled, requests_of

    modes = greedy_and_sampled(options["max_tokens"], options["ignore_eos"], config.seed or 0)
    console = Console(sys.stderr)
    files = resolve(config.model, console.progress)
    tokenizer = load_tokenizer(files)
    prompts = [encode(tokenizer, text) for texts in suites.values() for text in texts]
    with LLM(config=config, on_loading=console.progress) as llm:
        info, bound = llm.info, bound_of(llm.info)
        arms = arms_of(options["arm"], info)
        console.line(
            f"{title(files.name, info)}: {len(prompts)} prompts, answers of up to {options['max_tokens']} tokens, "
            "compared with vanilla's of one prompt at a time"
        )
        total = requests_of(len(prompts), len(arms), len(modes), BATCHES)
        with tqdm(total=total, desc="verify", unit="req") as bar:
            comparisons = list(compare(llm, prompts, arms, modes, BATCHES, bar.update))
    return _report(comparisons, bound, f"{info.dtype}, {info.kernels} kernels", tokenizer)


def _report(comparisons: list[Comparison], bound: float, precision: str, tokenizer: Tokenizer) -> int:
    body = [
        [each.arm, each.mode, str(each.batch), f"{each.identical}/{each.texts}", f"{each.identical / each.texts:.1%}"]
        for each in comparisons
    ]
    print("", *aligned(("arm", "text", "batch", "identical", "share"), body, ("arm", "text")), "", sep="\n")
    found = [(each, difference) for each in comparisons for difference in each.differences]
    for each, difference in found:
        print(f"{each.arm}, {each.mode}, batch {each.batch}: {_described(difference, tokenizer)}")
    allowed = f"logits may differ by {bound:g} ({precision})"
    unexplained = sum(not difference.explained for _, difference in found)
    if unexplained:
        print(f"{unexplained} of {len(found)} differences are larger than the precision explains: {allowed}")
        return 1
    print(f"{len(found)} near-ties, and nothing more: {allowed}" if found else "No text differs.")
    return 0


def _described(difference: Difference, tokenizer: Tokenizer) -> str:
    def spelled(token: int | None) -> str:
        return "the end" if token is None else f"{tokenizer.token(token)!r}"

    where = f"prompt {difference.prompt} differs at token {difference.position}"
    tokens = f"{spelled(difference.got)} where vanilla has {spelled(difference.wanted)}"
    gap = "" if difference.gap is None else f", log-probabilities {difference.gap:+.6f} apart"
    return f"{where}: {tokens}{gap}: {'a near-tie' if difference.explained else 'NOT EXPLAINED'}"


COMMAND = Command(
    name="verify",
    help="check that drafters do not change the text",
    description="Check that drafters do not change the text: greedy and sampled, one request at a time and eight.",
    example="pilotfish verify --model smollm2-135m --prompts mine.jsonl",
    status="Exit status: 0 if no text differs by more than the precision explains, 1 if one does.",
    add_arguments=_add_arguments,
    run=_run,
)
