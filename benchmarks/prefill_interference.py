"""The effect of a long prompt on decoding requests: their inter-token latency before it arrives, and during prefill.

    python benchmarks/prefill_interference.py --streams 7 --prompt-tokens 6000

Prefill promises to add at most `--max-prefill-ms` to the streams' steps, as it predicts them. The streams decode
without speculation, so each gap is one step and one token. Runs the engine in this process.
"""

from __future__ import annotations

import argparse
import random
import time

from pilotfish.engine.core import EngineCore
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.request import Request

STREAM_PROMPT = 64
"""Tokens of the decoding requests' prompts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=6000)
    parser.add_argument("--before", type=int, default=100, help="steps that are timed before the prompt arrives")
    parser.add_argument("--prompts", type=int, default=1, help="long prompts, all at once")
    parser.add_argument("--max-batch-tokens", type=int, default=0, help="token rows of a step")
    parser.add_argument("--max-prefill-ms", type=float, default=80.0, help="what prompts may add to a step")
    args = parser.parse_args()

    noise = random.Random(1)
    with LLM(
        model=args.model,
        speculation="none",
        max_batch_tokens=args.max_batch_tokens,
        max_prefill_ms=args.max_prefill_ms,
        kv_cache_memory=3 << 30,
    ) as llm:
        core = llm.core

        def ask(name: str, length: int, answer: int) -> None:
            prompt = tuple(noise.randrange(100, llm.info.vocab_size) for _ in range(length))
            params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True, seed=1)
            core.add(Request(id=name, prompt_ids=prompt, params=params))

        ask("alone", args.prompt_tokens, 1)
        chunks = steps_until(core, "alone", {})
        room = llm.info.max_model_len - STREAM_PROMPT
        for i in range(args.streams):
            ask(f"stream-{i}", STREAM_PROMPT, room)
        last: dict[str, float] = {}
        while len(last) < args.streams:  # their prompts are read
            step(core, last)
        before = [gap for _ in range(args.before) for gap in step(core, last)[0]]
        for i in range(args.prompts):
            ask(f"prompt-{i}", args.prompt_tokens, 1)
        during: list[float] = []
        together = steps_until(core, f"prompt-{args.prompts - 1}", last, during)

    show = "| {} | {} | {:.1f} | {:.1f} | {:.1f} |".format
    print("| | count | p50, ms | p99, ms | max, ms |\n|---|---|---|---|---|")
    for name, series in (
        (f"ITL of {args.streams} streams before", before),
        (f"ITL while {args.prompts} x {args.prompt_tokens} tokens are read", during),
        ("step of a prefill chunk, alone", chunks),
        ("step of a prefill chunk, with the streams", together),
    ):
        print(show(name, len(series), *(1e3 * quantile(series, share) for share in (0.5, 0.99, 1.0))))
    rise = [1e3 * (quantile(during, share) - quantile(before, share)) for share in (0.5, 0.95)]
    print(
        f"\nITL rises by {rise[0]:.1f} ms in the median, {rise[1]:.1f} at p95; bound: {args.max_prefill_ms:.0f} ms. "
        f"Prefill: {args.prompts * args.prompt_tokens / sum(together):.0f} tokens/s with the streams, "
        f"{args.prompt_tokens / sum(chunks):.0f} alone"
    )


def step(core: EngineCore, last: dict[str, float]) -> tuple[list[float], float, set[str]]:
    """Take a step and update `last`, the time of each stream's last token. Returns each stream's gap since then, the
    step's seconds, and the ids of the requests that got a token."""
    start = time.perf_counter()
    result = core.step()
    now = time.perf_counter()
    got = {delta.request_id for delta in result.deltas}
    gaps = [now - last[name] for name in got if name in last]
    last.update(dict.fromkeys(got, now))
    return gaps, now - start, got


def steps_until(core: EngineCore, name: str, last: dict[str, float], gaps: list[float] | None = None) -> list[float]:
    """Return the seconds of each step up to `name`'s first token; the other requests' gaps are added to `gaps`."""
    seconds = []
    while True:
        own, took, got = step(core, last)
        seconds.append(took)
        if gaps is not None:
            gaps += own
        if name in got:
            return seconds


def quantile(series: list[float], share: float) -> float:
    return sorted(series)[round(share * (len(series) - 1))]


if __name__ == "__main__":
    main()
