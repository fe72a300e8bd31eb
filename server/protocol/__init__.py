"""The HTTP API's types: requests (pydantic, which checks them) and responses (msgspec structs, which encode fast).

A response type stands beside its request type: its fields are written in their order, and one that is UNSET is left
out. A struct with a tag is an event that has a name (see `server.generation.events`).
"""
