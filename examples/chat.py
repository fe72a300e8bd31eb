"""Chat with a running server through OpenAI's client, and print what speculation did for the answer."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = client.models.list().data[0].id

answer = client.chat.completions.create(
    model=model,
    messages=[
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "Why does a pilotfish swim with a shark?"},
    ],
    max_tokens=48,
)
print(answer.choices[0].message.content)

timings = answer.timings
print(f"{answer.usage.completion_tokens} tokens, the first after {timings['ttft_ms']:.0f} ms")
for name, used in timings["drafters"].items():
    print(f"{name}: {used['accepted_tokens']} of {used['drafted_tokens']} drafted tokens accepted")
