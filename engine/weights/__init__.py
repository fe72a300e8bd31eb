"""Weights: formats of files and schemes of quantization, each for tensors that a family has declared.

Nothing here knows a model: `engine.models.checkpoint` joins families and formats.
"""
