"""Agents' traffic in virtual time: what a memory of past answers gains, without a machine's noise.

    python benchmarks/virtual_agents.py record --out agents.json
    python benchmarks/virtual_agents.py replay agents.json

`record` answers the tasks of `agent_traffic.py`, round by round. `replay` plays the answers as `virtual_clock.py` does:
scheduler, controller and drafters are real, and each pass takes as long as a table says. Prompts count as read. Below
the table it says in how many steps a neural drafter could have gone on where a match ended: a draft that was verified
whole, shorter than a head's longest, and right. No head continues a match because that is so rare.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

from agent_traffic import Traffic
from virtual_costs import Costs
from virtual_engine import Engine, Visit
from virtual_record import LONGEST, Recorded

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.control.candidates import Choice
from pilotfish.engine.speculation.drafters.ngram import NgramDrafter
from pilotfish.engine.speculation.drafters.suffix import SuffixDrafter
from pilotfish.engine.speculation.drafters.suffix_memory import SuffixMemoryDrafter
from pilotfish.text.tokenizer import load_tokenizer

PASSES = {
    1: 4.8, 2: 5.4, 3: 6.3, 5: 8.0, 9: 12.6, 13: 16.2, 17: 20.5, 25: 26.0, 33: 32.3, 40: 38.0, 72: 67.0, 104: 94.0,
    136: 120.0, 200: 185.0, 264: 245.0,
}  # fmt: skip
"""Milliseconds by rows: SmolLM2's quantized blocks on two shared cores (AVX-512 VNNI), `verify_cost.py`."""
COSTS = Costs(verifying=PASSES, reading=PASSES, context_token=0.001, drafting={}, step=0.6, sequence=0.15)
READING = 0.9
"""Milliseconds of a prompt's row, which are taken off."""
OWN = ("ngram", "suffix")
ARMS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "ngram, suffix": OWN,
    "suffix-memory": ("suffix-memory",),
    "all": (*OWN, "suffix-memory"),
}


@dataclass
class Ends:
    """Steps of decoding sequences, by what a head could have added to their drafts."""

    steps: int = 0
    whole: int = 0
    """Steps whose draft was verified to its end."""
    right: int = 0
    """Those of them that were shorter than a head's longest draft, and right."""

    def count(self, choice: Choice, sequence: Sequence, tokens: Seq[int]) -> None:
        self.steps += 1
        candidate, draft = choice.candidates.get(sequence), choice.drafts.get(sequence)
        if candidate is None or draft is None:
            return
        (proposed,) = [each for each in candidate.drafts if each.drafter == draft.drafter]
        if len(draft.tokens) == len(proposed.tokens):
            self.whole += 1
            short = len(draft.tokens) < min(LONGEST, candidate.left)
            self.right += short and tuple(tokens[: len(draft.tokens)]) == draft.tokens


@dataclass
class AgentEngine(Engine):
    """The engine of `virtual_clock.py` with a memory, and drafts by suffixes of up to `longest` tokens."""

    longest: int = 32
    ends: Ends = field(default_factory=Ends)

    def __post_init__(self) -> None:
        self.lookups = [
            NgramDrafter(4, 1), SuffixDrafter(self.longest), SuffixMemoryDrafter(64 << 20, self.longest, secret=1)
        ]  # fmt: skip
        super().__post_init__()
        learn = self.controller.observe_tokens

        def observe(choice: Choice, sequence: Sequence, tokens: Seq[int]) -> None:
            self.ends.count(choice, sequence, tokens)
            learn(choice, sequence, tokens)

        self.controller.observe_tokens = observe  # type: ignore[method-assign]


def record(args: argparse.Namespace) -> None:
    """Write the rounds: lists of tasks, [prompt, answer] each."""
    traffic = Traffic(load_tokenizer(resolve(args.model)), args.tasks)
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
    rounds = []
    with LLM(args.model) as llm:
        for number in range(args.rounds + 1):
            prompts = traffic.round(number)
            answers = llm.generate(prompts, params, use_tqdm=True)
            rounds.append([[prompt, answer.token_ids] for prompt, answer in zip(prompts, answers, strict=True)])
    Path(args.out).write_text(json.dumps({"model": args.model, "max_tokens": args.max_tokens, "rounds": rounds}))


def play(recording: dict[str, object], rounds: Seq[Seq[Recorded]], arm: str, streams: int, longest: int) -> tuple:
    """Return tokens, seconds of decoding, tokens a step, and the ends of drafts; the first round does not count."""
    engine = AgentEngine(recording, COSTS, longest=longest)
    tokens, seconds, total = 0, 0.0, Visit()
    for number, tasks in enumerate(rounds):
        engine.ends = engine.ends if number != 1 else Ends()
        for first in range(0, len(tasks), streams):
            chosen = list(tasks[first : first + streams])
            visit = engine.visit(chosen, ARMS[arm], streams)
            if number:
                tokens += visit.tokens
                seconds += visit.seconds - 1e-3 * READING * sum(len(task.prompt) for task in chosen)
                total.steps, total.decoded = total.steps + visit.steps, total.decoded + visit.decoded
    return tokens, seconds, total.decoded / total.steps, engine.ends


def replay(args: argparse.Namespace) -> None:
    recording = json.loads(Path(args.recording).read_text())
    rounds = [[Recorded(tuple(prompt), answer, {}) for prompt, answer in tasks] for tasks in recording["rounds"]]
    print("| streams | arm | by plain | tokens a step |\n|---|---|---|---|")
    lines = []
    for streams in args.streams:
        plain = 0.0
        for arm in ARMS:
            tokens, seconds, per_step, ends = play(recording, rounds, arm, streams, args.longest)
            plain = plain or tokens / seconds
            print(f"| {streams} | {arm} | {tokens / seconds / plain:.2f} | {per_step:.2f} |")
        lines.append(
            f"{streams} streams, all: of {ends.steps} steps, {ends.whole} verified a draft to its end, {ends.right} of "
            f"which were shorter than {LONGEST} tokens, and right"
        )
    print("", *lines, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    recorder = commands.add_parser("record", help="answer the tasks and keep the texts")
    recorder.add_argument("--model", default="smollm2-135m")
    recorder.add_argument("--tasks", type=int, default=40)
    recorder.add_argument("--rounds", type=int, default=3, help="after the one that fills the memory")
    recorder.add_argument("--max-tokens", type=int, default=200)
    recorder.add_argument("--out", required=True)
    recorder.set_defaults(run=record)
    player = commands.add_parser("replay", help="play them in virtual time")
    player.add_argument("recording")
    player.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    player.add_argument("--longest", type=int, default=32, help="--suffix-draft-tokens")
    player.set_defaults(run=replay)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
