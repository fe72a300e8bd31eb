"""Anthropic's Messages API on a running server, through Anthropic's client: a stream, and what it used."""

import os

from anthropic import Anthropic

client = Anthropic(base_url=os.environ.get("ANTHROPIC_BASE_URL", "http://127.0.0.1:8000"), api_key="none")
model = client.models.list().data[0].id
question = {
    "model": model,
    "system": "Answer in one sentence.",
    "messages": [{"role": "user", "content": "Why does a pilotfish swim with a shark?"}],
}
print(f"{client.messages.count_tokens(**question).input_tokens} tokens to read")

with client.messages.stream(**question, max_tokens=48, stop_sequences=["\n\n"]) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
    message = stream.get_final_message()

print(f"\n{message.usage.output_tokens} tokens, ended by {message.stop_reason}")
