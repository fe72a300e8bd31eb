"""Chat completions: from OpenAI's messages to a conversation, and from the parts of an answer to messages."""
