"""The HTTP API's requests (pydantic: checked, with OpenAI's names and types) and responses (typed dictionaries)."""
