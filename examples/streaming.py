"""Stream an answer as it is generated. With speculation one chunk may bring several tokens."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Count from one to twenty in words."}],
    max_tokens=64,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    else:  # the last chunk: usage and timings
        print(f"\n{chunk.usage.completion_tokens} tokens, {chunk.timings['accepted_tokens']} of them drafted")
