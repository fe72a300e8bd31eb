"""The speedup by a prediction where an answer is mostly known: the model's own answer with some words changed.

    python benchmarks/prediction_edit.py --questions 10 --every 20

Each question is answered by plain decoding; every 20th word of the answer is replaced by another, and that is the
prediction with which the question is asked again. Plain decoding and the prediction take turns, request by request.
"""

from __future__ import annotations

import argparse
import statistics
import time

import msgspec

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request
from pilotfish.server.cli.prompts import encode, read_suites
from pilotfish.text.tokenizer import load_tokenizer


def edited(text: str, every: int) -> str:
    words = text.split(" ")
    return " ".join("something" if i % every == every - 1 else word for i, word in enumerate(words))


def ask(llm: LLM, request: Request) -> tuple[list[int], float]:
    """Return the answer's tokens, and the seconds from its first one to its last."""
    tokens: list[int] = []
    first = last = 0.0
    for delta in llm.stream([request]):
        last = time.perf_counter()
        first = first or last
        tokens += delta.token_ids
    return tokens, last - first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", nargs="*", default=[])
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--every", type=int, default=20, help="one word in so many is changed")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    tokenizer = load_tokenizer(resolve(args.model))
    prompts = [
        encode(tokenizer, text) for texts in read_suites(args.prompts, args.questions).values() for text in texts
    ]
    llm = LLM(model=args.model, prefix_caching=False, suffix_memory=0)
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
    requests = []
    for prompt in prompts:
        (answer,) = llm.generate([prompt], params, speculation="off")
        if len(answer.token_ids) >= 32:
            prediction = tokenizer.encode(edited(tokenizer.decode(answer.token_ids), args.every), False)
            (request,) = llm.requests([prompt], params)
            requests.append((answer.token_ids, msgspec.structs.replace(request, prediction_ids=tuple(prediction))))
    ratios = []
    for number in range(args.rounds):
        plain_seconds = predicted_seconds = 0.0
        for wanted, request in requests:
            name = f"{request.id}-{number}"
            plain, seconds = ask(llm, msgspec.structs.replace(request, id=f"{name}-plain", speculation="off"))
            plain_seconds += seconds
            predicted, seconds = ask(llm, msgspec.structs.replace(request, id=f"{name}-predicted"))
            predicted_seconds += seconds
            if not plain == predicted == wanted:
                raise SystemExit("the texts differ")
        ratios.append(plain_seconds / predicted_seconds)
        print(f"round {number + 1}: {ratios[-1]:.2f} times plain decoding")
    middle = statistics.median(ratios)
    print(f"{len(requests)} answers, one word in {args.every} changed: {middle:.2f} times plain decoding")


if __name__ == "__main__":
    main()
