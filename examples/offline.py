"""Run the engine in this process, without a server: prompts and answers are token ids.

python examples/offline.py [MODEL]
"""

import sys

from pilotfish import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
prompts = [[504, 338, 282, 260, 314], [57, 58, 59, 57, 58, 59, 57, 58]]
sampled = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=16)

with LLM(model, kv_cache_memory=64 << 20) as llm:
    for completion in llm.generate(prompts, sampled, n=2):
        print(completion.prompt_ids, "->", completion.token_ids, completion.finish_reason)
