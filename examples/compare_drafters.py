"""Compare the drafters that a model has, in this process: tokens per second, acceptance, and the same text.

    python examples/compare_drafters.py [MODEL]

`pilotfish bench` does this properly: on prompts of your own, in turns, over several rounds.
"""

import sys
import time

from pilotfish import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
prompt = [504, 338, 282, 260, 314] * 4
greedy = SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True)

with LLM(model, kv_cache_memory=64 << 20, prefix_caching=False, suffix_memory=0) as llm:
    texts = {}
    for name in ("off", *llm.info.drafters, "auto"):
        if name in ("prediction", "grammar"):  # what they draft from, these requests do not have
            continue
        start = time.perf_counter()
        (completion,) = llm.generate([prompt], greedy, speculation=name)
        seconds = time.perf_counter() - start
        texts[name] = completion.token_ids
        stats = completion.stats
        print(
            f"{name:24} {len(completion.token_ids) / seconds:7.1f} tokens/s, "
            f"{stats.accepted_tokens} of {stats.drafted_tokens} drafted tokens accepted"
        )
    print("the same text with each:", all(text == texts["off"] for text in texts.values()))
