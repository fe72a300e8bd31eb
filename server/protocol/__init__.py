"""The HTTP API's types: requests (pydantic models, which validate) and responses (msgspec structs, which encode fast).

Response types are beside their request types. Fields are written in order; UNSET ones are left out. A struct with a tag
is a named event (see `server.generation.events`).
"""
