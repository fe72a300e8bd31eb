"""Grammars of answers: what they are made from, and how they are put together. llguidance compiles them, and the engine
masks with them.
"""
