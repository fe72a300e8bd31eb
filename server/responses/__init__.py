"""The Responses API: items to conversations, parts of an answer to items and events, and the store of responses."""
