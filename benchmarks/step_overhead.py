"""What a step costs beside the model's pass: the engine's own work, by phase, and the messages to the server.

    python benchmarks/step_overhead.py --sequences 8 --max-tokens 128

Decodes the built-in prompts (server/commands/prompts.jsonl) with n-gram speculation in this process. Counted are steps
in which all sequences decode and no prompt is read. "messages" is a step's Outputs to MessagePack and back: the engine
process does the one, the server's the other. "own work" is the whole step but the model's pass, plus the messages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import msgspec

from engine.llm import LLM
from engine.messages import FromEngine, Outputs
from engine.sampling.params import SamplingParams
from engine.weights.catalog import resolve
from server.tokenizer import load_tokenizer

PROMPTS = Path(__file__).parents[1] / "server" / "commands" / "prompts.jsonl"
PHASES = ("draft", "plan", "sample", "commit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--speculation", default="ngram", help='a drafter, or "off"')
    args = parser.parse_args()

    tokenizer = load_tokenizer(resolve(args.model))
    lines = PROMPTS.read_text().splitlines()
    texts = [json.loads(lines[i % len(lines)])["prompt"] for i in range(args.sequences)]
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}], True) for text in texts]
    prompts = [tokenizer.encode(chat, add_special_tokens=False) for chat in chats]
    params = SamplingParams(temperature=args.temperature, seed=1, max_tokens=args.max_tokens, ignore_eos=True)

    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(FromEngine).decode
    times: dict[str, list[float]] = {name: [] for name in (*PHASES, "messages", "own work", "forward", "step")}
    rows = tokens = 0
    with LLM(model=args.model) as llm:
        core = llm.core
        for request in llm.requests(prompts, params, speculation=args.speculation):
            core.add(request)
        while core.has_work():
            start = time.perf_counter()
            result = core.step()
            step = time.perf_counter() - start
            start = time.perf_counter()
            decode(encode(Outputs(tuple(result.deltas), result.stats)))
            messages = time.perf_counter() - start
            stats = result.stats
            if stats.prompt_tokens or stats.running < args.sequences:
                continue
            rows, tokens = rows + stats.rows, tokens + stats.generated_tokens
            forward = stats.seconds["forward"]
            whole = {"messages": messages, "own work": step - forward + messages, "step": step}
            for name, series in times.items():
                series.append(1e3 * (stats.seconds | whole)[name])
    count = len(times["step"])
    if not count:
        raise SystemExit("no step was counted: raise --max-tokens")
    per_step = f"{rows / count:.1f} rows and {tokens / count:.1f} tokens a step"
    print(f"{count} steps of {args.sequences} sequences, {args.speculation}: {per_step}\n")
    print("| phase | mean, ms | p50, ms | p99, ms |\n|---|---|---|---|")
    for name, series in times.items():
        high = sorted(series)[round(0.99 * (count - 1))]
        print(f"| {name} | {statistics.fmean(series):.3f} | {statistics.median(series):.3f} | {high:.3f} |")


if __name__ == "__main__":
    main()
