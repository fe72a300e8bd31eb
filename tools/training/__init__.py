"""Training drafts for a target, from token ids to safetensors: the text that the target writes, its features, the
drafts and the training loop.
"""
