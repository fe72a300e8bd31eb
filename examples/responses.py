"""A conversation over the Responses API: the server keeps what was said."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = client.models.list().data[0].id

first = client.responses.create(model=model, input="Name a large animal.", max_output_tokens=30)
print(first.output_text)

stream = client.responses.create(
    model=model, input="Where does it live?", previous_response_id=first.id, max_output_tokens=30, stream=True
)
for event in stream:
    if event.type == "response.output_text.delta":
        print(event.delta, end="", flush=True)
    elif event.type in ("response.completed", "response.incomplete"):
        usage = event.response.usage
        print(f"\n{usage.input_tokens} tokens in, {usage.input_tokens_details.cached_tokens} of them cached")
