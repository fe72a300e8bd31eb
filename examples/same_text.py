"""Send one sampled request with every setting of `speculation`: the seed decides the text, not the drafter."""

import os

from openai import BadRequestError, OpenAI

client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = client.models.list().data[0].id


def text(speculation: str) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Invent a name for a lighthouse, and say why it is called that."}],
        max_tokens=48,
        temperature=0.8,
        seed=7,
        extra_body={"speculation": speculation},
    )
    return answer.choices[0].message.content


plain = text("off")
print(plain)
for speculation in ("auto", "ngram", "suffix"):
    print(f"{speculation}: {'the same text' if text(speculation) == plain else 'ANOTHER TEXT'}")

try:
    text("clairvoyance")
except BadRequestError as error:
    print(error.body["message"])  # names the drafters that this server has
