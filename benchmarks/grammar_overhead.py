"""What grammars cost a step: masks, cutting drafts, and following the answer, as shares of the step's time.

    python benchmarks/grammar_overhead.py --sequences 8 --draft-tokens 4

Decodes as many answers at once under a JSON schema, each step with a draft of up to --draft-tokens tokens for each
(what the grammar forces, n-grams, or a head), and adds up the seconds spent in each part. "waiting" is the time that a
step waits for masks after its pass; they are computed in threads while it runs. "not hidden" is all but that computing.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from functools import wraps
from typing import Any

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine import core as engine_core
from pilotfish.engine.answer_grammar import AnswerGrammar
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.sampling import processors
from pilotfish.text.grammar.matcher import load_vocabulary
from pilotfish.text.grammar.output_format import OutputFormat, build
from pilotfish.text.tokenizer import load_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 60},
        "steps": {
            "type": "array",
            "minItems": 3,
            "maxItems": 6,
            "items": {
                "type": "object",
                "properties": {
                    "description": {"type": "string", "maxLength": 80},
                    "minutes": {"type": "integer", "minimum": 1, "maximum": 90},
                    "difficulty": {"enum": ["easy", "medium", "hard"]},
                },
                "required": ["description", "minutes", "difficulty"],
            },
        },
    },
    "required": ["title", "steps"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--speculation", default="auto")
    args = parser.parse_args()
    files = resolve(args.model)
    tokenizer = load_tokenizer(files)
    spent: defaultdict[str, float] = defaultdict(float)
    with LLM(args.model, num_draft_tokens=args.draft_tokens, adaptive_drafts=False) as llm:
        vocabulary = load_vocabulary(files, llm.info.vocab_size, llm.info.eos_token_ids)
        grammar = build(OutputFormat("json_schema", SCHEMA, "schema"), vocabulary)
        params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, grammar=grammar)
        asked = [{"role": "user", "content": f"How do I {what}? Answer in JSON."} for what in WHAT[: args.sequences]]
        prompts = [tokenizer.encode(tokenizer.apply_chat_template([each]), add_special_tokens=False) for each in asked]
        llm.generate(prompts, params, speculation=args.speculation)
        _time(engine_core, "plan_masks", spent, "computing masks, in threads")
        _time(processors, "restrict", spent, "applying masks")
        _time(AnswerGrammar, "count_allowed", spent, "cutting drafts")
        _time(AnswerGrammar, "forced", spent, "finding what is forced")
        _time(AnswerGrammar, "advance", spent, "following the answer")
        _time(Future, "result", spent, "waiting for masks")
        steps, rows = 0, 0
        for request in llm.requests(prompts, params, speculation=args.speculation):
            llm.core.add(request)
        total = 0.0
        while llm.core.has_work():
            start = time.perf_counter()
            result = llm.core.step()
            if result.stats.prompt_tokens or result.stats.running < args.sequences:
                spent.clear() if not steps else None
                continue
            total += time.perf_counter() - start
            steps, rows = steps + 1, rows + result.stats.constrained_rows
    print(
        f"{steps} steps of {args.sequences} sequences, {rows / steps:.1f} rows, {total / steps * 1e3:.2f} ms a step\n"
    )
    print("| | µs a step | share of the step |\n|---|---|---|")
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {name} | {seconds / steps * 1e6:.0f} | {seconds / total:.2%} |")
    shown = sum(spent.values()) - spent["computing masks, in threads"]
    print(f"| **not hidden** | {shown / steps * 1e6:.0f} | {shown / total:.2%} |")


WHAT = (
    "bake bread", "repair a bicycle tyre", "plant a tree", "paint a wall", "write a letter", "learn to swim",
    "make soup", "clean a window",
)  # fmt: skip


def _time(owner: Any, name: str, spent: defaultdict[str, float], label: str) -> None:
    """Replace `owner.name` by itself with its seconds added to `spent`."""
    timed: Callable[..., Any] = getattr(owner, name)

    @wraps(timed)
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return timed(*args, **kwargs)
        finally:
            spent[label] += time.perf_counter() - start

    setattr(owner, name, run)


if __name__ == "__main__":
    main()
