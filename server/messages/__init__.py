"""Anthropic's Messages API: `conversation` turns a request into a Conversation, `blocks` the parts of an answer into
content blocks and the events of a stream, `errors` is the form of its errors.
"""
