"""JSON that matches a schema, here a pydantic model's, and text that matches a regular expression."""

import os
from typing import Literal

from openai import OpenAI
from pydantic import BaseModel, Field

client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = client.models.list().data[0].id


class Person(BaseModel):
    name: str = Field(max_length=30)
    age: int = Field(ge=0, le=120)
    mood: Literal["happy", "sad", "hungry"]


answer = client.chat.completions.parse(
    model=model,
    messages=[{"role": "user", "content": "Make up a person."}],
    response_format=Person,
    max_tokens=100,
)
print(answer.choices[0].message.parsed)

answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "When does the train leave?"}],
    extra_body={"structured_outputs": {"regex": r"At ([01]\d|2[0-3]):[0-5]\d\."}},
)
print(answer.choices[0].message.content)
