"""Many prompts at once in an event loop, and a stream that is left early; the engine is in a process of its own.

python examples/asynchronous.py [MODEL]
"""

import asyncio
import sys
from contextlib import aclosing

from pilotfish import AsyncLLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
prompts = ["The capital of France is", "Once upon a time", "The sea is"]
params = SamplingParams(temperature=0.8, seed=1, max_tokens=16)


async def main() -> None:
    async with AsyncLLM(model, kv_cache_memory=64 << 20) as llm:
        for (answer,) in await asyncio.gather(*(llm.generate(prompt, params) for prompt in prompts)):
            print(repr(answer.prompt), "->", repr(answer.text))

        read = 0
        async with aclosing(llm.stream(prompts[1], params)) as tokens:
            async for token in tokens:
                read += 1
                if read == 5 or token.finish_reason:
                    break  # the rest is not computed
        print("read", read, "tokens")


asyncio.run(main())
