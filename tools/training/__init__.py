"""Training drafts for a target: the text it writes itself, its features of that text, the draft, the loop.

Token ids in, safetensors out. Nothing here serves a request, and nothing that serves one imports it.
"""
