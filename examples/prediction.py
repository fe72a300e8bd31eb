"""Predicted Outputs: send the text that the answer is expected to be close to, here code with one name to change."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = client.models.list().data[0].id

CODE = """\
def area(width, height):
    return width * height

print(area(3, 4))
"""

answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": f"Repeat this code, but call the function `size`:\n\n{CODE}"}],
    max_tokens=64,
    temperature=0.0,
    prediction={"type": "content", "content": CODE},
)
print(answer.choices[0].message.content)
details = answer.usage.completion_tokens_details
print(f"{details.accepted_prediction_tokens} predicted tokens accepted, {details.rejected_prediction_tokens} rejected")
