"""The controller in virtual time: what `pilotfish bench` would measure, without a machine's noise.

    python benchmarks/virtual_clock.py record --model smollm2-135m --prompts mt_bench.jsonl --out smollm2.json
    python benchmarks/virtual_clock.py replay smollm2.json --concurrency 1,4,8,16

`record` runs the real engine with plain decoding, and records each answer and what every model-based drafter would have
proposed at each of its positions (`virtual_record.py`). Neither depends on the drafter in use. So `replay` needs no
model (`virtual_engine.py`): scheduler, speculator, controller and lookup drafters are real, the target's tokens and the
heads' drafts are recorded, and each pass takes as long as a table says (`virtual_costs.py`). A run takes seconds and is
reproducible to the last digit, so two versions of the controller can be compared. `--jitter` adds noise, the same in
each run.
"""

from __future__ import annotations

import argparse
import json
from itertools import cycle, islice
from pathlib import Path

from virtual_costs import COSTS
from virtual_engine import Engine
from virtual_record import Recorded, record


def replay(args: argparse.Namespace) -> None:
    for path in args.recordings:
        recording = json.loads(Path(path).read_text())
        name = recording["model"]
        first, every = args.part
        suites = {
            suite: [Recorded(tuple(each["prompt"]), each["answer"], each["drafts"]) for each in questions[first::every]]
            for suite, questions in recording["suites"].items()
        }
        shared = Engine(recording, COSTS[name], args.jitter)
        arms = {"vanilla": (), **{each: (each,) for each in shared.names}}
        arms |= {each: tuple(each.split("+")) for each in args.arm}
        arms["auto"] = shared.names
        print(f"\n{name}\n\n| suite | streams | {' | '.join(list(arms)[1:])} | auto / best | asked, % | drafts |")
        print("|" + "---|" * (len(arms) + 4))
        for suite, questions in suites.items():
            for load in args.concurrency:
                chosen = list(islice(cycle(questions), max(load, len(questions))))
                visits = {}
                for arm, drafters in arms.items():
                    engine = shared if args.shared else Engine(recording, COSTS[name], args.jitter)
                    visits[arm] = engine.visit(chosen, drafters, load)
                speed = {arm: visits["vanilla"].seconds / visit.seconds for arm, visit in visits.items()}
                auto, best = visits["auto"], max(value for arm, value in speed.items() if len(arms[arm]) < 2)
                drafts = ", ".join(f"{each} {auto.accepted[each]}/{count}" for each, count in auto.drafted.items())
                figures = " | ".join(f"{value:.2f}" for value in list(speed.values())[1:])
                print(
                    f"| {suite} | {load} | {figures} | {speed['auto'] / best:.3f} | "
                    f"{100 * auto.drafting / auto.seconds:.1f} | {drafts}; {auto.decoded / auto.steps:.2f} a step |"
                )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    recorder = commands.add_parser("record", help="run the engine and note texts and drafts")
    recorder.add_argument("--model", default="smollm2-135m")
    recorder.add_argument("--prompts", nargs="+", default=[], help="files; none: those that come with Pilotfish")
    recorder.add_argument("--questions", type=int, default=32, help="of each file")
    recorder.add_argument("--max-tokens", type=int, default=128)
    recorder.add_argument("--num-threads", type=int, default=1)
    recorder.add_argument("--out", required=True)
    recorder.set_defaults(run=record)
    player = commands.add_parser("replay", help="play recordings in virtual time")
    player.add_argument("recordings", nargs="+")
    player.add_argument("--concurrency", type=numbers, default=[1, 4, 8, 16])
    player.add_argument("--arm", nargs="+", default=[], help="further arms, as ngram+suffix")
    player.add_argument("--part", type=numbers, default=[0, 1], help="FIRST,EVERY: which of each suite's questions")
    player.add_argument("--jitter", type=float, default=0.0, help="of each duration, as a share of it")
    player.add_argument("--shared", action="store_true", help="one controller for all arms and suites, as in a bench")
    player.set_defaults(run=replay)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
